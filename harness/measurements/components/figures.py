"""Figures of components: the atlas, block x layer type, and predictions beside measured effects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.tables.drawing import colour_map, new_figure, save_figure
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import pandas


def atlas(extremes: pandas.DataFrame, path: Path, title: str) -> None:
    """Save the atlas as PNG: for each block and layer type the largest gain and the largest harm of one component.

    extremes: as `summary.extremes` returns. Each field shows the position of the component in its spectrum.
    """
    types = sorted(extremes["layer_type"].unique(), key=layer_key)
    blocks = sorted(extremes["block"].unique())
    figure = new_figure(2.0 + 1.5 * len(types), 1.8 + 0.26 * max(6, len(blocks)))
    for panel, (name, title_of, colours) in zip(
        figure.subplots(1, 2, sharey=True), (("gain", "largest gain", "Greens"), ("harm", "largest harm", "Reds"))
    ):
        sign = 1.0 if name == "gain" else -1.0
        grid = extremes.pivot_table(index="block", columns="layer_type", values=name, aggfunc="max" if name == "gain"
                                    else "min").reindex(index=blocks, columns=types) * sign
        values = grid.to_numpy(float).clip(min=0)
        top = float(values[values == values].max(initial=0.0)) or 1.0
        image = panel.imshow(values, cmap=colour_map(colours).with_extremes(bad="0.85"), vmin=0, vmax=top,
                             aspect="auto", interpolation="nearest")
        which = extremes.drop_duplicates(["block", "layer_type"]).set_index(["block", "layer_type"])[f"{name}_index"]
        for y, block in enumerate(blocks):
            for x, layer_type in enumerate(types):
                if (block, layer_type) in which.index:
                    dark = values[y, x] > 0.6 * top
                    panel.text(x, y, str(which[block, layer_type]), ha="center", va="center", fontsize="x-small",
                               in_layout=False, color="white" if dark else "0.2")
        panel.set_xticks(range(len(types)), [figure_text(one) for one in types], rotation=45, ha="right",
                         rotation_mode="anchor", fontsize="small")
        panel.set_yticks(range(len(blocks)), [str(one) for one in blocks], fontsize="small")
        panel.set_title(f"{title_of} by one component", fontsize="medium")
        figure.colorbar(image, ax=panel, shrink=0.8, pad=0.02).ax.tick_params(labelsize="small")
        if name == "gain":
            panel.set_ylabel("block", fontsize="small")
    figure.suptitle(title + "; numbers: position in the spectrum, 0 = the largest value", fontsize="medium")
    save_figure(figure, path)


def prediction_figure(rows: pandas.DataFrame, path: Path, title: str) -> None:
    """Save the measured effect of each component against its first-order prediction as PNG.

    rows: of one task and metric, as `summary.compared` returns.
    """
    figure = new_figure(5.2, 4.6)
    panel = figure.subplots()
    panel.plot(rows["predicted_improvement"], rows["improvement"], ".", markersize=4, alpha=0.5, color="#3b6ea5")
    low, high = (function([function(rows[name]) for name in ("predicted_improvement", "improvement")])
                 for function in (min, max))
    panel.plot([low, high], [low, high], color="0.4", linewidth=0.8, linestyle="--", label="equal")
    for axis in (panel.set_xscale, panel.set_yscale):
        axis("symlog", linthresh=max(1e-12, 1e-2 * max(abs(low), abs(high))))
    panel.set_xlabel("first-order prediction of the improvement", fontsize="small")
    panel.set_ylabel("measured improvement", fontsize="small")
    panel.tick_params(labelsize="small")
    panel.legend(frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)
