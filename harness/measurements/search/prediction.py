"""The prediction of ablations by gradients: which cells of a grid to measure, and how good the prediction was.

A first-order prediction is good for mild removals and fails for those that destroy a matrix. So it ranks the targets
for the mildest region of the grid, and every region of the best targets is measured. (Compress to Impress, arXiv
2510.20800, ranks matrices by gradients and searches their ranks.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.blank_scores import blank_measure
from harness.evaluation.gradients import SingularGradients, each_gradient
from harness.evaluation.requests import PreparedTask
from harness.measurements.ablation.sources import sources_of
from harness.measurements.ablation.study import Study
from harness.measurements.search.verdict import grid_rows
from harness.models.editing import Ablation, resolved_regions
from harness.models.loading import LoadedModel, load
from harness.models.matrices import Matrix
from harness.models.treatment import Decompose, spectrum_of
from harness.spectral.decomposition import Decomposition

if TYPE_CHECKING:
    import pandas

SHORT_LISTS = (0.05, 0.1, 0.2)


def predict(grid: Study, examples: Study, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows of the table `predictions`: the first-order change of each metric by each ablation of the grid.

    grid: the study whose ablations are predicted. examples: the study whose tasks have the examples of the gradients.
    Metrics without a derivative have no rows. Raises InputError if a task has no metric with a derivative.
    """
    runtime = grid.settings.runtime
    loaded = load(grid.settings.model, grid.description, grid.prepared.tokenizer, progress=False)
    ablations = grid_ablations(grid)
    touched = {name for ablation in ablations for name in ablation.target.matrices}
    matrices = [matrix for matrix in loaded.matrices if matrix.name in touched]
    by_name = {matrix.name: matrix for matrix in matrices}
    sources = sources_of(loaded, runtime, grid.prepared.calibration)
    sources.expect(touched)
    sources.prepare(matrices)
    treatment = ablations[0].treatment  # a study has one for all its regions

    def decompose(matrix: Matrix) -> Decomposition:
        return spectrum_of(matrix, ablations[0].region, treatment, sources)

    rows = []
    for name, task in examples.tasks.items():
        for metric, found in _smooth(loaded, task, metrics, matrices, decompose).items():
            better = 1 if blank_measure(task)[metric].higher_is_better else -1
            for ablation in ablations:
                names = ablation.target.matrices
                own = resolved_regions(ablation, [by_name[m] for m in names], sources)
                removed = {m: ablation.positions(decompose(by_name[m]), own.get(m)) for m in names}
                whole = math.fsum(found.predicted_delta(m, indices) for m, indices in removed.items())
                delta = whole if treatment.scale == 0 else (1 - treatment.scale) * whole
                rows.append({
                    "task": name, "metric": metric, "target": ablation.target.label, "region": ablation.label,
                    "n_removed": sum(map(len, removed.values())), "n_examples": len(task.example_ids),
                    "predicted_delta": delta,
                    "predicted_improvement": better * delta,
                })
    return rows


def grid_ablations(grid: Study) -> list[Ablation]:
    """Return the ablations of a grid without the baseline and the control that removes nothing."""
    return list(dict.fromkeys(cell.ablation for cell in grid.units if cell.of_grid))


def _smooth(
    loaded: LoadedModel, task: PreparedTask, metrics: Sequence[str], matrices: Sequence[Matrix], decompose: Decompose
) -> dict[str, SingularGradients]:
    """Return the gradients of those of `metrics` that the task has and that have a derivative."""
    found: dict[str, SingularGradients] = {}
    refused = []
    try:
        for metric, one in each_gradient(loaded, task, metrics, matrices, decompose):
            if isinstance(one, InputError):
                refused.append(str(one))
            else:
                found[metric] = one
    except InputError as error:
        refused.append(str(error))
    if not found:
        raise InputError(f"search.choice: gradients say nothing about task {task.name}: {'; '.join(refused)}")
    return found


def ranked_targets(predictions: pandas.DataFrame) -> list[str]:
    """Return the labels of the targets, ordered by the predicted improvement for their mildest region, best first.

    predictions: the rows of one task and metric. The mildest region of a target removes the fewest values.
    """
    mildest = predictions.loc[predictions.groupby("target", sort=False).n_removed.idxmin()]
    return list(mildest.sort_values("predicted_improvement", ascending=False, kind="stable").target)


def chosen_by_gradient(
    grid: Study, predictions: Sequence[Mapping[str, Any]], keep: float
) -> list[tuple[Ablation, str]]:
    """Return the (ablation, task) to measure: every region of the best targets, for each task and predicted metric.

    keep: the share of the targets that counts as the best. Of single components it is the share of the components.
    """
    import pandas

    pairs: dict[tuple[Ablation, str], None] = {}
    ablations = grid_ablations(grid)
    for (task, _), guess in pandas.DataFrame(list(predictions)).groupby(["task", "metric"], sort=False):
        if grid.settings.region.by == "component":
            best = guess.sort_values("predicted_improvement", ascending=False, kind="stable")
            kept = {(row.target, row.region) for row in best.head(max(1, math.ceil(keep * len(best)))).itertuples()}
            chosen = [one for one in ablations if (one.target.label, one.label) in kept]
        else:
            ranked = ranked_targets(guess)
            labels = set(ranked[: max(1, math.ceil(keep * len(ranked)))])
            chosen = [one for one in ablations if one.target.label in labels]
        pairs |= {(ablation, str(task)): None for ablation in chosen}
    return list(pairs)


def compare_with_grid(
    grid: Study, predictions: Sequence[Mapping[str, Any]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of the table `comparison`: how well the predictions rank the measured cells.

    There are rows for all cells, for the cells of each region, and for the targets. A row has Spearman's correlation,
    and the regret of measuring only the share that is predicted best: how much smaller its best improvement is than the
    best of all. Targets are ranked by `ranked_targets` and compared by their best measured improvement.
    """
    import pandas

    measured = grid_rows(grid.folder, grid.units)
    table = []
    for (task, metric), guess in pandas.DataFrame(list(predictions)).groupby(["task", "metric"], sort=False):
        ranked, guess = ranked_targets(guess), guess[["target", "region", "predicted_improvement"]]
        for name in metrics:
            found = measured[(measured.task == task) & (measured.metric == name)]
            both = found.merge(guess, on=["target", "region"])
            if both.empty:
                continue
            common = {"task": task, "predicted": metric, "measured": name}
            regions = dict.fromkeys(guess.region)
            groups = [("all", both), *((region, both[both.region == region]) for region in regions)]
            for label, part in groups:
                table.append({**common, "cells": label, **_ranking(part.predicted_improvement, part.improvement)})
            best = both.groupby("target").improvement.max().reindex(ranked)
            table.append({**common, "cells": "targets", **_ranking(-np.arange(len(best)), best)})
    return table


def _ranking(predicted: Any, measured: Any) -> dict[str, Any]:
    """Return n, Spearman's correlation (NaN if one side is constant), the best measured value, and the regrets."""
    from scipy.stats import spearmanr

    predicted, measured = np.asarray(predicted, dtype=float), np.asarray(measured, dtype=float)
    constant = len(measured) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0
    ranked = measured[np.argsort(-predicted, kind="stable")]
    row = {
        "n": len(measured), "spearman": math.nan if constant else float(spearmanr(predicted, measured).statistic),
        "best_improvement": float(measured.max()),
    }
    for share in SHORT_LISTS:
        count = max(1, math.ceil(share * len(ranked)))
        row[f"regret_{share:g}"] = float(measured.max() - ranked[:count].max())
    return row
