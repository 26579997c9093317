"""The greedy composition of ablations, which adds one in each block if it helps on examples that did not choose it.

LASER composes greedily from the last block to the first (arXiv 2312.13558). Its published script accepts every step,
because it compares the accuracy with the minimum of all accuracies so far. Here one half of the selection examples
chooses the candidate of each block, the other half accepts it or not, and a candidate that is not accepted is undone
bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.requests import ExampleScores, ScoredTask, scored_tasks
from harness.evaluation.scoring import Scorer
from harness.evaluation.statistics import estimate, paired
from harness.measurements.ablation.sources import sources_of
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.tables import read_examples
from harness.measurements.search.units import REPORT, SELECTION
from harness.models.editing import Ablation, ablated, resolved_regions
from harness.models.loading import LoadedModel, load
from harness.models.targets import named_target
from harness.models.treatment import Sources, Treatment, spectrum_of
from harness.spectral.regions import Named

MOST_CANDIDATES = 32  # components that are tried one after the other


def compose_greedily(selection: Study, report: Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the table `composition`, for every searched task and each of the `metrics` that it has.

    selection, report: the studies of the two parts. No target of the first may span several blocks.
    The last row of a metric is the whole composition on the report part.
    """
    runtime = selection.settings.runtime
    loaded = load(selection.settings.model, selection.description, selection.prepared.tokenizer, progress=False)
    sources = sources_of(loaded, runtime, selection.prepared.calibration)
    edited = {name for cell in selection.units for name in cell.ablation.target.matrices}
    sources.expect(edited)
    sources.prepare([matrix for matrix in loaded.matrices if matrix.name in edited])  # before any edit stays applied
    rows: list[dict[str, Any]] = []
    for name, task in scored_tasks(selection.tasks).items():
        parts = {SELECTION: task, REPORT: scored_tasks(report.tasks)[name]}
        composition = TaskComposition(selection, parts, loaded, sources)
        for metric in metrics:
            if metric in composition.baselines[SELECTION]:
                rows += composition.steps(metric)
    return rows


class TaskComposition:
    """The compositions of one task, each for one of its metrics.

    selection: the study of the grid. parts: the task on the selection part and on the report part.
    """

    def __init__(
        self, selection: Study, parts: Mapping[str, ScoredTask], loaded: LoadedModel, sources: Sources
    ) -> None:
        self.selection, self.parts, self.loaded, self.sources = selection, parts, loaded, sources
        # Edits of several blocks stay applied, so a pass may not resume from a stream of the unedited model.
        options = dataclasses.replace(selection.settings.runtime.scoring(), reuse=False)
        self.scorers = {part: Scorer(loaded, {task.name: task}, options) for part, task in parts.items()}
        self.baselines = {part: self.scores(part) for part in parts}

    def scores(self, part: str) -> dict[str, ExampleScores]:
        """Return the scores of every example of a part under the model's present weights, by metric."""
        task = self.parts[part]
        return task.measure(self.scorers[part].score(task.name))

    def steps(self, metric: str) -> list[dict[str, Any]]:
        """Compose for one metric and return the rows of all steps. Afterwards the model is as before."""
        if self.selection.settings.region.by == "component":
            return self._of_components(metric)
        task = self.parts[SELECTION]
        better = 1 if blank_measure(task)[metric].higher_is_better else -1
        accepting = np.arange(len(task.example_ids)) % 2 == 1
        candidates = best_of_each_block(self.selection, task, metric, ~accepting)
        baseline = _subset(self.baselines[SELECTION][metric], accepting)
        common = {"task": task.name, "metric": metric}
        current, rows, n_kept = baseline, [], 0
        with ExitStack() as kept:
            for block in sorted(candidates, reverse=True):
                candidate = candidates[block]
                undo = ablated(self.loaded, candidate, self.sources, self.selection.settings.runtime.edit)
                undo.__enter__()
                accepted = False
                try:
                    now = _subset(self.scores(SELECTION)[metric], accepting)
                    accepted = better * paired(now, current).delta > 0
                finally:
                    if not accepted:
                        undo.__exit__(None, None, None)
                if accepted:
                    kept.push(undo)
                    current, n_kept = now, n_kept + 1
                rows.append({
                    **common, "step": str(block), "target": candidate.target.label, "region": candidate.label,
                    "accepted": accepted, **_compared(now, baseline),
                })
            whole = _compared(self.scores(REPORT)[metric], self.baselines[REPORT][metric])
        rows.append({
            **common, "step": "report", "target": "all accepted", "region": "", "accepted": n_kept > 0, **whole,
        })  # fmt: skip
        return rows


    def _of_components(self, metric: str) -> list[dict[str, Any]]:
        """Compose single components, the best first, several of which may be of one matrix."""
        task = self.parts[SELECTION]
        better = 1 if blank_measure(task)[metric].higher_is_better else -1
        accepting = np.arange(len(task.example_ids)) % 2 == 1
        baseline = _subset(self.baselines[SELECTION][metric], accepting)
        common = {"task": task.name, "metric": metric}
        kept: list[str] = []
        current, rows = baseline, []
        gains = [(gain, ablation) for gain, ablation in gains_of_cells(self.selection, task, metric, ~accepting)
                 if gain > 0 and ablation.region.by == "component"]
        candidates = sorted(gains, key=lambda one: -one[0])[:MOST_CANDIDATES]
        for number, (_, candidate) in enumerate(candidates):
            name = self._name(candidate)
            now = _subset(self._without([*kept, name], candidate.treatment, SELECTION)[metric], accepting)
            accepted = better * paired(now, current).delta > 0
            if accepted:
                kept, current = [*kept, name], now
            rows.append({
                **common, "step": str(number), "target": candidate.target.label, "region": candidate.label,
                "accepted": accepted, **_compared(now, baseline),
            })
        whole = self.baselines[REPORT]
        if kept:
            whole = self._without(kept, candidates[0][1].treatment, REPORT)
        rows.append({
            **common, "step": "report", "target": "all accepted", "region": ",".join(kept), "accepted": bool(kept),
            **_compared(whole[metric], self.baselines[REPORT][metric]),
        })  # fmt: skip
        return rows

    def _name(self, candidate: Ablation) -> str:
        (matrix,) = (one for one in self.loaded.matrices if one.name in candidate.target.matrices)
        decomposition = spectrum_of(matrix, candidate.region, candidate.treatment, self.sources)
        region = resolved_regions(candidate, [matrix], self.sources).get(matrix.name)
        return f"{matrix.name}:{int(candidate.positions(decomposition, region)[0])}"

    def _without(self, names: Sequence[str], treatment: Treatment, part: str) -> dict[str, ExampleScores]:
        """Return the scores of a part without these components together."""
        whole = Ablation(named_target(names, self.loaded.matrices), Named(tuple(names)), treatment)
        with ablated(self.loaded, whole, self.sources, self.selection.settings.runtime.edit):
            return self.scores(part)


def best_of_each_block(
    selection: Study, task: ScoredTask, metric: str, fitting: np.ndarray
) -> dict[int, Ablation]:
    """Return for each block the ablation with the largest gain, if one has a gain.

    fitting: bool [n], the examples over which the gain is taken.
    """
    best: dict[int, tuple[float, Ablation]] = {}
    for gain, ablation in gains_of_cells(selection, task, metric, fitting):
        block = ablation.target.block
        if block is not None and gain > (best[block][0] if block in best else 0.0):
            best[block] = (gain, ablation)
    return {block: ablation for block, (_, ablation) in best.items()}


def gains_of_cells(
    selection: Study, task: ScoredTask, metric: str, fitting: np.ndarray
) -> list[tuple[float, Ablation]]:
    """Return the measured ablations of the grid, without controls of no target, each with its gain.

    fitting: bool [n], the examples over which the gain is taken.
    """
    examples = read_examples(selection.folder, task=task.name)
    of_cell = dict(list(examples[examples.metric == metric].groupby("cell_id")))
    blank = blank_measure(task)[metric]
    better = 1 if blank.higher_is_better else -1

    def over_fitting(cell_id: str) -> ExampleScores:
        rows = of_cell[cell_id]
        scores = ExampleScores(rows.score.to_numpy(float), rows.weight.to_numpy(float), blank.transform)
        return _subset(scores, fitting)

    cells = [cell for cell in selection.units if cell.task == task.name and cell.id in of_cell]
    baseline = next(over_fitting(cell.id) for cell in cells if cell.is_baseline)
    return [(better * paired(over_fitting(cell.id), baseline).delta, cell.ablation) for cell in cells if cell.of_grid]


def _subset(scores: ExampleScores, inside: np.ndarray) -> ExampleScores:
    return scores.at(inside)


def _compared(now: ExampleScores, baseline: ExampleScores) -> dict[str, Any]:
    """Return the columns that compare the model's present scores with those of the unedited model."""
    delta = paired(now, baseline)
    return {
        "n": estimate(now).n, "baseline": estimate(baseline).value, "value": estimate(now).value,
        "delta": delta.delta, "p_value": delta.p_value,
    }  # fmt: skip
