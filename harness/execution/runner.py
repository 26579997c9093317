"""The runner: one model, many cells. Splits them over processes and scores them at the frontier."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config import Config
from harness.errors import InputError
from harness.evaluation.adaptive import Sampled, Sampler
from harness.evaluation.division import Division, LostStep
from harness.evaluation.requests import ExampleScores, PreparedTask, Scores
from harness.evaluation.scoring import Scorer, scorer_of
from harness.execution.ablating import ablated
from harness.execution.batch_size import frozen_batch, largest_batch, with_batch
from harness.execution.costs import study_costs
from harness.execution.decompositions import DecompositionCache, disk_cache
from harness.execution.manifest import MANIFEST, freeze
from harness.execution.memory import is_out_of_memory, release_memory
from harness.execution.planned import PlannedStudy, plan
from harness.execution.ranks import Ranks, join
from harness.execution.rows import RowWriter
from harness.execution.shards import split
from harness.execution.study import Cell, group_by_ablation
from harness.models.loading import LoadedModel, load, require_head
from harness.tables.schema import SchemaVersionError
from harness.tables.store import (
    cell_states,
    check_version,
    compact,
    failed_since,
    list_table,
    quarantine,
)

SMALLER = 0.25  # of a batch, for the second try of a cell that ran out of memory
LOOSE_FILES = 1000  # more files of single cells than this are merged when a run ends


class NonFiniteLoss(RuntimeError):
    """A cell's score is not a number: the row says so instead of hiding it."""


def usable_states(folder: Path, deep: bool = False) -> dict[str, str]:
    """States of the cells that are there, after damaged parts were moved aside so that their cells run again.

    deep: read every part whole, not only its ends.
    Raises InputError for tables of another schema version.
    """
    if not folder.exists():
        return {}
    try:
        check_version(folder)
    except SchemaVersionError as error:
        raise InputError(str(error)) from error
    quarantine(folder, deep)
    return cell_states(folder)


def measure(
    cell: Cell, task: PreparedTask, scorer: Scorer, loaded: LoadedModel, first_block: int, sampler: Sampler | None,
    batch_share: float = 1.0,
) -> dict[str, ExampleScores] | Sampled:
    """The example scores of one task under the model's present weights; with a sampler, of as many examples as it
    takes. batch_share: for tasks that generate text, the share of their usual batches to use. Raises NonFiniteLoss."""
    if task.generate is not None:
        return task.generate(loaded, scorer.division, batch_share)

    def score(name: str) -> Scores:
        scores = scorer.score(name, first_block)
        bad = int((~np.isfinite(scores.logprob)).sum())
        if bad:
            n = len(scores.logprob)
            raise NonFiniteLoss(f"{bad} of {n} scored tokens have a log-probability that is not finite")
        return scores

    if sampler is None:
        return task.measure(score(task.name))
    return (sampler.measure_baseline if cell.is_baseline else sampler.measure)(task.name, score)


def run(config: Config, progress: bool = True, report_to: Callable[[str], None] | None = None) -> Path:
    """Run what is missing of a study; returns its folder. Under a launcher the cells are split over its processes.

    Raises InputError for bad input, and where rows cannot be written.
    """
    ranks = join()
    if ranks.n > 1 and config.model.device_map is not None:
        raise InputError(
            "model.device_map: one process holds such a model, over all devices; start one process, or leave it unset"
        )
    planned, loaded = plan(config), None
    if config.runtime.batch_tokens is None:
        planned, loaded = _with_largest_batch(planned, ranks, progress, report_to or to_stderr)
    if ranks.is_main and (planned.folder / MANIFEST).is_file():
        freeze(planned.folder, planned.study)
    return run_planned(planned, planned.study.cells, ranks, progress, report_to, tidy=True, loaded=loaded)


def _with_largest_batch(
    planned: PlannedStudy, ranks: Ranks, progress: bool, say: Callable[[str], None]
) -> tuple[PlannedStudy, LoadedModel | None]:
    """The study with the batch of its manifest, or with the largest that fits; and the model, where that loaded it."""

    def find() -> tuple[int | None, LoadedModel | None]:
        if not ranks.is_main:
            return None, None
        known = frozen_batch(planned)
        if known is not None:
            return known, None
        loaded = _load(planned, progress)
        found = largest_batch(loaded, planned.tasks, planned.study.config.runtime)
        say(f"runtime.batch_tokens: {found}, the largest that fits")
        return found, loaded

    found, loaded = ranks.division().agree("finding the largest batch", find)
    return with_batch(planned, ranks.broadcast(found)), loaded


def run_planned(
    planned: PlannedStudy, wanted: Sequence[Cell], ranks: Ranks, progress: bool = True,
    report_to: Callable[[str], None] | None = None, failed_after: float = math.inf,
    tidy: bool = False, loaded: LoadedModel | None = None,
) -> Path:
    """Run what is missing of the `wanted` cells, split over the ranks; returns the study's folder.

    tidy: merge small files at the end where there are many: reading 100,000 takes minutes.
    loaded: the study's model, where the main process has it already.
    failed_after: cells whose error rows are younger (seconds of the file system's clock) are not tried again.
    An exception in one rank is raised there when the others have done their share. Where there are fewer exact cells
    than ranks, all ranks score each cell together, and the main one writes it. Raises InputError.
    """
    folder, study = planned.folder, planned.study
    say = report_to or to_stderr
    if not ranks.is_main:
        say = _silent
    if study.config.runtime.threads:
        torch.set_num_threads(study.config.runtime.threads)
    ids = set(ranks.broadcast(_missing(folder, wanted, failed_after) if ranks.is_main else None))
    missing = [cell for cell in wanted if cell.cell_id in ids]
    # an adaptive cell looks at its numbers batch by batch: there is nothing to divide
    divided = 0 < len(missing) < ranks.n and study.config.runtime.precision == "exact"
    on = f" on {ranks.n} processes" if ranks.n > 1 else ""
    say(f"study {study.study_id}: {len(wanted)} cells, {len(wanted) - len(missing)} done, in {folder}{on}"
        f"{', which score each cell together' if divided else ''}")
    if not missing:
        return folder
    share = missing if divided else _share(missing, planned, ranks)
    division = ranks.division()

    def prepare() -> LoadedModel | None:
        # the main process first: it downloads or trains what all of them load
        if not ranks.is_main:
            return None
        model = loaded or _load(planned, progress)
        freeze(folder, study)
        return model

    loaded = division.agree("loading the model", prepare)
    problem = None
    try:
        if share:
            loaded = loaded or _load(planned, progress)
            run_cells(planned, loaded, share, progress and ranks.is_main, division if divided else None)
    except Exception as error:
        if divided:
            raise
        problem = error
    # a barrier alone would wait for ever for a process that is at another step
    division.together("the end", lambda: None)
    ranks.wait()
    if problem is not None:
        raise problem
    if ranks.is_main:
        if tidy and len(list_table(folder, "metrics").done) > LOOSE_FILES:
            compact(folder)
        failed = sum(state == "error" for state in cell_states(folder).values())
        if failed:
            say(f"{failed} cells failed; harness status {folder} --failed shows why")
    return folder


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _silent(line: str) -> None:
    pass


def _load(planned: PlannedStudy, progress: bool) -> LoadedModel:
    loaded = load(planned.study.config.model, planned.description, planned.tokenizer, progress)
    require_head(loaded)
    if planned.study.config.runtime.compile:
        for block in loaded.blocks:
            # one graph for all blocks, whose weights are inputs: edits in place need no second one
            block.forward = torch.compile(block.forward, dynamic=True)
    return loaded


def _missing(folder: Path, wanted: Sequence[Cell], failed_after: float) -> list[str]:
    states = usable_states(folder)
    if all(states.get(cell.cell_id) == "ok" for cell in wanted):
        states = usable_states(folder, deep=True)  # whoever runs a complete study again may have read of damage
    recent = failed_since(folder, failed_after) if failed_after < math.inf else set()
    return [c.cell_id for c in wanted if states.get(c.cell_id) != "ok" and c.cell_id not in recent]


def _share(cells: list[Cell], planned: PlannedStudy, ranks: Ranks) -> list[Cell]:
    if ranks.n == 1:
        return cells
    costs = study_costs(planned.study.config, planned.description, planned.matrices, planned.tasks)
    shards = split(cells, ranks.n, costs)
    return shards[ranks.rank] if ranks.rank < len(shards) else []


def measure_in_memory(
    cell: Cell, task: PreparedTask, scorer: Scorer, loaded: LoadedModel, config: Config, sampler: Sampler | None
) -> tuple[dict[str, ExampleScores] | Sampled | Exception, dict[str, Any]]:
    """`measure`, once more with a quarter of the batch where memory runs out; an Exception instead of scores where it
    fails. Second: the settings that differ from the study's, for the row."""
    used: dict[str, Any] = {}
    try:
        return measure(cell, task, scorer, loaded, cell.ablation.target.first_block, sampler), used
    except LostStep:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            return error, used
    # Out of the except clause: the traceback held the tensors of the failed pass.
    release_memory()
    try:
        if task.generate is not None:
            used["generation_batch_share"] = SMALLER
            return measure(cell, task, scorer, loaded, 0, sampler, SMALLER), used
        used["batch_tokens"] = max(1, int(config.runtime.batch_tokens * SMALLER))
        runtime = dataclasses.replace(config.runtime, batch_tokens=used["batch_tokens"], reuse=False)
        scored = {task.name: task} if sampler is None else sampler.groups([task.name])
        small = scorer.division.agree(
            "a smaller batch", lambda: scorer_of(loaded, scored, runtime, scorer.division)
        )
        return measure(cell, task, small, loaded, 0, sampler), used
    except LostStep:
        raise
    except Exception as error:
        return error, used


def run_cells(
    planned: PlannedStudy, loaded: LoadedModel, missing: list[Cell], progress: bool = True,
    division: Division | None = None,
) -> None:
    """Score the missing cells of a study on a loaded model and write a file of rows for each.

    division: the processes that were given the same cells and score each of them together; the first writes.
    Raises InputError when rows cannot be written, LostStep when a process of the division is gone.
    """
    from tqdm import tqdm

    config, tasks = planned.study.config, planned.tasks
    names = {cell.task for cell in missing}
    scored = {name: task for name, task in tasks.items() if name in names and task.generate is None}
    runtime = config.runtime
    sampler = Sampler(scored, runtime, config.seed) if runtime.precision == "adaptive" else None
    if sampler is not None:
        scored = sampler.groups(scored)
    division = division or Division()
    scorer = scorer_of(loaded, scored, runtime, division)
    decompositions = DecompositionCache(loaded, int(runtime.decomposition_gib * 2**30), disk_cache(runtime))
    writer = RowWriter(planned, loaded)

    def write(*outcome: Any) -> None:
        division.agree("writing", lambda: writer.write(*outcome) if division.rank == 0 else None)

    with tqdm(total=len(missing), unit="cell", disable=not progress, smoothing=0.1) as bar:
        bar.set_description("baseline")
        baselines: dict[str, Any] = {}
        by_task = {cell.task: cell for cell in planned.study.cells if cell.is_baseline}
        to_write = {cell.cell_id for cell in missing}
        for name in sorted(names):
            started, cell = time.perf_counter(), by_task[name]
            outcome, used = measure_in_memory(cell, tasks[name], scorer, loaded, config, sampler)
            if not isinstance(outcome, Exception):
                baselines[name] = outcome
            if cell.cell_id in to_write:
                write(cell, outcome, None, None, time.perf_counter() - started, used)
                bar.update()
        for ablation, cells in group_by_ablation([cell for cell in missing if not cell.is_baseline]):
            bar.set_description(f"{ablation.target.label}: {ablation.region.label}"[:48].ljust(48))
            try:
                scorer.advance(ablation.target.first_block)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                scorer = None  # and with it its stream; the numbers are the same without one
            if scorer is None:
                release_memory()
                scorer = scorer_of(loaded, scored, dataclasses.replace(runtime, reuse=False), division)
            _run_ablation(ablation, cells, planned, scorer, loaded, decompositions, baselines, write, bar, sampler)


def _run_ablation(ablation, cells, planned, scorer, loaded, decompositions, baselines, write, bar, sampler) -> None:
    pending, division, edit_mode = list(cells), scorer.division, planned.study.config.runtime.edit
    try:
        with ExitStack() as undo:
            realised = division.agree(
                "editing", lambda: undo.enter_context(ablated(loaded, ablation, decompositions, edit_mode))
            )
            while pending:
                cell, started, used = pending[0], time.perf_counter(), {}
                baseline = baselines.get(cell.task)
                if baseline is None:
                    outcome: Any = RuntimeError("the baseline of this task failed: there is nothing to compare with")
                else:
                    task = planned.tasks[cell.task]
                    outcome, used = measure_in_memory(cell, task, scorer, loaded, planned.study.config, sampler)
                write(cell, outcome, baseline, realised, time.perf_counter() - started, used)
                pending.pop(0)
                bar.update()
    except (InputError, LostStep):
        raise
    except Exception as error:
        # the edit itself failed (a decomposition, a region): its remaining cells are error rows, the run goes on
        if not pending:
            raise
        for cell in pending:
            write(cell, error, baselines.get(cell.task), None, 0.0)
            bar.update()
