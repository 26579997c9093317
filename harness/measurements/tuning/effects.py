"""What the removals do over seeds: before and after tuning, against nothing removed, and against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.evaluation.statistics import holm
from harness.tables.frames import groups_of

if TYPE_CHECKING:
    import pandas

BEFORE, AFTER, UNPRUNED = "prune_tune", "tune_prune", "tune"
ORDER = "before_minus_after"  # the difference of the two orders


@dataclass(frozen=True)
class Effect:
    """A mean over seeds of paired differences.

    n: the number of seeds. mean, low, high: the mean and its 95 % interval of Student's t over seeds; the ends are NaN
    for a single seed. p_value: two-sided, of a mean of zero.
    """

    n: int
    mean: float
    low: float
    high: float
    p_value: float


def effect_of(differences: Sequence[float]) -> Effect:
    """Return the mean of differences, one for each seed, with its interval and the p-value of the paired t-test."""
    import numpy as np
    from scipy.stats import t

    values = np.asarray(differences, dtype=float)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Effect(n, mean, math.nan, math.nan, math.nan)
    stderr = float(values.std(ddof=1) / math.sqrt(n))
    half = float(t.ppf(0.975, n - 1)) * stderr
    if stderr == 0:
        return Effect(n, mean, mean, mean, 1.0 if mean == 0 else 0.0)
    return Effect(n, mean, mean - half, mean + half, float(2 * t.sf(abs(mean / stderr), n - 1)))


def effects(results: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the effects of every removal, for every task and metric.

    results: the table of that name. A row has what is compared ("prune_tune" or "tune_prune" with nothing removed, or
    "before_minus_after", which compares the two), the mean value, and the Effect over the seeds that have both. The
    p-values are corrected by Holm for the regions and targets of the same task, metric and comparison.
    """
    rows: list[dict[str, Any]] = []
    for task, of_task in results.groupby("task", sort=False):
        for metric, of_metric in of_task.groupby("metric", sort=False):
            rows += _of_metric(str(task), str(metric), of_metric)
    return rows


def _of_metric(task: str, metric: str, results: pandas.DataFrame) -> list[dict[str, Any]]:
    unpruned = results[results["order"] == UNPRUNED].set_index("seed")["value"]
    edits = results[results["order"] != UNPRUNED][["target", "region"]].drop_duplicates()
    found: list[dict[str, Any]] = []
    for target, region in edits.itertuples(index=False):
        of_edit = results[(results["target"] == target) & (results["region"] == region)]
        by_order = {order: rows.set_index("seed")["value"] for order, rows in groups_of(of_edit, "order")}
        pairs = {order: (values, unpruned) for order, values in by_order.items()}
        if BEFORE in by_order and AFTER in by_order:
            pairs[ORDER] = by_order[BEFORE], by_order[AFTER]
        for compared, (values, others) in pairs.items():
            seeds = [seed for seed in values.index if seed in others.index]
            if seeds:
                effect = effect_of([values[seed] - others[seed] for seed in seeds])
                found.append({
                    "task": task, "metric": metric, "target": target, "region": region, "compared": compared,
                    "n_seeds": effect.n, "value": float(values[seeds].mean()), "against": float(others[seeds].mean()),
                    "effect": effect.mean, "low": effect.low, "high": effect.high, "p_value": effect.p_value,
                    "higher_is_better": bool(results["higher_is_better"].iloc[0]),
                })
    for compared in dict.fromkeys(row["compared"] for row in found):
        members = [row for row in found if row["compared"] == compared]
        for row, corrected in zip(members, holm([row["p_value"] for row in members])):
            row["p_holm"] = float(corrected)
    return found
