"""Several ablations at once, block after block, each kept only if it helps on examples that did not choose it.

LASER composes greedily from the last block to the first (arXiv 2312.13558, section 5.2); its published script accepts
every step, because it compares with the minimum of all accuracies so far. Here one half of the selection examples
chooses each block's candidate and the other half accepts it or not, and what is not accepted is undone bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from harness.evaluation.requests import ExampleScores, PreparedTask
from harness.evaluation.scoring import scorer_of
from harness.evaluation.statistics import estimate, paired
from harness.execution.ablating import ablated
from harness.execution.choosing import blank_measure
from harness.execution.decompositions import DecompositionCache, disk_cache
from harness.execution.planned import PlannedStudy
from harness.execution.study import Ablation
from harness.models.loading import load
from harness.tables.store import read_examples


def compose_greedily(selection: PlannedStudy, report: PlannedStudy, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """For every searched task and each of its metrics the steps, and last the composition on the report part.

    Rows: task, metric, step (the block, or "report"), target, region, accepted, and on the accepting half (of the
    report part: all its examples) baseline, value, delta against the unablated model, p_value.
    No target of the grid may span several blocks.
    """
    config = selection.study.config
    loaded = load(config.model, selection.description, selection.tokenizer)
    decompose = DecompositionCache(loaded, int(config.runtime.decomposition_gib * 2**30), disk_cache(config.runtime))
    rows = []
    for name, task in selection.tasks.items():
        scored = {part: planned.tasks[name] for part, planned in (("selection", selection), ("report", report))}
        whole = dataclasses.replace(config.runtime, reuse=False)
        scorers = {part: scorer_of(loaded, {name: of_part}, whole) for part, of_part in scored.items()}

        def scores(part: str, scored=scored, scorers=scorers, name=name) -> dict[str, ExampleScores]:
            return scored[part].measure(scorers[part].score(name))

        baselines = {part: scores(part) for part in scored}
        for metric in metrics:
            if metric not in baselines["selection"]:
                continue
            with ExitStack() as kept:
                rows += _steps(selection, task, metric, scores, baselines, kept, loaded, decompose)
    return rows


def _steps(selection, task: PreparedTask, metric: str, scores, baselines, kept: ExitStack, loaded, decompose):
    better = 1 if blank_measure(task)[metric].higher_is_better else -1
    accepting = np.arange(len(task.example_ids)) % 2 == 1
    candidates = best_of_each_block(selection, task, metric, ~accepting)
    baseline = _subset(baselines["selection"][metric], accepting)
    current, rows, n_kept = baseline, [], 0
    for block in sorted(candidates, reverse=True):
        ablation = candidates[block]
        undo = ablated(loaded, ablation, decompose, selection.study.config.runtime.edit)
        undo.__enter__()
        accepted = False
        try:
            now = _subset(scores("selection")[metric], accepting)
            accepted = better * paired(now, current).delta > 0
        finally:
            if not accepted:
                undo.__exit__(None, None, None)
        if accepted:
            kept.push(undo)
            current, n_kept = now, n_kept + 1
        rows.append(_row(task.name, metric, str(block), ablation, accepted, now, baseline))
    whole = scores("report")[metric]
    rows.append(_row(task.name, metric, "report", None, n_kept > 0, whole, baselines["report"][metric]))
    return rows


def best_of_each_block(
    selection: PlannedStudy, task: PreparedTask, metric: str, fitting: np.ndarray
) -> dict[int, Ablation]:
    """Block -> its ablation with the largest gain over the examples in `fitting` (bool [n]), where there is a gain."""
    examples = read_examples(selection.folder, task=task.name)
    of_cell = dict(list(examples[examples.metric == metric].groupby("cell_id")))
    blank = blank_measure(task)[metric]
    better = 1 if blank.higher_is_better else -1

    def over_fitting(cell_id: str) -> ExampleScores:
        rows = of_cell[cell_id]
        scores = ExampleScores(rows.score.to_numpy(float), rows.weight.to_numpy(float), blank.transform)
        return _subset(scores, fitting)

    cells = [cell for cell in selection.study.cells if cell.task == task.name and cell.cell_id in of_cell]
    baseline = next(over_fitting(cell.cell_id) for cell in cells if cell.is_baseline)
    best: dict[int, tuple[float, Ablation]] = {}
    for cell in cells:
        target = cell.ablation.target
        if target.kind in ("baseline", "control"):
            continue
        gain = better * paired(over_fitting(cell.cell_id), baseline).delta
        if gain > best.get(target.block, (0.0, None))[0]:
            best[target.block] = (gain, cell.ablation)
    return {block: ablation for block, (_, ablation) in best.items()}


def _subset(scores: ExampleScores, inside: np.ndarray) -> ExampleScores:
    return ExampleScores(scores.score[inside], scores.weight[inside], scores.transform, scores.higher_is_better)


def _row(
    task: str, metric: str, step: str, ablation: Ablation | None, accepted: bool, now: ExampleScores,
    baseline: ExampleScores,
) -> Mapping[str, Any]:
    delta = paired(now, baseline)
    return {
        "task": task, "metric": metric, "step": step,
        "target": ablation.target.label if ablation else "all accepted",
        "region": ablation.region.label if ablation else "", "accepted": accepted, "n": estimate(now).n,
        "baseline": estimate(baseline).value, "value": estimate(now).value, "delta": delta.delta,
        "p_value": delta.p_value,
    }
