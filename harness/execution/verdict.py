"""From the tables of a search to its verdict: the best cell of each metric, and what is left of it on new examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import holm, paired
from harness.execution.study import Ablation, Cell
from harness.tables.store import read_examples, read_metrics

LEVEL = 0.05


@dataclass(frozen=True)
class Winner:
    """The best cell of one metric on the selection part. improvement: its delta, positive when better.
    p_holm: of that delta among all `n_tried` (Holm)."""

    task: str
    metric: str
    ablation: Ablation
    n_tried: int
    improvement: float
    p_holm: float
    row: Mapping[str, Any]


def grid_rows(folder: Path, cells: Sequence[Cell]):
    """The rows of the grid's cells (no baseline, no control) that were measured, with `improvement`, as a DataFrame."""
    of_grid = {cell.cell_id for cell in cells if cell.ablation.target.kind not in ("baseline", "control")}
    rows = read_metrics(folder, cell_ids=of_grid)
    rows = rows[rows.status == "ok"].copy()
    rows["improvement"] = np.where(rows.higher_is_better.astype(bool), rows.delta, -rows.delta)
    return rows


def winners(folder: Path, cells: Sequence[Cell], metrics: Sequence[str]) -> list[Winner]:
    """Of every task and each of its `metrics` the best cell: ties fall to the other metrics in their order (LASER: of
    equal accuracies the smaller loss), then to the cell that removes the least energy.

    Raises InputError where no cell of a task was measured.
    """
    rows = grid_rows(folder, cells)
    ablation_of = {cell.cell_id: cell.ablation for cell in cells}
    found = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = rows[(rows.task == task) & rows.improvement.notna()]
        if of_task.empty:
            raise InputError(f"tasks.{task}: no cell of the grid could be measured; harness status {folder} --failed")
        # worse than any where a cell lacks a metric
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
                task, metric, ablation_of[best], len(tried), float(row.improvement),
                float(p[(tried.cell_id == best).to_numpy()][0]), row.to_dict(),
            ))
    return found


def example_scores(folder: Path, cell_id: str, metric: str, transform: str) -> ExampleScores:
    """One metric of one cell, example by example, from the examples table; in the order of the task."""
    rows = read_examples(folder, cell_ids=[cell_id])
    rows = rows[rows.metric == metric]
    return ExampleScores(rows.score.to_numpy(dtype=float), rows.weight.to_numpy(dtype=float), transform)


def _mean_of_draws(draws: Sequence[ExampleScores], best: ExampleScores) -> ExampleScores:
    """Of the draws of a control the mean, example by example."""
    return ExampleScores(np.mean([scores.score for scores in draws], axis=0), best.weight, best.transform)


def verdict_rows(
    folder: Path, found: Sequence[Winner], cell_of: Mapping[tuple[Ablation, str], Cell],
    controls_of: Mapping[Ablation, Mapping[str, Sequence[Ablation]]], transforms: Mapping[tuple[str, str], str],
    beside: Sequence[str],
) -> list[dict[str, Any]]:
    """One row per winner, from the report study in `folder`.

    cell_of: (ablation, task) -> its cell. controls_of: best ablation -> name of the control -> its draws. transforms:
    (task, metric) -> of its ExampleScores. beside: tasks measured with
    every best cell, by their first metric. Of a control the mean over its draws that could be measured (<name>_draws)
    counts, example by example. verdict: "yes" when the change on the report part is for the better at 5 % (Holm
    over the rows) and better than each control at 5 %; "failed" where the cell or every draw of a control failed.
    """
    rows = read_metrics(folder)
    rows = rows[rows.status == "ok"]
    by_cell = {key: row for key, row in zip(zip(rows.cell_id, rows.metric), rows.to_dict("records"))}
    table = []
    for winner in found:
        report = by_cell.get((cell_of[winner.ablation, winner.task].cell_id, winner.metric))
        if report is None or math.isnan(report["delta"]):
            table.append(_failed(winner))
            continue
        sign = 1 if report["higher_is_better"] else -1
        half = _half_width(report["delta_stderr"], report["n"])
        row: dict[str, Any] = {
            **_selected(winner),
            "n": report["n"], "baseline": report["baseline"], "value": report["value"], "delta": report["delta"],
            "delta_low": report["delta"] - half, "delta_high": report["delta"] + half, "p_value": report["p_value"],
        }
        transform = transforms[winner.task, winner.metric]
        best = example_scores(folder, cell_of[winner.ablation, winner.task].cell_id, winner.metric, transform)
        beaten = []
        for name, draws in controls_of[winner.ablation].items():
            ids = [cell_of[draw, winner.task].cell_id for draw in draws]
            drawn = [example_scores(folder, cell_id, winner.metric, transform)
                     for cell_id in ids if (cell_id, winner.metric) in by_cell]
            row[f"{name}_draws"] = len(drawn)
            if draws and not drawn:
                beaten.append(None)
                continue
            against = paired(best, _mean_of_draws(drawn, best))
            row |= {f"{name}_delta": report["delta"] - against.delta, f"over_{name}": against.delta,
                    f"over_{name}_p": against.p_value}
            beaten.append(sign * against.delta > 0 and against.p_value is not None and against.p_value < LEVEL)
        row["beats_controls"] = None if None in beaten else all(beaten)
        for task in beside:
            of_cell = rows[rows.cell_id == cell_of[winner.ablation, task].cell_id].set_index("metric")
            if of_cell.empty:
                continue
            price, key = of_cell.iloc[0], f"{task}_{of_cell.index[0]}"
            row |= {f"{key}_baseline": price.baseline, key: price.value, f"{key}_delta": price.delta,
                    f"{key}_p": price.p_value}
        table.append(row)
    for row, p in zip(table, holm([row["p_value"] for row in table])):
        row["p_holm"] = float(p)
        if math.isnan(p) or row["beats_controls"] is None:
            row["verdict"] = "failed"
            continue
        better = row["delta"] > 0 if row["higher_is_better"] else row["delta"] < 0
        if not (better and p < LEVEL):
            row["verdict"] = "no"
        else:
            row["verdict"] = "yes" if row["beats_controls"] else "no more than its controls"
    return table


def _selected(winner: Winner) -> dict[str, Any]:
    """What the selection part says of a best cell."""
    return {
        "task": winner.task, "metric": winner.metric, "higher_is_better": bool(winner.row["higher_is_better"]),
        "target": winner.ablation.target.label, "region": winner.ablation.region.label,
        "energy_removed": winner.row["energy_removed"], "n_tried": winner.n_tried,
        "selection_n": winner.row["n"], "selection_baseline": winner.row["baseline"],
        "selection_value": winner.row["value"], "selection_delta": winner.row["delta"],
        "selection_p": winner.row["p_value"], "selection_p_holm": winner.p_holm,
    }


def _failed(winner: Winner) -> dict[str, Any]:
    return {**_selected(winner), "p_value": math.nan, "beats_controls": None}


def _half_width(stderr: float | None, n: int) -> float:
    """Half the 95 % interval of Student's t; NaN where there is no standard error."""
    if stderr is None or math.isnan(stderr) or n < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1) * stderr)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as <path>.parquet and as a Markdown table <path>.md, each renamed into place."""
    import pandas

    table = pandas.DataFrame(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    table.to_parquet(temporary, index=False)
    temporary.rename(path.with_suffix(".parquet"))
    temporary.write_text(markdown(table.to_dict("records")))
    temporary.rename(path.with_suffix(".md"))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, numbers with four digits."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
