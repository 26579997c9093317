"""Figures of coupling: heat maps over blocks, statistics by block, coupling over a training, and trajectories."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measurements.coupling.summary import of_pairs
from harness.tables.drawing import MARKERS, SERIES_COLOURS, colour_map, new_figure, save_figure
from harness.tables.text import figure_text, shorten

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

LEAST_SCALE = 0.02  # the colours of coupling end at this value, or at a larger one
MOST_LABELS = 16
NULL: dict[str, Any] = {"color": "0.35", "linestyle": "--", "linewidth": 1.0}


def heat_map(rows: pandas.DataFrame, path: Path | None, title: str) -> Figure:
    """Return heat maps over pairs of blocks: the measured m, that of unrelated vectors, and coupling = 1 - m / null.

    rows: of one set of weights, kind depth, one order and one K. The diagonal is left out. path: a PNG file in which
    the figure is saved too.
    """
    import numpy as np

    pairs = of_pairs(rows, "all")
    n = int(rows["block_i"].max()) + 1
    figure = new_figure(11.0, 4.2)
    axes = figure.subplots(1, 3)
    grids = [pairs.pivot_table(index="block_i", columns="block_j", values=name).reindex(range(n), columns=range(n))
             .to_numpy(float) for name in ("m", "m_null", "coupling")]
    low, high = (function([function(grid) for grid in grids[:2]]) for function in (np.nanmin, np.nanmax))
    reach = max(LEAST_SCALE, float(np.nanmax(np.abs(grids[2]))))
    names = ("m, measured", "m of unrelated vectors (null)", "coupling = 1 - m / null")
    for panel, grid, name in zip(axes, grids, names):
        coupling = grid is grids[2]
        colours = colour_map("RdBu_r" if coupling else "viridis").with_extremes(bad="0.8")
        image = panel.imshow(grid, cmap=colours, vmin=-reach if coupling else low, vmax=reach if coupling else high,
                             interpolation="nearest")
        panel.set_title(name, fontsize="medium")
        step = math.ceil(n / MOST_LABELS)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_ticks(range(0, n, step), [str(i) for i in range(0, n, step)], fontsize="small")
        panel.set_xlabel("block of the vectors, j", fontsize="small")
        bar = figure.colorbar(image, ax=panel, shrink=0.8, pad=0.02)
        bar.ax.tick_params(labelsize="small")
    axes[0].set_ylabel("block of the Jacobian, i", fontsize="small")
    figure.suptitle(title)
    if path is not None:
        save_figure(figure, path)
    return figure


def block_figure(blocks: pandas.DataFrame, path: Path, title: str) -> None:
    """Save the statistics of Jacobians by block, with a line for each set of weights, as PNG.

    blocks: as `summary.of_blocks` returns.
    """
    drawn = {"sigma_max": "largest singular value", "effective_rank": "effective rank", "symmetry": "symmetry",
             "departure_normality": "departure from normality",
             "product_effective_rank": "effective rank of the product"}
    drawn = {name: text for name, text in drawn.items() if blocks[name].notna().any()}
    figure = new_figure(3.1 * len(drawn) + 0.6, 3.6)
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    for panel, (name, text) in zip(axes, drawn.items()):
        for i, (weights, rows) in enumerate(blocks.groupby("weights", sort=False)):
            panel.errorbar(rows["block"], rows[name], rows[f"{name}_stderr"], **_style(i), label=_short(weights))
        panel.set_title(text, fontsize="medium")
        panel.set_xlabel("block", fontsize="small")
        panel.tick_params(labelsize="small")
        if name == "sigma_max":
            panel.set_yscale("log")
        if name == "symmetry":
            panel.axhline(0.5, **NULL)
        if name == "departure_normality":
            panel.axhline(math.sqrt(0.5), **NULL)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  fontsize="small")
    figure.suptitle(title + "; dashed: independent entries")
    save_figure(figure, path)


def training_figure(
    summary: pandas.DataFrame, trajectories: pandas.DataFrame, checkpoints: list[str], path: Path, title: str
) -> None:
    """Save coupling and the line-shape score over the checkpoints of a training, each with its null, as PNG.

    summary: rows of kind depth, one order and one K. checkpoints: the labels of the weights, in order.
    """
    figure = new_figure(max(8.0, 4.0 + 0.8 * len(checkpoints)), 4.2)
    left, right = figure.subplots(1, 2)
    for i, pairs in enumerate(("all", "neighbours", "without block 0")):
        rows = summary[summary["pairs"] == pairs].set_index("weights").reindex(checkpoints)
        if rows["coupling"].notna().any():
            left.errorbar(range(len(checkpoints)), rows["coupling"], rows["coupling_stderr"], **_style(i), label=pairs)
    left.axhline(0, **NULL, label="unrelated vectors")
    random = summary[(summary["weights"] == "random") & (summary["pairs"] == "all")]
    if len(random):
        left.axhline(random["coupling"].iloc[0], color="0.35", linestyle=":", label="random initialisation, all")
    left.set_title("coupling", fontsize="medium")
    of_weights = trajectories.set_index("weights")
    rows = of_weights.reindex(checkpoints)
    right.errorbar(range(len(checkpoints)), rows["lss"], rows["lss_stderr"], **_style(3), label="line-shape score")
    right.axhline(rows["lss_null"].mean(), **NULL, label="random directions")
    if "random" in of_weights.index:
        right.axhline(of_weights.loc["random", "lss"], color="0.35", linestyle=":", label="random initialisation")
    right.set_title("line-shape score", fontsize="medium")
    for panel in (left, right):
        names = [figure_text(one) for one in checkpoints]
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def trajectory_figure(points: pandas.DataFrame, path: Path, title: str) -> None:
    """Save the trajectories of the tokens of one prompt in the plane of their principal axes, as PNG.

    points: of one prompt, of the weights that are drawn side by side: the trained and the random ones.
    """
    groups = list(points.groupby("weights", sort=False))
    figure = new_figure(5.2 * len(groups), 4.6)
    colours = colour_map("cividis")
    for panel, (weights, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        tokens, last = sorted(rows["token"].unique()), int(rows["boundary"].max())
        for i, token in enumerate(tokens):
            one = rows[rows["token"] == token].sort_values("boundary")
            colour = colours(0.15 + 0.7 * i / max(1, len(tokens) - 1))
            panel.plot(one["pc1"], one["pc2"], "-", color=colour, linewidth=1.0, marker=".", markersize=3)
            panel.plot(one["pc1"].iloc[:1], one["pc2"].iloc[:1], "s", color=colour, markersize=4)
        panel.set_title(f"{_short(weights)}: {len(tokens)} tokens through {last} blocks", fontsize="medium")
        panel.set_xlabel("first principal axis", fontsize="small")
        panel.set_ylabel("second principal axis", fontsize="small")
        panel.tick_params(labelsize="small")
    figure.suptitle(title + "; squares: input of the first block, dark: early tokens")
    save_figure(figure, path)


def ablation_figure(summary: pandas.DataFrame, path: Path, title: str) -> None:
    """Save the coupling under each ablation beside that of the unedited weights, as PNG.

    summary: rows of kind depth, one order and one K, with the unedited weights first.
    """
    names = list(dict.fromkeys(summary["weights"]))
    figure = new_figure(8.0, 1.6 + 0.26 * len(names))
    panel = figure.subplots()
    for i, pairs in enumerate(("all", "neighbours")):
        rows = summary[summary["pairs"] == pairs].set_index("weights").reindex(names)
        places = [y + 0.15 * (2 * i - 1) for y in range(len(names))]
        style = {**_style(i), "linestyle": "none"}
        panel.errorbar(rows["coupling"], places, xerr=rows["coupling_stderr"], **style, label=pairs)
        panel.axvline(rows["coupling"].iloc[0], color=style["color"], linestyle=":", linewidth=1.0)
    panel.axvline(0, **NULL)
    panel.set_yticks(range(len(names)), [_short(name) for name in names], fontsize="small")
    panel.invert_yaxis()
    panel.set_xlabel("coupling; dashed: unrelated vectors, dotted: unedited weights", fontsize="small")
    panel.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def _style(i: int) -> dict[str, Any]:
    return {"color": SERIES_COLOURS[i % len(SERIES_COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4,
            "linewidth": 1.3, "capsize": 2, "linestyle": "-"}


def _short(name: object) -> str:
    return figure_text(shorten(str(name), 48))
