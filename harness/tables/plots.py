"""Figures of a study: a metric against the removed region, and heat maps of blocks x layer types.

Colours are Okabe and Ito's, and a blue-red map in which blue is always the better side; series differ by marker too.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

from harness.tables.summary import Measured, is_control, layer_key, region_order

SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MAX_PANELS = 10  # ten deciles; of the weaker regions the control goes first
MAX_TICKS = 24
MAX_BLOCK_PANELS = 4
MAX_DOTS = 16  # matrices per region and layer type that are drawn one by one
DPI = 120
LOG_SPAN = 30  # largest / median delta from which the colours are logarithmic


def region_figure(one: Measured, path: Path) -> None:
    """One metric against the removed region, a series per layer type (per block where the targets are blocks).

    Error bars are standard errors. Single matrices of up to 4 blocks get a panel per block; of more blocks, lines are
    medians over blocks, with the matrices as dots (up to 16) or the 10 % to 90 % range as bars.
    Draws nothing but `one.cells`, which must not be empty.
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
    labels = [_tick(region, one.cells) for region in regions]
    narrow = by_block and len(panels) > 2
    upright = max(map(len, labels)) <= 7 or len(labels) <= 6 and not narrow
    width = min(MAX_TICKS, len(regions)) * (0.4 if narrow else 0.62)
    figure = _figure(min(15.0, max(6.4, 2.2 + width * len(panels))), 4.4 if upright else 5.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = {
        name: _colour_map("viridis")(i / (len(series) - 1)) if sequential else SERIES_COLOURS[i]
        for i, (name, _) in enumerate(series)
    }
    markers = {name: "o" if sequential else MARKERS[i] for i, (name, _) in enumerate(series)}
    notes: dict[str, None] = {}
    for panel, (title, cells) in zip(axes, panels):
        notes |= _draw_series(panel, _series(cells), regions, is_control(one.cells), colours, markers)
        if one.baseline is not None:
            value = one.baseline["value"]
            panel.axhline(value, color="0.25", linestyle="--", linewidth=1.1, label="baseline", zorder=1)
        _region_ticks(panel, labels, upright)
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    _log_axis(axes[0], one)
    axes[0].set_ylabel(f"{one.metric} ({'higher' if one.higher_is_better else 'lower'} is better)")
    figure.supxlabel("removed part of the spectrum (0 = largest singular value)", fontsize="medium")
    figure.suptitle(f"{one.task}: {one.metric}")
    if sequential:
        _block_bar(figure, axes, [name for name, _ in series])
    handles = {}
    for panel in axes:
        handles.update(
            {label: handle for handle, label in zip(*panel.get_legend_handles_labels()) if label not in handles}
        )
    if sequential:  # the colour bar names the series
        handles = {label: handle for label, handle in handles.items() if label == "baseline"}
    if handles:
        title = "\n".join(notes) or None
        figure.legend(
            handles.values(), handles, loc="outside right upper", frameon=False, fontsize="small", title=title,
            title_fontsize="small",
        )  # fmt: skip
    _save(figure, path)


def _draw_series(axes, series, regions, controls, colours, markers) -> dict[str, None]:
    """Every series on one panel, side by side within a region; returns what the legend must say of medians."""
    notes: dict[str, None] = {}
    span = 0.7 if len(series) > 1 else 0.0
    ordinal = {region: i for i, region in enumerate(regions)}
    for i, (name, rows) in enumerate(series):
        shift = span * ((i + 0.5) / len(series) - 0.5)
        style = {"color": colours[name], "marker": markers[name]}
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
                at = values.index.map(ordinal).to_numpy(float) + shift
                axes.errorbar(at, values, (low, high), fmt="none", ecolor=colours[name], elinewidth=1, alpha=0.6)
        else:
            bars = rows["stderr"].astype(float)
            axes.errorbar(x, rows["value"], bars, fmt="none", ecolor=colours[name], elinewidth=1, capsize=2)
            values = rows.set_index("region")["value"]
        there = [region for region in regions if region in values.index]
        label = name
        # Lines join neighbours in the spectrum; controls have no place in it.
        for group, line in (
            ([r for r in there if r not in controls], "-"),
            ([r for r in there if r in controls], "none"),
        ):
            if group:
                at = [ordinal[region] + shift for region in group]
                axes.plot(
                    at, values[group], linestyle=line, linewidth=1.3, markersize=4.5, zorder=3, label=label, **style
                )
                label = None
    first_control = next((i for i, region in enumerate(regions) if region in controls), None)
    if first_control:
        axes.axvline(first_control - 0.5, color="0.8", linewidth=0.8)
    return notes


def _region_ticks(axes, labels: list[str], upright: bool) -> None:
    shown = range(0, len(labels), math.ceil(len(labels) / MAX_TICKS))
    texts = ["\n".join(textwrap.wrap(labels[i], 13 if upright else 18)) for i in shown]
    if upright:
        axes.set_xticks(shown, texts, fontsize="small")
    else:
        axes.set_xticks(shown, texts, fontsize="small", rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(labels) - 0.4)


def _log_axis(axes, one: Measured) -> None:
    """Perplexities explode: a logarithmic axis for positive values that are no shares and span a factor of 4."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = one.cells["value"].to_numpy(float)
    low, high = values.min(), values.max()
    if low > 0 and high > 1.5 and high / low > 4:
        axes.set_yscale("log")
        subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _block_bar(figure, axes, names: list[str]) -> None:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), _colour_map("viridis")), ax=axes, pad=0.02)
    at = np.unique(np.linspace(0, len(names) - 1, 8).astype(int))
    bar.set_ticks(at, labels=[names[i] for i in at])


def heat_map_figure(one: Measured, path: Path) -> list[str]:
    """Delta over blocks x layer types, a panel per region; returns the labels of the regions that were drawn.

    Of more than 10 regions, those with the largest mean |delta|. All panels share one colour scale, centred at zero,
    logarithmic when the deltas span orders of magnitude; beyond its ends (the 99th percentile) colours saturate.
    Targets must be single matrices. Grey: not measured or failed.
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
    figure = _figure(max(4.8, width), max(3.0, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    norm, extend = _centred_norm(cells["delta"].to_numpy(float))
    colours = _colour_map("RdBu" if one.higher_is_better else "RdBu_r").with_extremes(bad="0.8")
    row_of, column_of = {b: i for i, b in enumerate(blocks)}, {t: i for i, t in enumerate(types)}
    of_region = dict(list(cells.groupby("region")))
    image = None
    for i, (panel, region) in enumerate(zip(axes.flat, regions)):
        grid = np.full((len(blocks), len(types)), np.nan)
        for cell in of_region[region][["block", "layer_type", "delta"]].itertuples(index=False):
            # several matrices of one type in a block (experts): the one that moves the metric most
            at = row_of[int(cell.block)], column_of[cell.layer_type]
            if np.isnan(grid[at]) or abs(cell.delta) > abs(grid[at]):
                grid[at] = cell.delta
        image = panel.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        panel.set_title("\n".join(textwrap.wrap(region, max(14, 6 * len(types)))), fontsize="medium")
        under = i + columns >= len(regions)
        names = types if under else [""] * len(types)
        panel.set_xticks(range(len(types)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        step = math.ceil(len(blocks) / 20)
        numbers = blocks[::step] if i % columns == 0 else [""] * len(blocks[::step])
        panel.set_yticks(range(0, len(blocks), step), numbers, fontsize="small")
        if i % columns == 0:
            panel.set_ylabel("block")
        if grid.size <= 40:
            _annotate(panel, grid, colours, norm)
    for panel in list(axes.flat)[len(regions) :]:
        panel.set_axis_off()
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.02, aspect=30)
    bar.set_label("delta against the baseline (blue is better)")
    more = f" ({len(regions)} of {len(regions) + dropped} regions)" if dropped else ""
    figure.suptitle(f"{one.task}: {one.metric}{more}")
    _save(figure, path)
    return regions


def has_heat_map(one: Measured) -> bool:
    """Whether the cells are single matrices and have deltas."""
    cells = one.cells[one.cells["delta"].notna()]
    return len(cells) > 0 and bool((cells["target_kind"] == "matrix").all())


def _series(cells) -> list[tuple[str, object]]:
    if (cells["target_kind"] == "block").all():
        return [(f"block {int(block)}", rows) for block, rows in cells.groupby("block", sort=True)]
    by_type = cells["layer_type"].notna()
    groups = sorted(cells[by_type].groupby("layer_type"), key=lambda item: layer_key(item[0]))
    return [*groups, *cells[~by_type].groupby("target", sort=True)]


def _tick(region: str, cells) -> str:
    """Deciles are labelled by their interval only."""
    by = cells.loc[cells["region"] == region, "region_by"].iloc[0]
    return region.split("(")[-1].rstrip(")") if by == "decile" else region


def _heat_map_regions(cells) -> tuple[list[str], int]:
    regions = region_order(cells)
    if len(regions) <= MAX_PANELS:
        return regions, 0
    strongest = set(cells["delta"].abs().groupby(cells["region"]).mean().nlargest(MAX_PANELS).index)
    return [region for region in regions if region in strongest], len(regions) - MAX_PANELS


def _centred_norm(deltas):
    import numpy as np
    from matplotlib.colors import Normalize, SymLogNorm

    sizes = np.abs(deltas[deltas != 0])
    if not len(sizes):
        return Normalize(-1, 1), "neither"
    top, middle = float(np.quantile(sizes, 0.99)), float(np.median(sizes))
    extend = "both" if sizes.max() > top * 1.0001 else "neither"
    if top / middle > LOG_SPAN:
        return SymLogNorm(linthresh=middle, vmin=-top, vmax=top), extend
    return Normalize(-top, top), extend


def _annotate(panel, grid, colours, norm) -> None:
    import numpy as np

    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _colour_map(name: str):
    from matplotlib import colormaps

    return colormaps[name]


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Saving would lay the figure out twice, which is most of the time that many panels take.
    figure.set_dpi(DPI)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=DPI, format="png", pil_kwargs={"compress_level": 3})
