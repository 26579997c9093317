"""What an ablation costs for what it removes: the delta per removed norm and energy, and beside matched controls.

A region with little in it does little, so that two regions can only be compared per removed norm, or per removed energy
of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import paired
from harness.measurements.ablation.summary import MeasuredMetric, region_order
from harness.measurements.ablation.tables import read_examples
from harness.tables.frames import rows_of
from harness.tables.text import is_missing

if TYPE_CHECKING:
    import pandas

_BY_REGION = ("target_kind", "region", "region_kind", "region_by", "fraction_start", "fraction_stop", "delta",
              "delta_per_norm", "delta_per_output_energy")  # fmt: skip
MOST_OUTLIERS = 200  # cells of outliers whose examples are read for a report


def per_removed(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return rows of `metrics` with two more columns, which compare removals of unequal size.

    delta_per_norm: delta / norm_removed. delta_per_output_energy: delta / output_norm_removed^2, which is null where no
    calibration text was set. Both are null where nothing was removed.
    """
    norm = rows["norm_removed"].astype(float).where(lambda values: values > 0)
    energy = rows["output_norm_removed"].astype(float).pow(2).where(lambda values: values > 0)
    delta = rows["delta"].astype(float)
    return rows.assign(delta_per_norm=delta / norm, delta_per_output_energy=delta / energy)


def by_region(one: MeasuredMetric) -> list[dict[str, Any]]:
    """Return one row for each kind of target and region: the medians over the targets of the deltas per what went."""
    cells = per_removed(one.cells)
    # Every region takes its rows out of all, so that no other column is taken with them.
    cells = cells.loc[cells["norm_removed"].astype(float) > 0, list(_BY_REGION)]
    rows = []
    for kind, of_kind in cells.groupby("target_kind", sort=False):
        for region in region_order(of_kind):
            part = of_kind[of_kind["region"] == region]
            rows.append({
                "targets": f"{len(part)} {kind}", "region": region, "delta": _median(part["delta"].astype(float)),
                "delta / norm": _median(part["delta_per_norm"]),
                "delta / energy of outputs": _median(part["delta_per_output_energy"]),
            })
    return rows


def _median(values: pandas.Series) -> float | None:
    there = values.dropna()
    return float(there.median()) if len(there) else None


def outliers(one: MeasuredMetric, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return one row for each region of outliers by mp that has its control `lower_bulk`, target by target.

    The control removes as many of the smallest values that the null model explains. `difference` is the delta of the
    outliers less that of the control; its standard error and p-value are paired over the same examples. They are there
    if `folder` is given, that of the study, and it has the table of examples.
    """
    cells = per_removed(one.cells)
    controls = {(row.target, row.region): row for row in rows_of(cells[cells["region_kind"] == "lower_bulk"])}
    rows = []
    for row in rows_of(cells[cells["region_by"] == "mp"].head(MOST_OUTLIERS)):
        control = controls.get((row.target, f"lower_bulk ({row.region})"))
        if control is None or is_missing(row.delta) or is_missing(control.delta) or not row.n_removed:
            continue
        found = None if folder is None else _paired(folder, one.metric, row, control)
        rows.append({
            "target": row.target, "outliers": row.region, "n": int(row.n_removed), "delta": row.delta,
            "delta / norm": row.delta_per_norm, "n of bulk": int(control.n_removed), "delta of bulk": control.delta,
            "delta / norm of bulk": control.delta_per_norm, "difference": row.delta - control.delta,
            "stderr": None if found is None else found.stderr, "p": None if found is None else found.p_value,
        })
    return rows


def _paired(folder: Path, metric: str, row: Any, control: Any) -> Any:
    first, second = (_scores(folder, metric, cell) for cell in (row, control))
    if first is None or second is None or len(first.score) != len(second.score):
        return None
    return paired(first, second)


def _scores(folder: Path, metric: str, cell: Any) -> ExampleScores | None:
    rows = read_examples(folder, [cell.cell_id])
    rows = rows[rows["metric"] == metric]
    if rows.empty:
        return None
    score, weight = rows["score"].to_numpy(float), rows["weight"].to_numpy(float)
    ratio = score.sum() / weight.sum()
    transform = "identity" if math.isclose(ratio, cell.value, rel_tol=1e-9, abs_tol=1e-12) else "exp"
    clusters = None if rows["cluster"].isna().any() else rows["cluster"].to_numpy(dtype=np.int64)
    return ExampleScores(score, weight, transform, clusters=clusters)


def together_and_alone(one: MeasuredMetric) -> list[dict[str, Any]]:
    """Return one row for each layer type and region that was removed from all blocks at once and from each one alone.

    sum: of the deltas of the single matrices. ratio: the delta of all together over that sum, which is 1 if deltas add
    up. largest: the matrix with the largest delta of its own, in size.
    """
    rows = []
    for row in rows_of(one.cells[one.cells["target_kind"] == "type"]):
        alone = one.cells[
            (one.cells["target_kind"] == "matrix") & (one.cells["layer_type"] == row.layer_type)
            & (one.cells["region"] == row.region)
        ].dropna(subset=["delta"])
        if is_missing(row.n_matrices) or not 0 < row.n_matrices <= len(alone) or is_missing(row.delta):
            continue
        deltas = alone["delta"].astype(float)
        total, largest = float(deltas.sum()), alone.loc[deltas.abs().idxmax()]
        rows.append({
            "layer type": row.layer_type, "region": row.region, "all blocks": row.delta, "matrices": len(alone),
            "sum": total, "ratio": row.delta / total if total else None, "largest": largest["target"],
            "its delta": float(largest["delta"]),
        })
    return rows


def tables(one: MeasuredMetric, folder: Path | None = None) -> list[tuple[str, Sequence[dict[str, Any]]]]:
    """Return the tables of a report about one metric, each with a sentence that introduces it; none without deltas.

    folder: that of the study, from which the examples of some cells are read.
    """
    if not len(one.cells) or one.cells["delta"].isna().all():
        return []
    found: list[tuple[str, Sequence[dict[str, Any]]]] = [
        ("Delta per removed norm and per removed energy of the outputs, as medians over the targets:", by_region(one)),
        ("Outliers against as many values from the lower end of the bulk of the same matrix:", outliers(one, folder)),
        ("A layer type in all blocks at once against its matrices one by one:", together_and_alone(one)),
    ]
    return [(title, rows) for title, rows in found if rows]
