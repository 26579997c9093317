"""The measuring of the stages of a search: gradients, the grid, the best cells and controls, verdict, composition."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from harness.engine.manifest import manifest_there
from harness.engine.measurement import Context, Measured
from harness.engine.ranks import Ranks
from harness.engine.run import Outcome, RunOptions, error_row, run_plan
from harness.errors import InputError
from harness.evaluation.blank_scores import transforms
from harness.evaluation.division import LostStep
from harness.measurements import ABLATION
from harness.measurements.ablation.study import Study
from harness.measurements.search.prediction import chosen_by_gradient, compare_with_grid, predict
from harness.measurements.search.tables import TABLES
from harness.measurements.search.units import REPORT, SELECTION, SearchPlan, Stage
from harness.measurements.search.verdict import Winner, beside_rows, controls_of, verdict_rows, winners
from harness.models.editing import Ablation
from harness.tables.frames import dicts_of
from harness.tables.store import read_table, unit_states

Rows = list[dict[str, Any]]


def open_session(plan: SearchPlan, ranks: Ranks, progress: bool) -> None:
    """Do nothing, because the studies of the search open their own sessions."""


def measure(plan: SearchPlan, stages: Sequence[Stage], context: Context) -> Iterator[Measured]:
    """Run the stages in order. If cells that a stage read have failed, its rows are kept and its status is "error"."""
    run = SearchRun(plan, context)
    for stage in stages:
        context.describe(stage.name)
        started = time.perf_counter()
        described = {"stage_id": stage.id, "stage": stage.name}
        try:
            found = run.stage(stage.name)
            row = {**described, **run.of_study(stage.name), "seconds": time.perf_counter() - started, "status": "ok"}
            if failed := run.n_failed(stage.name):
                where = f"harness status {plan.folder} --failed"
                row |= {"status": "error", "error": f"{failed} cells behind it failed ({where}); run the search again"}
            rows = {name: [{"stage_id": stage.id, **one} for one in of_table] for name, of_table in found.items()}
            yield Measured(stage, {"stages": [row], **{name: rows[name] for name in rows if rows[name]}}, described)
        except (InputError, LostStep):
            raise
        except Exception as error:
            yield Measured(stage, {"stages": [error_row(described, error)]}, described)


class SearchRun:
    """The state of a search. Results that several stages need are computed once, when the first stage needs them."""

    def __init__(self, plan: SearchPlan, context: Context) -> None:
        self.plan, self.context = plan, context
        self.choices = plan.settings.search
        self.outcomes: dict[str, Outcome] = {}
        self.studies: dict[str, Study] = {}

    def stage(self, name: str) -> dict[str, Rows]:
        """Run a stage and return its rows by table."""
        stages: dict[str, Callable[[], dict[str, Rows]]] = {
            "predictions": lambda: {"predictions": self.predictions},
            SELECTION: lambda: {} if self.selection else {},
            REPORT: lambda: {} if self.report else {},
            "verdict": self._verdict,
            "comparison": self._comparison,
            "composition": self._composition,
        }
        return stages[name]()

    def of_study(self, name: str) -> dict[str, Any]:
        """Return the columns of `stages` about the study that a stage measured."""
        if name not in self.outcomes:
            return {}
        study, outcome = self.studies[name], self.outcomes[name]
        return {"study_id": study.id, "n_cells": len(study.units), "n_failed": outcome.failed}

    def n_failed(self, name: str) -> int:
        """Return how many of the cells that a stage read have failed."""
        read = {"predictions": (), SELECTION: (SELECTION,), "comparison": (SELECTION,)}.get(name, (SELECTION, REPORT))
        return sum(self.outcomes[part].failed for part in read if part in self.outcomes)

    @cached_property
    def predictions(self) -> Rows:
        """The rows of `predictions`, read from the table if the stage is done."""
        plan = self.plan
        assert plan.examples is not None
        stage = next(stage for stage in plan.units if stage.name == "predictions")
        if plan.folder.exists() and unit_states(plan.folder, TABLES).get(stage.id) == "ok":
            table = read_table(plan.folder, TABLES, "predictions", [stage.id])
            return dicts_of(table.drop(columns="stage_id"))
        return predict(plan.selection, plan.examples, self.choices.metrics)

    @cached_property
    def selection(self) -> Study:
        """The study of the grid, or of the part that gradients choose, after it was measured."""
        study = self.plan.selection
        if self.choices.choice == "gradient":
            study = study.with_cells(chosen_by_gradient(study, self.predictions, self.choices.keep))
        return self._run(SELECTION, study)

    @cached_property
    def winners(self) -> list[Winner]:
        """The best cell of every task and metric on the selection part."""
        return winners(self.selection.folder, self.selection.units, self.choices.metrics)

    @cached_property
    def controls(self) -> Mapping[Ablation, Mapping[str, Sequence[Ablation]]]:
        """The controls of each best ablation: name of the control -> its draws."""
        return {winner.ablation: controls_of(winner, self.choices.control_seeds) for winner in self.winners}

    @cached_property
    def report(self) -> Study:
        """The study of the best cells, their controls and the tasks without parts, after it was measured."""
        beside = self.plan.settings.beside()
        pairs: list[tuple[Ablation, str]] = []
        for winner in self.winners:
            pairs += [(winner.ablation, name) for name in (winner.task, *beside)]
            draws = self.controls[winner.ablation].values()
            pairs += [(draw, winner.task) for of_control in draws for draw in of_control]
        report = self.plan.report.with_cells(pairs)
        division = self.context.division
        division.agree("earlier best cells", lambda: _set_aside_other(report) if division.rank == 0 else None)
        return self._run(REPORT, report)

    def _run(self, name: str, study: Study) -> Study:
        options = RunOptions(self.context.progress, tidy=True)
        if not self.context.progress:
            options = RunOptions(False, lambda line: None, tidy=True)
        self.outcomes[name], self.studies[name] = run_plan(ABLATION, study, options), study
        return study

    def _verdict(self) -> dict[str, Rows]:
        report, beside = self.report, self.plan.settings.beside()
        cell_of = {(cell.ablation, cell.task): cell for cell in report.units}
        rows = verdict_rows(report.folder, self.winners, cell_of, self.controls, transforms(report.tasks))
        return {"verdict": rows, "beside": beside_rows(report.folder, self.winners, cell_of, beside)}

    def _comparison(self) -> dict[str, Rows]:
        return {"comparison": compare_with_grid(self.selection, self.predictions, self.choices.metrics)}

    def _composition(self) -> dict[str, Rows]:
        from harness.measurements.search.composition import compose_greedily

        return {"composition": compose_greedily(self.selection, self.report, self.choices.metrics)}


def _set_aside_other(report: Study) -> None:
    """Rename the folder of an earlier report study of this search, which had other best cells.

    The best cells change if a cell of the grid failed in the earlier run and is better than all others in this one.
    """
    there = manifest_there(ABLATION.name, report.folder)
    if there is not None and there.id != report.id:
        report.folder.rename(report.folder.with_name(f"{report.folder.name}-{there.id}"))
