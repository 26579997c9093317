"""The search of LASER, made honest: choose among many ablations on one part of the examples, judge on the other.

(Sharma, Ash, Misra 2024, arXiv 2312.13558.) The folder of a search holds two studies, `selection` (the grid) and
`report` (the best cell of every metric, its random and energy-matched controls, and the tasks beside), and tables:
`verdict`, and where asked for `predictions`, `comparison` and `composition`. Both studies resume like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import Config, require_batch_tokens
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask
from harness.execution.choosing import blank_measure, chosen_by_gradient, compare_with_grid, predict
from harness.execution.manifest import freeze
from harness.execution.planned import PlannedStudy, plan
from harness.execution.ranks import Ranks, join
from harness.execution.runner import run_planned, to_stderr
from harness.execution.study import BASELINE, NO_REGION, Ablation, Cell, Study, cell_id, numeric_settings
from harness.execution.verdict import Winner, markdown, verdict_rows, winners, write_table
from harness.spectral.regions import energy_matched_region, random_region

SELECTION, REPORT = "selection", "report"


def search(config: Config, progress: bool = True, report_to: Callable[[str], None] | None = None) -> Path:
    """Run what is missing of a search and write its tables; returns its folder. Raises InputError for bad input."""
    say = report_to or to_stderr
    require_batch_tokens(config.runtime, "search")
    searched, beside = split_tasks(config)
    if config.search.compose == "greedy" and config.target.kind not in ("matrix", "block"):
        raise InputError("search.compose: greedy goes block by block; use target=matrix or target=block")
    folder = Path(config.output).expanduser() if config.output else Path("results") / search_name(config)
    selection = _planned(config, searched, SELECTION, folder / SELECTION)
    _check_metrics(selection)
    choice = config.search.choice
    ranks = join()
    predictions = None
    if choice != "exhaustive":
        examples = _planned(config, searched, SELECTION, folder, config.search.gradient_examples)
        predictions = _once(
            folder / "predictions", f"{selection.study.study_id}-{examples.study.study_id}", ranks,
            lambda: predict(selection, examples),
        )
    if choice == "gradient":
        pairs = chosen_by_gradient(selection, predictions, config.search.keep)
        selection = with_cells(selection, pairs)
        say(f"gradient: {len(pairs)} cells of the grid are measured")
    _run(selection, ranks, progress, say)
    found = winners(selection.folder, selection.study.cells, config.search.metrics)
    controls = {winner.ablation: _controls(winner.ablation, config.search.control_seeds) for winner in found}
    report = _planned(config, [*searched, *beside], REPORT, folder / REPORT, config.search.report_limit)
    report = with_cells(report, _report_pairs(found, controls, searched, beside))
    _run(report, ranks, progress, say)
    if ranks.is_main:
        cell_of = {(cell.ablation, cell.task): cell for cell in report.study.cells}
        rows = verdict_rows(report.folder, found, cell_of, controls, transforms(report.tasks), beside)
        write_table(folder / "verdict", rows)
        if choice == "compare":
            write_table(folder / "comparison", compare_with_grid(selection, predictions))
        if config.search.compose == "greedy":
            from harness.execution.composing import compose_greedily

            made_of = f"{selection.study.study_id}-{report.study.study_id}"
            _once(folder / "composition", made_of, ranks,
                  lambda: compose_greedily(selection, report, config.search.metrics))
        say(markdown([{k: row.get(k) for k in ("task", "metric", "target", "region", "delta", "p_holm", "verdict")}
                      for row in rows]).rstrip())
    ranks.wait()
    return folder


def _run(planned: PlannedStudy, ranks: Ranks, progress: bool, say: Callable[[str], None]) -> None:
    """Run what is missing; a folder that holds another study is refused before any weights are loaded."""
    if ranks.is_main:
        freeze(planned.folder, planned.study)
    run_planned(planned, planned.study.cells, ranks, progress, say)


def _once(
    path: Path, made_of: str, ranks: Ranks, make: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of a table, from its file where that was made of the same studies, else made anew and written."""
    file = path.with_suffix(".parquet")
    if file.is_file():
        import pandas

        table = pandas.read_parquet(file)
        if (table.made_of == made_of).all():
            return table.to_dict("records")
    rows = [{**row, "made_of": made_of} for row in make()]
    if ranks.is_main:
        write_table(path, rows)
    return rows


def split_tasks(config: Config) -> tuple[list[str], list[str]]:
    """Names of the tasks that are searched (those that have parts), and of those measured beside. InputError: none to
    search, or one whose part is already set."""
    searched = [name for name, task in config.tasks.items() if hasattr(task, "part")]
    for name in searched:
        if config.tasks[name].part is not None:
            raise InputError(f"tasks.{name}.part: leave it unset; a search uses both parts")
    if not searched:
        raise InputError(
            f"task: none of {', '.join(config.tasks)} can be split into a selection and a report part; add one such"
            " as ioi, factual, blimp, lambada or epistemic_reasoning"
        )
    if not config.runtime.examples:
        raise InputError("runtime.examples: false is wrong for a search, which compares cells example by example")
    if config.runtime.precision != "exact":
        raise InputError("runtime.precision: use exact for a search; adaptive cells are of different examples")
    return searched, [name for name in config.tasks if name not in searched]


def search_name(config: Config) -> str:
    """Folder of a search without `output`: the model's name and a digest of all settings."""
    digest = hashlib.blake2b(repr(dataclasses.replace(config, output=None)).encode(), digest_size=4).hexdigest()
    return f"{Path(config.model.name).name}-search-{digest}"


def _planned(
    config: Config, names: Sequence[str], part: str, folder: Path, limit: int | float | None = math.nan
) -> PlannedStudy:
    """The grid on one part of the tasks; limit: in place of the tasks' own (NaN: keep it)."""
    tasks = {}
    for name in names:
        task = config.tasks[name]
        if hasattr(task, "part"):
            task = dataclasses.replace(task, part=part)
            if not (isinstance(limit, float) and math.isnan(limit)):
                task = dataclasses.replace(task, limit=limit)
        tasks[name] = task
    return plan(dataclasses.replace(config, tasks=tasks, output=str(folder)))


def with_cells(planned: PlannedStudy, pairs: Iterable[tuple[Ablation, str]]) -> PlannedStudy:
    """The same plan with the baselines and these cells only, those of an earlier first block first."""
    study = planned.study
    settings = numeric_settings(study.config, planned.description)
    baselines = [(Ablation(BASELINE, NO_REGION), name) for name in study.tasks]
    unique = dict.fromkeys([*baselines, *sorted(pairs, key=lambda pair: pair[0].target.first_block)])
    cells = tuple(
        Cell(cell_id(settings, ablation, study.tasks[task]["digest"]), ablation, task) for ablation, task in unique
    )
    ids = "".join(sorted(cell.cell_id for cell in cells))
    study_id = hashlib.blake2b(ids.encode(), digest_size=6).hexdigest()
    return dataclasses.replace(planned, study=Study(study_id, study.config, study.tasks, cells))


def _controls(ablation: Ablation, seeds: Sequence[int]) -> dict[str, list[Ablation]]:
    target, region = ablation.target, ablation.region
    return {
        "random": [Ablation(target, random_region(region, seed)) for seed in seeds],
        "energy_matched": [Ablation(target, energy_matched_region(region, seed)) for seed in seeds],
    }


def _report_pairs(
    found: Sequence[Winner], controls: Mapping[Ablation, Mapping[str, Sequence[Ablation]]], searched: Sequence[str],
    beside: Sequence[str],
) -> list[tuple[Ablation, str]]:
    pairs = []
    for winner in found:
        pairs += [(winner.ablation, winner.task), *((winner.ablation, name) for name in beside)]
        pairs += [(draw, winner.task) for draws in controls[winner.ablation].values() for draw in draws]
    return pairs


def _check_metrics(selection: PlannedStudy) -> None:
    wanted = selection.study.config.search.metrics
    for name, task in selection.tasks.items():
        there = blank_measure(task)
        if not set(wanted) & there.keys():
            raise InputError(f"search.metrics: task {name} has none of {', '.join(wanted)}; it has {', '.join(there)}")


def transforms(tasks: Mapping[str, PreparedTask]) -> dict[tuple[str, str], str]:
    """(task, metric) -> transform of its ExampleScores."""
    return {
        (name, metric): scores.transform
        for name, task in tasks.items() if task.measure is not None for metric, scores in blank_measure(task).items()
    }
