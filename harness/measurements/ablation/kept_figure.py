"""The figure of what is kept: a metric with only the largest, and with only the smallest singular values of a matrix.

This is Figure 5 of LASER (arXiv 2312.13558), of a study with region.keep=true (experiment=laser_figure5).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.measurements.ablation.summary import MeasuredMetric
from harness.tables.drawing import MARKERS, SERIES_COLOURS, new_figure, save_figure
from harness.tables.labels import nominal_interval
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SIDES = {"large": "the largest values are kept", "small": "the smallest values are kept"}


def kept_cells(one: MeasuredMetric) -> pandas.DataFrame:
    """Return the cells in which a share of the rank at either end is kept, with the column `kept`: that share.

    The table is empty unless both ends are kept, each with at least two shares.
    """
    cells = one.cells
    chosen = cells[(cells["region_by"] == "fraction") & cells["region_kind"].isin(list(SIDES))
                   & cells["region_keep"].astype("boolean").fillna(False)]
    intervals = chosen["region"].map(lambda label: nominal_interval(label))
    chosen = chosen.assign(kept=[round(stop - start, 9) for start, stop in intervals])
    sides = chosen.groupby("region_kind")["kept"].nunique()
    return chosen if set(sides.index) == set(SIDES) and sides.min() >= 2 else chosen.iloc[:0]


def kept_figure(one: MeasuredMetric, path: Path | None = None) -> Figure:
    """Return a figure of the metric over the share of the rank that is kept, with a panel for each layer type.

    There is a line for each end of the spectrum: the median over the targets of the layer type. The targets are dots if
    there are several, and bars are paired 95 % intervals of the change if there is one. The dashed line is the unedited
    model.

    one: `kept_cells` of it must not be empty. path: a PNG file in which the figure is saved too.
    """
    cells = kept_cells(one)
    named = cells.assign(series=cells["layer_type"].fillna(cells["target"]))
    types = sorted(set(named["series"]), key=layer_key)
    figure = new_figure(1.6 + 3.4 * len(types), 4.0)
    axes = figure.subplots(1, len(types), sharey=True, squeeze=False)[0]
    for panel, name in zip(axes, types):
        of_type = named[named["series"] == name]
        for i, (kind, label) in enumerate(SIDES.items()):
            side = of_type[of_type["region_kind"] == kind].sort_values("kept")
            middle = side.groupby("kept")["value"].median()
            style = {"color": SERIES_COLOURS[i], "marker": MARKERS[i]}
            if side["target"].nunique() > 1:
                panel.plot(100 * side["kept"], side["value"], linestyle="none", markersize=3, alpha=0.35, **style)
            else:
                panel.errorbar(100 * side["kept"], side["value"], 1.96 * side["delta_stderr"].astype(float), fmt="none",
                               ecolor=SERIES_COLOURS[i], elinewidth=1, capsize=2)
            panel.plot(100 * middle.index, middle, linewidth=1.4, markersize=5, label=label, **style)
        if one.baseline is not None:
            panel.axhline(one.baseline["value"], color="0.25", linestyle="--", linewidth=1.1, label="baseline")
        targets = sorted(set(of_type["target"]))
        title = targets[0] if len(targets) == 1 else f"{name}, median of {len(targets)} matrices"
        panel.set_title(figure_text(title), fontsize="medium")
        panel.grid(color="0.92", linewidth=0.8)
        panel.set_xlabel("kept singular values (% of the rank)")
    values = cells["value"].to_numpy(float)
    if values.min() > 0 and values.max() > 1.5 and values.max() / values.min() > 4:
        axes[0].set_yscale("log")
    axes[0].set_ylabel(f"{figure_text(one.metric)} ({'higher' if one.higher_is_better else 'lower'} is better)")
    figure.suptitle(figure_text(one.title))
    axes[-1].legend(frameon=False, fontsize="small")
    if path is not None:
        save_figure(figure, path)
    return figure
