"""A summary of the table of metrics: its tasks and metrics, baselines, best and worst cells, and the order of labels.

All functions take the DataFrame that `read_metrics` returns, or a part of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.tables.frames import rows_of
from harness.tables.labels import model_name
from harness.tables.text import count, is_missing, layer_key

if TYPE_CHECKING:
    import pandas


def bos_note(task: str, protocol: Mapping[str, Any]) -> str | None:
    """Return a sentence if the windows of a text begin with BOS, which changes what a perplexity means; else None."""
    if not (protocol.get("window") and protocol.get("bos")):
        return None
    return f"every window begins with BOS, token {protocol['prefix_token']} (tasks.{task}.bos)"


@dataclass(frozen=True)
class MeasuredMetric:
    """One metric of one task. Rows with errors are left out.

    primary: whether it is the first metric of the task.
    baseline: the row of the unablated model, or None.
    control: the row of the control that decomposes every matrix and removes nothing, or None.
    other_order: the row of the unablated model with another order of additions, or None.
    cells: the rows of the ablations. Their column q_value holds the p-values adjusted for the false discovery rate
        among all these rows (Benjamini and Hochberg 1995), and NaN for a row without p-value.
    """

    task: str
    metric: str
    primary: bool
    higher_is_better: bool
    baseline: pandas.Series | None
    control: pandas.Series | None
    other_order: pandas.Series | None
    cells: pandas.DataFrame

    @cached_property
    def ranked(self) -> pandas.DataFrame:
        """The cells from the best to the worst delta, without those that remove nothing.

        If no cell has a delta, they are ordered by value.
        """
        cells = self.cells[self.cells["region_kind"] != "none"]
        by = "delta" if cells["delta"].notna().any() else "value"
        return cells.dropna(subset=[by]).sort_values(by, ascending=not self.higher_is_better, kind="stable")

    @property
    def title(self) -> str:
        """The names of the task and of the metric for titles. A task that is called `lm_eval` here has the name there.
        """
        protocol = None if self.baseline is None else self.baseline["protocol"]
        asked = json.loads(protocol).get("task") if self.task == "lm_eval" and isinstance(protocol, str) else None
        return f"{asked or self.task}: {self.metric}"

    @property
    def note(self) -> str | None:
        """What a reader must know of the primary metric's baseline, see `bos_note`."""
        if self.baseline is None or not self.primary or not isinstance(self.baseline["protocol"], str):
            return None
        return bos_note(self.task, json.loads(self.baseline["protocol"]))

    @cached_property
    def noise_floor(self) -> float | None:
        """The size of a delta that rounding alone explains; None if it was not measured, as in float32.

        It is |d| + t sqrt(2) s. Here d is the delta of the unablated model with another order of additions, s its
        standard error, and t the 97.5 % quantile of Student's t with the degrees of freedom of that error. Other
        roundings would give another delta, and the difference of the two has the standard error sqrt(2) s. So at least
        95 % of such deltas are smaller than the floor, also if they are not zero on average. Two clusters count as one
        degree of freedom. Without a standard error, which a single cluster lacks, the floor is |d|.
        """
        row = self.other_order
        if row is None or is_missing(row["delta"]) or not _in_other_order(row):
            return None
        delta, stderr = abs(float(row["delta"])), row["delta_stderr"]
        if is_missing(stderr) or stderr == 0:
            return delta
        from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, without its long import

        n = row["n"] if is_missing(row["n_clusters"]) else row["n_clusters"]
        known = row.get("delta_freedom")
        freedom = int(n) - 1.0 if known is None or is_missing(known) else float(known)
        return delta + float(stdtrit(freedom, 0.975)) * math.sqrt(2) * float(stderr)

    @property
    def floor_note(self) -> str | None:
        """What a reader must know of the noise floor; None in a study without one."""
        floor = self.noise_floor
        if self.other_order is None:
            return None
        if floor is None:
            return "noise floor unknown: there is no other order of additions"
        if floor == 0:
            return "noise floor 0: another order of additions changes nothing"
        return f"noise floor {floor:.2g}; smaller deltas are in parentheses"

    def is_noise(self, delta: float | None) -> bool:
        """Return whether a delta is below the noise floor."""
        floor = self.noise_floor
        return floor is not None and delta is not None and not is_missing(delta) and abs(delta) < floor


def _in_other_order(row: pandas.Series) -> bool:
    settings = row["settings"]
    return isinstance(settings, str) and bool(json.loads(settings).get("order_differs"))


def is_baseline(metrics: pandas.DataFrame) -> pandas.Series[bool]:
    """Return for each row whether it is of the unablated model."""
    return metrics["target_kind"] == "baseline"


def removes_nothing(metrics: pandas.DataFrame) -> pandas.Series[bool]:
    """Return for each row whether it is of a control that removes nothing."""
    return metrics["target_kind"] == "control"


def measured(metrics: pandas.DataFrame) -> list[MeasuredMetric]:
    """Return the metrics that have at least one row without error, ordered by task and with primary metrics first."""
    ok = metrics[metrics["status"] == "ok"]
    found: list[MeasuredMetric] = []
    for task, rows in ok.groupby("task", sort=True):
        # The rows of a cell are in the order in which the task gave its metrics, with the primary metric first.
        for metric, of_metric in rows.groupby("metric", sort=False):
            mask, control = is_baseline(of_metric), removes_nothing(of_metric)
            controls, others = of_metric[control], of_metric[control]["region_kind"] == "other_order"
            better = of_metric["higher_is_better"].dropna()
            found.append(
                MeasuredMetric(
                    task=str(task),
                    metric=str(metric),
                    primary=not any(m.task == task for m in found),
                    higher_is_better=bool(better.iloc[0]) if len(better) else True,
                    baseline=of_metric[mask].iloc[0] if mask.any() else None,
                    control=controls[~others].iloc[0] if (~others).any() else None,
                    other_order=controls[others].iloc[0] if others.any() else None,
                    cells=_with_q_value(of_metric[~mask & ~control]),
                )
            )
    return found


def _with_q_value(cells: pandas.DataFrame) -> pandas.DataFrame:
    import numpy as np

    q = cells["p_value"].astype(float)
    known = q.notna()
    if known.any():
        # as scipy.stats.false_discovery_control, whose import would take a third of a report's time
        p, n = q[known].to_numpy(), int(known.sum())
        order = np.argsort(p)
        adjusted = np.empty(n)
        adjusted[order] = np.minimum.accumulate((p[order] * (n / np.arange(1, n + 1)))[::-1])[::-1]
        q[known] = np.clip(adjusted, 0.0, 1.0)
    return cells.assign(q_value=q)


def target_order(rows: pandas.DataFrame) -> list[str]:
    """Return the labels of the targets ordered by block, then layer type, then label."""
    targets = rows.drop_duplicates("target")

    def key(row: Any) -> tuple[Any, ...]:
        no_block, no_type = is_missing(row.block), is_missing(row.layer_type)
        kind = layer_key("" if no_type else row.layer_type)
        return (no_block, 0 if no_block else row.block, no_type, kind, row.target)

    return [row.target for row in sorted(rows_of(targets[["target", "block", "layer_type"]]), key=key)]


def region_order(rows: pandas.DataFrame) -> list[str]:
    """Return the labels of the regions from the largest to the smallest singular values, with the controls last."""
    columns = ["region", "region_kind", "region_by", "fraction_start", "fraction_stop"]
    # The bounds of a region differ slightly between matrices of different shapes. Those of the first target are taken.
    regions = rows[columns].drop_duplicates("region")

    def key(row: Any) -> tuple[Any, ...]:
        control = 0 if row.region_by != "control" else 1 if row.region_kind == "none" else 2
        start = 0.0 if is_missing(row.fraction_start) else row.fraction_start
        stop = 1.0 if is_missing(row.fraction_stop) else row.fraction_stop
        return (control, "" if control == 0 else row.region_kind, start + stop, stop, _natural(row.region))

    return [row.region for row in sorted(rows_of(regions), key=key)]


def is_control(rows: pandas.DataFrame) -> set[str]:
    """Return the labels of the regions that are controls."""
    return set(rows.loc[rows["region_by"] == "control", "region"])


def ties(order: pandas.DataFrame, n: int) -> str:
    """Return what must be said if others are as good as the last of the first `n` rows of an order, else nothing.

    order: the rows as `MeasuredMetric.ranked` has them, or from their end.
    """
    by = "delta" if order["delta"].notna().any() else "value"
    values = order[by].astype(float).tolist()
    if not 0 < n < len(values):
        return ""
    more = sum(math.isclose(value, values[n - 1], rel_tol=1e-9, abs_tol=1e-15) for value in values[n:])
    return f" ({count(more, 'more ablation')} {'ties' if more == 1 else 'tie'} with the last of them)" if more else ""


def _natural(label: str) -> list:
    return [(0, float(p), "") if re.fullmatch(r"[\d.]*\d[\d.]*", p) and p.count(".") < 2 else (1, 0.0, p)
            for p in re.split(r"(\d+(?:\.\d+)?)", label) if p]  # fmt: skip


def by_target_and_region(cells: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows in the order of their targets, and then of their regions."""
    targets = {label: i for i, label in enumerate(target_order(cells))}
    regions = {label: i for i, label in enumerate(region_order(cells))}
    return cells.assign(_t=cells["target"].map(targets), _r=cells["region"].map(regions)).sort_values(["_t", "_r"])


def ranks_in_task(found: list[MeasuredMetric]) -> list[int]:
    """Return for each metric how many metrics of its task are before it."""
    seen: dict[str, int] = {}
    ranks = []
    for one in found:
        ranks.append(seen.get(one.task, 0))
        seen[one.task] = ranks[-1] + 1
    return ranks


def headline(metrics: pandas.DataFrame) -> str:
    """Return the first line of a report: the study, its models, and how many cells it has."""
    cells = metrics.drop_duplicates("cell_id")
    failed = metrics.loc[metrics["status"] == "error", "cell_id"].nunique()
    of_cells = cells[["model", "gguf_file"]].drop_duplicates()
    models = ", ".join(sorted({model_name(*one) for one in zip(of_cells["model"], of_cells["gguf_file"])}))
    baselines = int(is_baseline(cells).sum())
    return (
        f"Study {', '.join(sorted(cells['study_id'].unique()))} of {models}: "
        f"{count(len(cells) - baselines, 'ablation')}, {count(baselines, 'baseline')}, {failed} failed"
    )


def origin(metrics: pandas.DataFrame) -> str:
    """Return how and where the rows were measured, as one line."""
    names = {"dtype": "", "device": "", "edit": "edit ", "harness_version": "harness ", "git_commit": "commit ",
             "torch_version": "torch ", "transformers_version": "transformers ", "hostname": "on "}  # fmt: skip
    parts = []
    for column, prefix in names.items():
        values = sorted(metrics[column].dropna().unique())
        if values:
            parts.append(prefix + ", ".join(values[:4]) + (", ..." if len(values) > 4 else ""))
    return "; ".join(parts) + "." if parts else ""
