"""Figures and tables of a finished search: python experiments/laser/figures.py SEARCH_FOLDER OUT_PREFIX

OUT_PREFIX-grid.png: change of each metric over blocks and kept rank, per layer type, the winner marked.
OUT_PREFIX-grid.csv, -verdict.csv, -beside.csv, -comparison.csv, -composition.csv: the grid and the search's tables.
OUT_PREFIX-gradient.png: first-order prediction against measured change, where the search compared the two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas

from harness.measurements.ablation.tables import read_metrics
from harness.measurements.search.tables import TABLES
from harness.tables.store import read_table


def grid_of(folder: Path) -> pandas.DataFrame:
    rows = read_metrics(folder / "studies" / "selection")
    rows = rows[(rows.target_kind == "matrix") & (rows.status == "ok")].copy()
    rows["kept"] = 1 - (rows.fraction_stop - rows.fraction_start)
    rows["improvement"] = np.where(rows.higher_is_better.astype(bool), rows.delta, -rows.delta)
    return rows


def table_of(search: Path, name: str) -> pandas.DataFrame:
    """A table of the search; empty where it made none."""
    return read_table(search, TABLES, name).drop(columns=TABLES.key)


def draw_grid(grid: pandas.DataFrame, verdict: pandas.DataFrame, path: Path) -> None:
    shown = list(verdict[["task", "metric"]].itertuples(index=False, name=None))
    types = [name for name in ("gate_proj", "up_proj", "down_proj") if name in set(grid.layer_type)]
    figure, axes = plt.subplots(
        len(shown), len(types), squeeze=False, layout="constrained",
        figsize=(1.6 + 0.16 * (grid.block.max() + 8) * len(types), 2.1 * len(shown)),
    )
    for line, (task, metric) in zip(axes, shown):
        of_metric = grid[(grid.task == task) & (grid.metric == metric)]
        best = verdict[(verdict.task == task) & (verdict.metric == metric)].iloc[0]
        # what destroys the model would hide what helps it
        limit = max(of_metric.improvement.max(), 1e-9) * 1.5
        for axis, layer_type in zip(line, types):
            table = of_metric[of_metric.layer_type == layer_type].pivot_table(
                index="kept", columns="block", values="improvement"
            )
            image = axis.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            axis.set_yticks(range(len(table)), [f"{100 * kept:.0f} %" for kept in table.index])
            step = max(1, len(table.columns) // 10)
            axis.set_xticks(range(0, len(table.columns), step), [int(b) for b in table.columns[::step]])
            axis.set_title(f"{task}: {metric}, {layer_type}", fontsize=8)
            axis.tick_params(labelsize=7)
            winner = of_metric[(of_metric.target == best.target) & (of_metric.region == best.region)].iloc[0]
            if winner.layer_type == layer_type:
                axis.plot(list(table.columns).index(winner.block), list(table.index).index(winner.kept), "k*", ms=9)
        figure.colorbar(image, ax=line, extend="min").set_label("improvement", fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("block", fontsize=8)
    for line in axes:
        line[0].set_ylabel("rank kept", fontsize=8)
    figure.savefig(path, dpi=110)


def draw_gradient(grid: pandas.DataFrame, predictions: pandas.DataFrame, path: Path) -> None:
    groups = list(predictions.groupby(["task", "metric"], sort=False))
    size = (1 + 3.6 * len(groups), 3.2)
    figure, axes = plt.subplots(1, len(groups), squeeze=False, figsize=size, layout="constrained")
    for axis, ((task, metric), guess) in zip(axes[0], groups):
        of_metric = grid[(grid.task == task) & (grid.metric == metric)]
        both = of_metric.merge(guess[["target", "region", "predicted_improvement"]], on=["target", "region"])
        for kept, part in sorted(both.groupby("kept"), key=lambda item: item[0]):
            color = plt.get_cmap("viridis")(kept)
            axis.plot(part.predicted_improvement, part.improvement, ".", color=color, label=f"{100 * kept:.0f} % kept")
        for which in ("x", "y"):
            getattr(axis, f"set_{which}scale")("symlog", linthresh=0.01)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.axvline(0, color="0.7", lw=0.8)
        axis.set_title(f"{task}: {metric}", fontsize=9)
        axis.set_xlabel("predicted improvement, first order", fontsize=8)
        axis.set_ylabel("measured improvement", fontsize=8)
        axis.tick_params(labelsize=7)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), fontsize=7, loc="outside right center")
    figure.savefig(path, dpi=110)


def write_tables(grid: pandas.DataFrame, search: Path, prefix: str) -> None:
    columns = ["task", "metric", "target", "region", "n", "baseline", "value", "delta", "delta_stderr", "p_value",
               "energy_removed"]
    verdict = table_of(search, "verdict")
    grid = grid.merge(verdict[["task", "metric"]]).sort_values(["task", "metric", "target", "region"])
    grid.to_csv(f"{prefix}-grid.csv", columns=columns, index=False, float_format="%.6g")
    for name in ("verdict", "beside", "comparison", "composition"):
        table = table_of(search, name)
        if len(table):
            table.to_csv(f"{prefix}-{name}.csv", index=False, float_format="%.6g")


def main(folder: str, prefix: str) -> None:
    search = Path(folder)
    grid = grid_of(search)
    write_tables(grid, search, prefix)
    draw_grid(grid, table_of(search, "verdict"), Path(f"{prefix}-grid.png"))
    predictions = table_of(search, "predictions")
    if len(predictions):
        draw_gradient(grid, predictions, Path(f"{prefix}-gradient.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
