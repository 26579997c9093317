"""What a table of metrics says: its tasks and metrics, baselines, order of targets and regions, best and worst cells.

All functions take the pandas.DataFrame of `read_metrics` or a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

# Execution order within a block; anything else follows by name.
LAYER_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTROLS = ("none", "random", "energy_matched", "lower_bulk")


@dataclass(frozen=True)
class Measured:
    """One metric of one task. cells: the ok rows of ablations, with a column q_value: their p-values adjusted for the
    false discovery rate among all of them (Benjamini and Hochberg 1995), NaN where there is none. baseline: the ok row
    of the unablated model, or None. control: the ok row of "decompose every matrix, remove nothing", or None."""

    task: str
    metric: str
    primary: bool
    higher_is_better: bool
    baseline: object  # pandas.Series | None
    control: object  # pandas.Series | None
    cells: object  # pandas.DataFrame


def is_baseline(metrics):
    return metrics["target_kind"] == "baseline"


def removes_nothing(metrics):
    return metrics["target_kind"] == "control"


def measured(metrics) -> list[Measured]:
    """Every task's metrics that have at least one ok row: tasks by name, each with its primary metric first."""
    ok = metrics[metrics["status"] == "ok"]
    found = []
    for task, rows in ok.groupby("task", sort=True):
        # Rows of a cell keep the order in which they were written, which is the order of importance.
        for metric, of_metric in rows.groupby("metric", sort=False):
            mask, control = is_baseline(of_metric), removes_nothing(of_metric)
            better = of_metric["higher_is_better"].dropna()
            found.append(
                Measured(
                    task=str(task),
                    metric=str(metric),
                    primary=not any(m.task == task for m in found),
                    higher_is_better=bool(better.iloc[0]) if len(better) else True,
                    baseline=of_metric[mask].iloc[0] if mask.any() else None,
                    control=of_metric[control].iloc[0] if control.any() else None,
                    cells=_with_q_value(of_metric[~mask & ~control]),
                )
            )
    return found


def _with_q_value(cells):
    p, q = cells["p_value"], cells["p_value"].astype(float)
    if p.notna().any():
        from scipy.stats import false_discovery_control

        q[p.notna()] = false_discovery_control(p[p.notna()].astype(float))
    return cells.assign(q_value=q)


def layer_key(layer_type: str) -> tuple[int, str]:
    return (LAYER_ORDER.index(layer_type) if layer_type in LAYER_ORDER else len(LAYER_ORDER), layer_type)


def target_order(rows) -> list[str]:
    """Target labels by block, then layer type, then label."""
    targets = rows.drop_duplicates("target")

    def key(row):
        no_block, no_type = _missing(row.block), _missing(row.layer_type)
        kind = layer_key("" if no_type else row.layer_type)
        return (no_block, 0 if no_block else row.block, no_type, kind, row.target)

    return [row.target for row in sorted(targets[["target", "block", "layer_type"]].itertuples(), key=key)]


def region_order(rows) -> list[str]:
    """Region labels along the spectrum, largest singular values first; the controls last."""
    columns = ["region", "region_kind", "region_by", "fraction_start", "fraction_stop"]
    # Boundaries in ranks differ a little between matrices of different shape; the first target stands for all.
    regions = rows[columns].drop_duplicates("region")

    def key(row):
        control = CONTROLS.index(row.region_kind) + 1 if row.region_kind in CONTROLS else 0
        start = 0.0 if _missing(row.fraction_start) else row.fraction_start
        stop = 1.0 if _missing(row.fraction_stop) else row.fraction_stop
        return (control, start + stop, stop, _natural(row.region))

    return [row.region for row in sorted(regions.itertuples(), key=key)]


def is_control(rows) -> set[str]:
    """Labels of the regions that are controls."""
    return set(rows.loc[rows["region_kind"].isin(CONTROLS), "region"])


def ranked(one: Measured):
    """Cells from the best delta to the worst (by value without deltas), but for the control that removes nothing."""
    cells = one.cells[one.cells["region_kind"] != "none"]
    by = "delta" if cells["delta"].notna().any() else "value"
    return cells.dropna(subset=[by]).sort_values(by, ascending=not one.higher_is_better, kind="stable")


def _missing(value) -> bool:
    return value is None or value != value


def _natural(label: str) -> list:
    import re

    return [(0, float(p), "") if re.fullmatch(r"[\d.]*\d[\d.]*", p) and p.count(".") < 2 else (1, 0.0, p)
            for p in re.split(r"(\d+(?:\.\d+)?)", label) if p]  # fmt: skip
