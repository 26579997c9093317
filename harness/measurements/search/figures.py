"""The figure of a search: the improvement of each metric over blocks and regions, as in LASER (arXiv 2312.13558)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.measurements.ablation.summary import region_order
from harness.tables.drawing import colour_map, new_figure, save_figure
from harness.tables.frames import rows_of
from harness.tables.labels import region_words
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MAX_METRICS, MAX_TICKS = 6, 12


def grid_figure(grid: pandas.DataFrame, verdict: pandas.DataFrame, path: Path | None = None) -> Figure | None:
    """Return a figure of the grid with a line of panels for each searched metric and a panel for each layer type.

    A panel has the blocks along x and the regions along y. Blue is better, a star is the best cell, and grey was not
    measured. The colours end at one and a half times the largest improvement, because what destroys the model would
    hide what helps it. If little or nothing helps, they end at one and a half times the first quartile of all sizes.

    grid: rows of the table `metrics` of the selection part, without controls, with the column `improvement`. verdict:
    the table of that name. path: a PNG file in which the figure is saved too. None if no target is within one block.
    """
    import numpy as np
    from matplotlib.colors import Normalize

    grid = grid[grid["block"].notna()]
    found = list(rows_of(verdict.head(MAX_METRICS)))
    if grid.empty or not found:
        return None
    grid = grid.assign(layer_type=grid["layer_type"].fillna("block"))
    types = sorted(set(grid["layer_type"]), key=layer_key)
    regions, blocks = region_order(grid), sorted({int(block) for block in grid["block"]})
    y_of, x_of = {region: i for i, region in enumerate(regions)}, {block: i for i, block in enumerate(blocks)}
    width = 3.2 + (1.0 + max(1.6, 0.16 * len(blocks))) * len(types)
    figure = new_figure(max(5.6, width), 0.8 + max(1.6, 0.7 + 0.26 * len(regions)) * len(found))
    axes = figure.subplots(len(found), len(types), squeeze=False, sharex=True, sharey=True)
    colours = colour_map("RdBu").with_extremes(bad="0.8")
    for line, best in zip(axes, found):
        of_metric = grid[(grid["task"] == best.task) & (grid["metric"] == best.metric)]
        sizes = of_metric["improvement"].abs()
        limit = 1.5 * max(of_metric["improvement"].max(), sizes.quantile(0.25)) if len(of_metric) else 0.0
        limit = float(limit) or float(sizes.max()) or 1.0
        for panel, layer_type in zip(line, types):
            values = np.full((len(regions), len(blocks)), np.nan)
            for row in rows_of(of_metric[of_metric["layer_type"] == layer_type]):
                values[y_of[row.region], x_of[int(row.block)]] = row.improvement
                if (row.target, row.region) == (best.target, best.region):
                    panel.plot(x_of[int(row.block)], y_of[row.region], "k*", markersize=9, markeredgecolor="white")
            image = panel.imshow(values, cmap=colours, norm=Normalize(-limit, limit), aspect="auto", origin="lower")
            panel.set_title(figure_text(f"{best.task}: {best.metric}, {layer_type}"), fontsize="small")
        bar = figure.colorbar(image, ax=list(line), extend="min", pad=0.02)
        bar.set_label("improvement", fontsize="small")
        line[0].set_yticks(range(len(regions)), [figure_text(region_words(one)) for one in regions], fontsize="small")
    step = -(-len(blocks) // MAX_TICKS)
    for panel in axes[-1]:
        panel.set_xticks(range(0, len(blocks), step), blocks[::step], fontsize="small")
        panel.set_xlabel("block", fontsize="small")
    if path is not None:
        save_figure(figure, path)
    return figure
