"""A search for ablations that help (as LASER, arXiv 2312.13558): the stages from a grid of ablations to a verdict.

The best cell is chosen on one part of the examples and judged on the other. The folder of a search holds two studies,
which resume like any other study. studies/selection measures the grid. studies/report measures the best cell of every
metric, its random and energy-matched controls, and the tasks without parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from harness.engine.manifest import MANIFEST, read_manifest
from harness.engine.plan import Plan, canonical, digest, folder_of, run_id
from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.measurements.ablation import units as ablation_units
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.tables import cell_states
from harness.measurements.search.settings import SearchSettings
from harness.models.loading import pick_device
from harness.tasks.settings import SplitTask

STUDIES = "studies"
SELECTION: Final = "selection"
REPORT: Final = "report"
VERDICT_VERSION = 3  # part of the id of the stage; raised when the rule of the verdict changes


@dataclass(frozen=True)
class Stage:
    """One step of a search. name: its name in the column `stage`."""

    id: str
    name: str

    @property
    def part(self) -> str:
        """The name, because `harness status` lists the stages one by one."""
        return self.name


@dataclass(frozen=True, kw_only=True)
class SearchPlan(Plan):
    """The plan of a search.

    units: the stages in their order.
    selection: the study of the whole grid on the selection part.
    report: the study of the whole grid on the report part and on the tasks without parts, of which only the best cells
        and their controls are measured.
    examples: the study whose tasks hold the examples of the gradients, or None if no gradients are needed.
    """

    settings: SearchSettings
    units: tuple[Stage, ...]
    selection: Study
    report: Study
    examples: Study | None

    def frozen(self) -> dict[str, Any]:
        """Return the ids of the two studies for the manifest."""
        return {"studies": [self.selection.id, self.report.id]}

    def missing(self, wanted: Sequence[Stage], states: Mapping[str, str]) -> list[Stage]:
        """Return the stages that must be run: all, if a cell of the two studies is missing or failed.

        The rows of a stage do not say which cells existed when it was run, so a stage that was run may be incomplete.
        """
        complete = all(_is_complete(self.folder / STUDIES / part) for part in (SELECTION, REPORT))
        return super().missing(wanted, states) if complete else list(wanted)

    def together(self, n_missing: int, n_ranks: int) -> bool:
        """Return True: every process runs every stage, and the studies inside divide their cells among them."""
        return True

    def groups(self, units: Sequence[Stage]) -> list[list[Stage]]:
        """Return one group of all stages, because each stage needs the ones before it."""
        return [list(units)]

    def before_jobs(self) -> None:
        """Prepare what the study of the grid needs."""
        self.selection.before_jobs()


def _is_complete(folder: Path) -> bool:
    if not (folder / MANIFEST).is_file():
        return False
    states = cell_states(folder)
    return all(states.get(unit_id) == "ok" for unit_id, _ in read_manifest(folder).units)


def plan(settings: SearchSettings) -> SearchPlan:
    """Return the search that the settings mean. No weights are loaded.

    Raises InputError as the plan of a study does, and if a task has none of the metrics.
    """
    choices, searched = settings.search, settings.searched()
    selection = _study(settings, searched, SELECTION)
    _check_metrics(selection, choices.metrics)
    report = _study(settings, [*searched, *settings.beside()], REPORT, choices.report_limit)
    examples = None
    if choices.choice != "exhaustive":
        examples = _study(settings, searched, SELECTION, choices.gradient_examples)
    units = _stages(settings, selection, report, examples)
    default = f"{settings.model.stem}-search-{run_id(unit.id for unit in units)[:8]}"
    folder = folder_of(settings.output, default)
    return SearchPlan(
        folder=folder, settings=settings, units=units, report=_in(report, folder, REPORT),
        selection=_in(selection, folder, SELECTION), examples=examples,
    )


def restore(folder: Path, manifest: Mapping[str, Any], settings: SearchSettings) -> SearchPlan:
    """Return the plan that was frozen in a folder. Raises InputError if weights or data have changed since."""
    settings.runtime.require_batch_tokens("work")
    pick_device(settings.model.device)
    return plan(dataclasses.replace(settings, output=str(folder))).restored(folder, manifest)


def describe(plan: SearchPlan) -> str:
    """Return the text of `harness plan`."""
    stages = ", ".join(stage.name for stage in plan.units)
    lines = [f"search {plan.id}  folder {plan.folder}", f"stages {len(plan.units)}: {stages}", "selection:"]
    lines += [f"  {line}" for line in ablation_units.describe(plan.selection).splitlines()]
    n_best, n_draws = len(plan.settings.search.metrics), 4 * len(plan.settings.search.control_seeds)
    examples = ", ".join(f"{name} {len(task.example_ids)}" for name, task in plan.report.tasks.items())
    lines.append(
        f"report: at most {n_best} best cells of each of {len(plan.settings.searched())} tasks, at most"
        f" {n_draws} draws of controls for each; examples: {examples}"
    )
    return "\n".join(lines)


def _study(
    settings: SearchSettings, names: Sequence[str], part: Literal["selection", "report"], limit: int | None = -1
) -> Study:
    """Return the study of the grid on one part of the tasks `names`. limit: that of the tasks; -1: keep their own."""
    tasks = {}
    for name in names:
        task = settings.tasks[name]
        if isinstance(task, SplitTask):
            task = dataclasses.replace(task, part=part)
            if limit != -1:
                task = dataclasses.replace(task, limit=limit)
        tasks[name] = task
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "search"}
    return ablation_units.plan(ablation_units.StudySettings(**{**values, "tasks": tasks}))


def _in(study: Study, folder: Path, part: str) -> Study:
    output = folder / STUDIES / part
    settings = dataclasses.replace(study.settings, output=str(output))
    return dataclasses.replace(study, folder=output, settings=settings)


def _check_metrics(selection: Study, wanted: Sequence[str]) -> None:
    for name, task in selection.tasks.items():
        there = blank_measure(task)
        if not set(wanted) & there.keys():
            raise InputError(f"search.metrics: task {name} has none of {', '.join(wanted)}; it has {', '.join(there)}")


def _stages(settings: SearchSettings, selection: Study, report: Study, examples: Study | None) -> tuple[Stage, ...]:
    choices = settings.search
    guess = None if examples is None else [selection.id, examples.id, choices.metrics]
    grid = [selection.id, choices.choice == "gradient" and [guess, choices.keep]]
    judged = [grid, report.id, choices.metrics, choices.control_seeds]
    judged += ["rotated"] if settings.region.by == "component" else []
    depends_on: dict[str, Any] = {"predictions": guess} if guess else {}
    depends_on |= {SELECTION: grid, REPORT: judged, "verdict": [judged, VERDICT_VERSION]}
    if choices.choice == "compare":
        depends_on["comparison"] = [grid, guess]
    if choices.compose == "greedy":
        depends_on["composition"] = judged
    return tuple(Stage(digest(canonical([name, what])), name) for name, what in depends_on.items())
