"""Figures of a study: a metric against the removed region, and heat maps of blocks and layer types.

In the heat maps blue is always better and red worse.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.measurements.ablation.summary import MeasuredMetric, is_control, region_order
from harness.tables.drawing import MARKERS, SERIES_COLOURS, colour_map, new_figure, save_figure
from harness.tables.frames import groups_of, rows_of
from harness.tables.labels import region_words
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_PANELS = 10  # regions in a heat map; ten, because there are ten deciles
MAX_TICKS = 24
MAX_BLOCK_PANELS = 4
MAX_DOTS = 16  # with more matrices per region and layer type, bars are drawn instead of dots
LOG_SPAN = 30  # colours are logarithmic if the largest delta is more than so many times the median


@dataclass(frozen=True)
class _Look:
    """What all panels of a region figure share.

    regions: the labels along the x axis. controls: those of them that are controls. colours, markers: those of each
    series by name.
    """

    regions: Sequence[str]
    controls: Collection[str]
    colours: Mapping[str, Any]
    markers: Mapping[str, str]


def region_figure(one: MeasuredMetric, path: Path | None = None) -> Figure:
    """Return a figure of one metric against the removed region.

    There is a series for each layer type, or for each block if the targets are blocks. Error bars are standard errors.
    A grey band around the baseline holds the values whose deltas are below the noise floor.
    If the targets are single matrices of up to 4 blocks, each block has a panel. With more blocks the lines are medians
    over the blocks; the matrices are shown as dots if there are at most 16, else bars show the range from 10 % to 90 %.

    one: its cells must not be empty. path: a PNG file in which the figure is saved too.
    """
    regions = region_order(one.cells)
    blocks = sorted(set(one.cells["block"].dropna()))
    by_block = bool((one.cells["target_kind"] == "matrix").all()) and 1 < len(blocks) <= MAX_BLOCK_PANELS
    if by_block:
        panels = [(f"block {int(block)}", one.cells[one.cells["block"] == block]) for block in blocks]
    else:
        panels = [("", one.cells)]
    series = _series(one.cells)
    sequential = len(series) > len(SERIES_COLOURS)
    labels = [figure_text(_tick(region, one.cells)) for region in regions]
    narrow = by_block and len(panels) > 2
    upright = max(map(len, labels)) <= 7 or len(labels) <= 6 and not narrow
    width = min(MAX_TICKS, len(regions)) * (0.4 if narrow else 0.62)
    figure = new_figure(min(15.0, max(6.4, 2.2 + width * len(panels))), 4.4 if upright else 5.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = {
        name: colour_map("viridis")(i / (len(series) - 1)) if sequential else SERIES_COLOURS[i]
        for i, (name, _) in enumerate(series)
    }
    markers = {name: "o" if sequential else MARKERS[i] for i, (name, _) in enumerate(series)}
    look = _Look(regions, is_control(one.cells), colours, markers)
    notes: dict[str, None] = {}
    for panel, (title, cells) in zip(axes, panels):
        notes |= _draw_series(panel, _series(cells), look)
        if one.baseline is not None:
            value = one.baseline["value"]
            panel.axhline(value, color="0.25", linestyle="--", linewidth=1.1, label="baseline", zorder=1)
            if one.noise_floor:
                ends = value - one.noise_floor, value + one.noise_floor
                panel.axhspan(*ends, color="0.5", alpha=0.2, linewidth=0, label="noise floor", zorder=0)
        _region_ticks(panel, labels, upright)
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    _log_axis(axes[0], one)
    axes[0].set_ylabel(f"{figure_text(one.metric)} ({'higher' if one.higher_is_better else 'lower'} is better)")
    figure.supxlabel("removed part of the spectrum (0 = largest singular value)", fontsize="medium")
    figure.suptitle(figure_text(f"{one.task}: {one.metric}"))
    if sequential:
        _block_bar(figure, axes, [name for name, _ in series])
    handles = {}
    for panel in axes:
        handles.update(
            {label: handle for handle, label in zip(*panel.get_legend_handles_labels()) if label not in handles}
        )
    if sequential:  # the colour bar already names the series
        handles = {label: handle for label, handle in handles.items() if label in ("baseline", "noise floor")}
    if handles:
        heading = "\n".join(notes) or None
        figure.legend(
            handles.values(), handles, loc="outside right upper", frameon=False, fontsize="small", title=heading,
            title_fontsize="small",
        )  # fmt: skip
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw_series(axes: Axes, series: Sequence[tuple[str, pandas.DataFrame]], look: _Look) -> dict[str, None]:
    """Draw all series in one panel, side by side within a region. Return notes for the legend as keys of a dict."""
    notes: dict[str, None] = {}
    span = 0.7 if len(series) > 1 else 0.0
    ordinal = {region: i for i, region in enumerate(look.regions)}
    for i, (name, rows) in enumerate(series):
        shift = span * ((i + 0.5) / len(series) - 0.5)
        colour = look.colours[name]
        style = {"color": colour, "marker": look.markers[name]}
        x = rows["region"].map(ordinal).to_numpy(float) + shift
        if rows["region"].duplicated().any():
            by_region = rows.groupby("region")["value"]
            values = by_region.median()
            if by_region.size().max() <= MAX_DOTS:
                notes["median over blocks"] = None
                axes.plot(x, rows["value"], linestyle="none", markersize=3, alpha=0.35, zorder=2, **style)
            else:
                notes["median over blocks,\nbars: 10 % to 90 %"] = None
                low, high = values - by_region.quantile(0.1), by_region.quantile(0.9) - values
                middle = values.index.map(ordinal).to_numpy(float) + shift
                axes.errorbar(middle, values, (low, high), fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
        else:
            bars = rows["stderr"].astype(float)
            axes.errorbar(x, rows["value"], bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
            values = rows.set_index("region")["value"]
        there = [region for region in look.regions if region in values.index]
        label: str | None = figure_text(name)
        # A line joins regions that are neighbours in the spectrum. Controls have no place in it, so no line joins them.
        for group, line in (
            ([r for r in there if r not in look.controls], "-"),
            ([r for r in there if r in look.controls], "none"),
        ):
            if group:
                at = [ordinal[region] + shift for region in group]
                axes.plot(
                    at, values[group], linestyle=line, linewidth=1.3, markersize=4.5, zorder=3, label=label, **style
                )
                label = None
    first_control = next((i for i, region in enumerate(look.regions) if region in look.controls), None)
    if first_control:
        axes.axvline(first_control - 0.5, color="0.8", linewidth=0.8)
    return notes


def _region_ticks(axes: Axes, labels: list[str], upright: bool) -> None:
    shown = range(0, len(labels), math.ceil(len(labels) / MAX_TICKS))
    texts = ["\n".join(textwrap.wrap(labels[i], 13 if upright else 18)) for i in shown]
    if upright:
        axes.set_xticks(shown, texts, fontsize="small")
    else:
        axes.set_xticks(shown, texts, fontsize="small", rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _log_axis(axes: Axes, one: MeasuredMetric) -> None:
    """Make the y axis logarithmic if the values are positive, span more than a factor of 4 and are not mere shares.

    Perplexities may span many orders of magnitude.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = one.cells["value"].to_numpy(float)
    low, high = values.min(), values.max()
    if low > 0 and high > 1.5 and high / low > 4:
        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _block_bar(figure: Figure, axes: np.ndarray, names: list[str]) -> None:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), colour_map("viridis")), ax=axes, pad=0.02)
    at = np.unique(np.linspace(0, len(names) - 1, 8).astype(int)).tolist()
    bar.set_ticks(at, labels=[names[i] for i in at])


def heat_map_figure(one: MeasuredMetric, path: Path) -> list[str]:
    """Save heat maps of the delta over blocks and layer types, one panel for each region, as PNG.

    Returns the labels of the regions that were drawn: all, or the 10 with the largest mean |delta|. All panels share
    one colour scale, which is centred at zero, ends at the 99th percentile of |delta|, and is logarithmic if the deltas
    span orders of magnitude. Grey means that a matrix was not measured or failed, and hatching that its delta is below
    the noise floor. Targets must be single matrices.
    """
    import numpy as np

    cells = one.cells[one.cells["delta"].notna()]
    regions, dropped = _heat_map_regions(cells)
    blocks = sorted({int(block) for block in cells["block"]})
    types = sorted(set(cells["layer_type"]), key=layer_key)
    columns = min(len(regions), max(1, int(16 / (1.2 + 0.5 * len(types)))))
    rows = math.ceil(len(regions) / columns)
    width = columns * (0.7 + max(1.2, 0.5 * len(types))) + 1.4
    height = rows * (1.0 + min(7.0, max(0.9, 0.24 * len(blocks)))) + 0.6
    figure = new_figure(max(4.8, width), max(3.0, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    norm, extend = _centred_norm(cells["delta"].to_numpy(float))
    colours = colour_map("RdBu" if one.higher_is_better else "RdBu_r").with_extremes(bad="0.8")
    row_of, column_of = {b: i for i, b in enumerate(blocks)}, {t: i for i, t in enumerate(types)}
    of_region = dict(list(cells.groupby("region")))
    image: AxesImage | None = None
    for i, (panel, region) in enumerate(zip(axes.flat, regions)):
        grid = np.full((len(blocks), len(types)), np.nan)
        for cell in rows_of(of_region[region][["block", "layer_type", "delta"]]):
            # A block may have several matrices of one type (experts). The one with the largest |delta| is shown.
            at = row_of[int(cell.block)], column_of[cell.layer_type]
            if np.isnan(grid[at]) or abs(cell.delta) > abs(grid[at]):
                grid[at] = cell.delta
        image = panel.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        if one.noise_floor:
            noise = np.ma.masked_where(~(np.abs(grid) < one.noise_floor), grid)
            edges = np.arange(len(types) + 1) - 0.5, np.arange(len(blocks) + 1) - 0.5
            panel.pcolor(*edges, noise, hatch="////", alpha=0)
        title = textwrap.wrap(figure_text(region_words(region)), max(14, 6 * len(types)))
        panel.set_title("\n".join(title), fontsize="medium")
        under = i + columns >= len(regions)
        # Ticks take most of the time of a figure, so that only the panels at its left and lower edges have them.
        names = [figure_text(one) for one in types] if under else []
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        panel.set_yticks([])
        if i % columns == 0:
            step = math.ceil(len(blocks) / 20)
            panel.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize="small")
            panel.set_ylabel("block")
        if grid.size <= 40:
            _annotate(panel, grid, colours, norm)
    for panel in list(axes.flat)[len(regions) :]:
        panel.set_axis_off()
    assert image is not None  # there is at least one region
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.02, aspect=30)
    hatched = "; hatched: below the noise floor" if one.noise_floor else ""
    bar.set_label(f"delta against the baseline (blue is better{hatched})")
    more = f" ({len(regions)} of {len(regions) + dropped} regions)" if dropped else ""
    figure.suptitle(figure_text(f"{one.task}: {one.metric}{more}"))
    save_figure(figure, path)
    return regions


def _series(cells: pandas.DataFrame) -> list[tuple[str, pandas.DataFrame]]:
    if (cells["target_kind"] == "block").all():
        return [(f"block {int(block)}", rows) for block, rows in groups_of(cells, "block")]
    by_type = cells["layer_type"].notna()
    groups = sorted(groups_of(cells[by_type], "layer_type"), key=lambda item: layer_key(item[0]))
    return [*groups, *groups_of(cells[~by_type], "target")]


def _tick(region: str, cells: pandas.DataFrame) -> str:
    """Return the label of a region on the x axis, which for a decile is only its interval."""
    by = cells.loc[cells["region"] == region, "region_by"].iloc[0]
    words = region_words(region)
    return words.split("(")[-1].rstrip(")") if by == "decile" else words


def _heat_map_regions(cells: pandas.DataFrame) -> tuple[list[str], int]:
    regions = region_order(cells)
    if len(regions) <= MAX_PANELS:
        return regions, 0
    strongest = set(cells["delta"].abs().groupby(cells["region"]).mean().nlargest(MAX_PANELS).index)
    return [region for region in regions if region in strongest], len(regions) - MAX_PANELS


def _centred_norm(deltas: np.ndarray) -> tuple[Normalize, Literal["neither", "both"]]:
    import numpy as np
    from matplotlib.colors import Normalize, SymLogNorm

    sizes = np.abs(deltas[deltas != 0])
    if not len(sizes):
        return Normalize(-1, 1), "neither"
    top, middle = float(np.quantile(sizes, 0.99)), float(np.median(sizes))
    extend: Literal["neither", "both"] = "both" if sizes.max() > top * 1.0001 else "neither"
    if top / middle > LOG_SPAN:
        return SymLogNorm(linthresh=middle, vmin=-top, vmax=top), extend
    return Normalize(-top, top), extend


def _annotate(panel: Axes, grid: np.ndarray, colours: Colormap, norm: Normalize) -> None:
    import numpy as np

    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
