"""The verdict of a search: the best cell of each metric, and its effect on examples that did not choose it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import holm, over_new_draw, paired_interval
from harness.measurements.ablation.cells import Cell
from harness.measurements.ablation.summary import measured
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.models.editing import Ablation
from harness.spectral.regions import EnergyMatched, Random, Rotated
from harness.tables.frames import dicts_of

if TYPE_CHECKING:
    import pandas

LEVEL = 0.05


@dataclass(frozen=True)
class Winner:
    """The best cell of one metric on the selection part.

    n_tried: the number of cells among which it is the best. p_holm: the p-value of its delta, corrected for n_tried
    (Holm). row: its row in the table of metrics.
    """

    task: str
    metric: str
    ablation: Ablation
    n_tried: int
    p_holm: float
    row: Mapping[str, Any]


def grid_rows(folder: Path, cells: Sequence[Cell]) -> pandas.DataFrame:
    """Return the metrics of the measured cells of the grid, without baseline and control that removes nothing.

    The additional column `improvement` is the delta with the sign by which positive is better.
    """
    of_grid = {cell.id for cell in cells if cell.of_grid}
    rows = read_metrics(folder, cell_ids=of_grid)
    rows = rows[rows.status == "ok"].copy()
    rows["improvement"] = np.where(rows.higher_is_better.astype(bool), rows.delta, -rows.delta)
    return rows


def winners(folder: Path, cells: Sequence[Cell], metrics: Sequence[str]) -> list[Winner]:
    """Return the best cell of every task for each of the `metrics` that it has.

    If several cells are equally good, the other metrics decide in their order (as LASER chooses the smaller loss among
    equal accuracies), and then the smaller removed energy. Raises InputError if no cell of a task was measured.
    """
    rows = grid_rows(folder, cells)
    ablation_of = {cell.id: cell.ablation for cell in cells}
    found = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = rows[(rows.task == task) & rows.improvement.notna()]
        if of_task.empty:
            raise InputError(f"tasks.{task}: no cell of the grid could be measured; harness status {folder} --failed")
        # A cell without a value of some metric is worse in it than any other.
        improvement = of_task.pivot(index="cell_id", columns="metric", values="improvement").fillna(-math.inf)
        names = [metric for metric in metrics if metric in improvement]
        energy = of_task.drop_duplicates("cell_id").set_index("cell_id").energy_removed
        for metric in names:
            tried = of_task[of_task.metric == metric]
            order = [metric, *(other for other in names if other != metric)]
            best = max(
                tried.cell_id, key=lambda c: (*(improvement.at[c, name] for name in order), -energy[c])
            )
            p = holm(tried.p_value.to_numpy(dtype=float))
            row = tried[tried.cell_id == best].iloc[0]
            found.append(Winner(
                task, metric, ablation_of[best], len(tried), float(p[(tried.cell_id == best).to_numpy()][0]),
                row.to_dict(),
            ))
    return found


def example_scores(folder: Path, cell_id: str, metric: str, transform: str) -> ExampleScores:
    """Return the scores of one metric of one cell from the table of examples, in the order of the task."""
    rows = read_examples(folder, cell_ids=[cell_id])
    rows = rows[rows.metric == metric]
    clusters = None if rows.cluster.isna().any() else rows.cluster.to_numpy(dtype=np.int64)
    score, weight = rows.score.to_numpy(dtype=float), rows.weight.to_numpy(dtype=float)
    return ExampleScores(score, weight, transform, clusters=clusters)


def controls_of(winner: Winner, seeds: Sequence[int]) -> dict[str, list[Ablation]]:
    """Return the controls of a best cell: name of the control -> its draws, one for each seed.

    Besides those that draw from all values there are those that do not draw what the cell itself removes. They are left
    out if the other values are fewer, or hold less energy, than what the cell removes. A single component also has
    random directions of the same singular value, unless the metric is that of the activations.
    """
    region = winner.ablation.region
    fewer = 2 * winner.row["n_removed"] <= winner.row["n_values"]
    lighter = winner.row["energy_removed"] <= 0.5
    made: dict[str, list[Any]] = {"random": [Random(region, seed) for seed in seeds]}
    if fewer:
        made["random_disjoint"] = [Random(region, seed, disjoint=True) for seed in seeds]
    made["energy_matched"] = [EnergyMatched(region, seed) for seed in seeds]
    if lighter:
        made["energy_matched_disjoint"] = [EnergyMatched(region, seed, disjoint=True) for seed in seeds]
    if winner.ablation.region.by == "component" and winner.ablation.treatment.metric == "weight":
        made["rotated"] = [Rotated(region, seed) for seed in seeds]
    return {name: [dataclasses.replace(winner.ablation, region=control) for control in controls]
            for name, controls in made.items()}


def verdict_rows(
    folder: Path, found: Sequence[Winner], cell_of: Mapping[tuple[Ablation, str], Cell],
    controls_of: Mapping[Ablation, Mapping[str, Sequence[Ablation]]], transforms: Mapping[tuple[str, str], str],
) -> list[dict[str, Any]]:
    """Return the rows of the table `verdict`, one for each winner.

    folder: that of the report study. cell_of: (ablation, task) -> its cell. controls_of: best ablation -> name of a
    control -> its draws. transforms: (task, metric) -> the transform of its ExampleScores.

    The best cell is compared with a new draw of each control (`over_new_draw`). `judge` adds the verdict.
    """
    rows = read_metrics(folder)
    rows = rows[rows.status == "ok"]
    by_cell = {key: row for key, row in zip(zip(rows.cell_id, rows.metric), dicts_of(rows))}
    metrics = {(one.task, one.metric): one for one in measured(rows)}
    baseline_of = {cell.task: cell for cell in cell_of.values() if cell.is_baseline}
    with_floor = {cell.task for cell in cell_of.values() if cell.in_other_order}
    table = []
    for winner in found:
        report = by_cell.get((cell_of[winner.ablation, winner.task].id, winner.metric))
        if report is None or math.isnan(report["delta"]):
            table.append(_failed(winner))
            continue
        of_metric = metrics[winner.task, winner.metric]
        if winner.task in with_floor and of_metric.other_order is None:
            table.append(_failed(winner))
            continue
        sign = 1 if report["higher_is_better"] else -1
        row: dict[str, Any] = {
            **_selected(winner),
            "n": report["n"], "baseline": report["baseline"], "value": report["value"], "delta": report["delta"],
            "p_value": report["p_value"],
            "noise_floor": of_metric.noise_floor,
        }
        transform = transforms[winner.task, winner.metric]
        best = example_scores(folder, cell_of[winner.ablation, winner.task].id, winner.metric, transform)
        unedited = example_scores(folder, baseline_of[winner.task].id, winner.metric, transform)
        row["delta_low"], row["delta_high"] = paired_interval(best, unedited, 0.95)
        beaten: list[bool | None] = []
        for name, draws in controls_of[winner.ablation].items():
            ids = [cell_of[draw, winner.task].id for draw in draws]
            drawn = [example_scores(folder, cell_id, winner.metric, transform)
                     for cell_id in ids if (cell_id, winner.metric) in by_cell]
            row[f"{name}_draws"] = len(drawn)
            if len(drawn) < 2:
                beaten.append(None)
                continue
            over = over_new_draw(best, drawn)
            row |= {f"{name}_delta": report["delta"] - over.delta, f"{name}_spread": over.spread,
                    f"over_{name}": over.delta, f"over_{name}_p": over.p_value}
            beaten.append(sign * over.delta > 0 and over.p_value is not None and over.p_value < LEVEL)
        row["beats_controls"] = None if None in beaten else all(beaten)
        table.append(row)
    judge(table)
    return table


def judge(table: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm` and `verdict` to the rows of the table `verdict`, which must be all rows of a search.

    The verdict is "no" if the best cell does not improve the metric on the report part at 5 % (corrected for the number
    of rows by Holm), "below the noise floor" if rounding alone explains as large a delta, "yes" if it is also better
    than each control at 5 %, and otherwise "no more than its controls". It is "failed" if the cell or the measurement
    of its noise floor failed, if fewer than two draws of a control were measured, or if the examples are in fewer than
    three clusters, which have no p-value.
    """
    for row, p in zip(table, holm([row["p_value"] for row in table])):
        row["p_holm"] = float(p)
        row["verdict"] = _verdict(row)


def _verdict(row: Mapping[str, Any]) -> str:
    if math.isnan(row["p_holm"]) or row["beats_controls"] is None:
        return "failed"
    better = row["delta"] > 0 if row["higher_is_better"] else row["delta"] < 0
    if not (better and row["p_holm"] < LEVEL):
        return "no"
    if row.get("noise_floor") is not None and abs(row["delta"]) < row["noise_floor"]:
        return "below the noise floor"
    return "yes" if row["beats_controls"] else "no more than its controls"


def beside_rows(
    folder: Path, found: Sequence[Winner], cell_of: Mapping[tuple[Ablation, str], Cell], beside: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of the table `beside`, one for each winner and each task of `beside`, for its first metric.

    folder, cell_of: as in `verdict_rows`.
    """
    rows = read_metrics(folder)
    rows = rows[rows.status == "ok"]
    metrics = {(one.task, one.metric): one for one in measured(rows)}
    table = []
    for winner in found:
        for task in beside:
            of_cell = rows[rows.cell_id == cell_of[winner.ablation, task].id]
            if not of_cell.empty:
                price = of_cell.iloc[0]
                table.append({
                    "task": winner.task, "metric": winner.metric, "beside_task": task, "beside_metric": price.metric,
                    "baseline": price.baseline, "value": price.value, "delta": price.delta, "p_value": price.p_value,
                    "noise_floor": metrics[task, price.metric].noise_floor,
                })
    return table


def _selected(winner: Winner) -> dict[str, Any]:
    """Return the columns of `verdict` that come from the selection part."""
    return {
        "task": winner.task, "metric": winner.metric, "higher_is_better": bool(winner.row["higher_is_better"]),
        "target": winner.ablation.target.label, "region": winner.ablation.label,
        "energy_removed": winner.row["energy_removed"], "n_tried": winner.n_tried,
        "selection_n": winner.row["n"], "selection_baseline": winner.row["baseline"],
        "selection_value": winner.row["value"], "selection_delta": winner.row["delta"],
        "selection_p": winner.row["p_value"], "selection_p_holm": winner.p_holm,
    }


def _failed(winner: Winner) -> dict[str, Any]:
    return {**_selected(winner), "p_value": math.nan, "beats_controls": None}
