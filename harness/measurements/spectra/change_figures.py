"""Figures of changes: their energy by tenths of the reference's directions, intruders, and relative sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.tables.drawing import MARKERS, SERIES_COLOURS, colour_map, new_figure, save_figure
from harness.tables.text import layer_key

if TYPE_CHECKING:
    import pandas

ANNOTATED_CELLS = 84  # heat maps with at most so many cells show the values as numbers
_NAMES = {"real": "the change", "rotated": "its singular values in random directions", "noise": "Gaussian noise"}
_SIDES = ("output", "input")


def change_figure(
    tenths: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], path: Path, title: str
) -> None:
    """Save a figure of one tuned model as PNG: energy ratios by tenths for both sides, and the counts of intruders.

    tenths, summary: the rows of `ChangeTables.tenths` and `ChangeTables.summary`. Bars are standard errors over the
    matrices.
    """
    figure = new_figure(11.5, 4.2)
    *panels, counts = figure.subplots(1, 3)
    panels[1].sharey(panels[0])  # before anything is drawn, so that both sides are in the limits
    controls = [str(row["control"]) for row in summary]
    for panel, side in zip(panels, _SIDES):
        panel.axhline(1, color="0.6", linewidth=0.8)
        for i, control in enumerate(controls):
            rows = [row for row in tenths if (row["side"], row["control"]) == (side, control)]
            at = [row["decile"] + 0.12 * (i - 1) for row in rows]  # beside each other, so that none hides another
            panel.errorbar(at, [row["energy_ratio"] for row in rows], [row["energy_ratio_stderr"] for row in rows],
                           color=SERIES_COLOURS[i], marker=MARKERS[i], markersize=4, linewidth=1.2, capsize=2,
                           label=_NAMES[control])
        panel.set_title(f"{side} directions", fontsize="medium")
        panel.set_xticks(range(1, 11))
        panel.set_xlabel("tenth of the reference's directions, 1 = the largest", fontsize="small")
    panels[0].set_ylabel("energy of the change / that in random directions", fontsize="small")
    width = 0.8 / len(controls)
    for i, row in enumerate(summary):
        at = [j + (i - (len(controls) - 1) / 2) * width for j in range(2)]
        bars = counts.bar(at, [row[f"intruders {side}"] for side in _SIDES], width, color=SERIES_COLOURS[i])
        counts.bar_label(bars, fmt="%g", fontsize="small")
    counts.set_xticks(range(2), [f"{side} vectors" for side in _SIDES])
    counts.set_title(f"intruders among {10 * summary[0]['matrices']} first vectors", fontsize="medium")
    highest = max(row[f"intruders {side}"] for row in summary for side in _SIDES)
    counts.set_ylim(0, max(1.0, 1.15 * highest))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                  fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def relative_figure(changes: pandas.DataFrame, path: Path, title: str) -> None:
    """Save a heat map over blocks and layer types of the relative change in percent, as PNG.

    changes: the rows of the real change of one tuned model. The experts of a block are averaged. Grey means that there
    is no such matrix.
    """
    import numpy as np

    blocks = sorted({int(block) for block in changes["block"]})
    types = sorted(set(changes["layer_type"]), key=layer_key)
    table = changes.pivot_table(index="block", columns="layer_type", values="relative_change", aggfunc="mean")
    values = 100 * table.reindex(index=blocks, columns=types).to_numpy(float)
    figure = new_figure(max(5.0, 2.0 + 0.9 * len(types)), 1.8 + min(9.0, max(1.2, 0.3 * len(blocks))))
    panel = figure.subplots()
    image = panel.imshow(values, cmap=colour_map("cividis").with_extremes(bad="0.8"), vmin=0, aspect="auto",
                         interpolation="nearest")
    panel.set_xticks(range(len(types)), types, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
    step = math.ceil(len(blocks) / 20)
    panel.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize="small")
    panel.set_ylabel("block")
    if values.size <= ANNOTATED_CELLS:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                panel.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, in_layout=False,
                           color="white" if dark else "black")
    bar = figure.colorbar(image, ax=panel, pad=0.02)
    bar.set_label("relative change |D| / |B| in %", fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)
