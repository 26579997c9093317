"""Figures of a study: a metric against the removed region, and heat maps of blocks and layer types.

In the heat maps blue is always better and red worse.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.measurements.ablation.effects import LEVEL, Effects, effects
from harness.measurements.ablation.summary import MeasuredMetric, is_control, region_order
from harness.tables.drawing import (
    LOG_SPAN,
    MARKERS,
    SERIES_COLOURS,
    colour_map,
    figure_scale,
    new_figure,
    save_figure,
    wrapped,
)
from harness.tables.frames import groups_of, rows_of
from harness.tables.labels import model_name, region_words
from harness.tables.text import count, figure_text, is_missing, layer_key, shorten

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
    """Return a figure of the effect on one metric against the removed region.

    Effects are ratios of perplexities to that of the unablated model, and changes of other metrics. There is a series
    for each layer type, or for each block if the targets are blocks. Bars are 95 % intervals of the effect, paired over
    the same examples. Lines join regions that are in an order, such as deciles. A grey band holds the effects below the
    noise floor.
    If the targets are single matrices of up to 4 blocks, each block has a panel. With more blocks the lines are medians
    over the blocks; the matrices are shown as dots if there are at most 16, else bars show the range from 10 % to 90 %.

    one: its cells must not be empty. path: a PNG file in which the figure is saved too.
    """
    regions = region_order(one.cells)
    known = effects(one)
    found: Effects | None = known
    if known.rows["effect"].isna().all():  # without a baseline the values are drawn
        whole, found = one.cells.assign(effect=one.cells["value"], low=math.nan, high=math.nan), None
    else:
        whole = one.cells.join(known.rows)
    blocks = sorted(set(whole["block"].dropna()))
    by_block = bool((whole["target_kind"] == "matrix").all()) and 1 < len(blocks) <= MAX_BLOCK_PANELS
    if by_block:
        panels = [(f"block {int(block)}", whole[whole["block"] == block]) for block in blocks]
    else:
        panels = [("", whole)]
    series = by_series(whole)
    sequential = len(series) > len(SERIES_COLOURS)
    labels = [figure_text(tick(region, one.cells)) for region in regions]
    narrow = by_block and len(panels) > 2
    upright = max(map(len, labels)) <= 7 or len(labels) <= 6 and not narrow
    width = min(MAX_TICKS, len(regions)) * (0.4 if narrow else 0.62)
    figure = new_figure(min(15.0, max(6.8, 2.4 + width * len(panels))), 4.4 if upright else 5.2)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = {
        name: colour_map("viridis")(i / (len(series) - 1)) if sequential else SERIES_COLOURS[i]
        for i, (name, _) in enumerate(series)
    }
    markers = {name: "o" if sequential else MARKERS[i] for i, (name, _) in enumerate(series)}
    look = _Look(regions, is_control(one.cells), colours, markers)
    notes: dict[str, None] = {}
    for panel, (title, cells) in zip(axes, panels):
        notes |= _draw_series(panel, by_series(cells), look)
        if found is not None:
            panel.axhline(found.reference, color="0.25", linestyle="--", linewidth=1.1, label="baseline", zorder=1)
            if one.noise_floor and one.baseline is not None:
                floor = one.noise_floor / one.baseline["value"] if found.ratio else one.noise_floor
                ends = found.reference - floor, found.reference + floor
                panel.axhspan(*ends, color="0.5", alpha=0.2, linewidth=0, label="noise floor", zorder=0)
        _region_ticks(panel, labels, upright)
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    _log_axis(axes[0], whole["effect"].to_numpy(float))
    axes[0].set_ylabel(_effect_name(one, found))
    figure.supxlabel("removed part of the spectrum (0 = largest singular value)", fontsize="medium")
    bars = "" if notes or found is None or whole["low"].isna().all() else "; bars: paired 95 % intervals"
    figure.suptitle(wrapped(figure, _title(one, bars=bars)), fontsize="medium")
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
            by_region = rows.groupby("region")["effect"]
            values = by_region.median()
            if by_region.size().max() <= MAX_DOTS:
                notes["median over blocks"] = None
                axes.plot(x, rows["effect"], linestyle="none", markersize=3, alpha=0.35, zorder=2, **style)
            else:
                notes["median over blocks,\nbars: 10 % to 90 %"] = None
                low, high = values - by_region.quantile(0.1), by_region.quantile(0.9) - values
                middle = values.index.map(ordinal).to_numpy(float) + shift
                axes.errorbar(middle, values, (low, high), fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
        else:
            bars = [(rows["effect"] - rows["low"]).fillna(0).clip(lower=0),
                    (rows["high"] - rows["effect"]).fillna(0).clip(lower=0)]
            axes.errorbar(x, rows["effect"], bars, fmt="none", ecolor=colour, elinewidth=1, capsize=2)
            values = rows.set_index("region")["effect"]
        there = [region for region in look.regions if region in values.index]
        at = {region: ordinal[region] + shift for region in there}
        axes.plot(list(at.values()), values[there], linestyle="none", markersize=4.5 * figure_scale(), zorder=3,
                  label=figure_text(name), **style)
        for group in joined(rows, there):
            axes.plot([at[region] for region in group], values[group], color=colour, linewidth=1.3, zorder=3)
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


def _log_axis(axes: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic if the effects are positive, span more than a factor of 4 and are not mere shares.

    Perplexities may span many orders of magnitude.
    """
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = np.nanmin(values), np.nanmax(values)
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
    span orders of magnitude. Stars mark q < 0.05. Grey means that a matrix was not measured or failed, and hatching
    that its delta is below the noise floor. Targets must be single matrices.
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
    decimals = _decimals(cells["delta"].to_numpy(float))
    image: AxesImage | None = None
    for i, (panel, region) in enumerate(zip(axes.flat, regions)):
        grid = np.full((len(blocks), len(types)), np.nan)
        sure = np.zeros(grid.shape, bool)
        for cell in rows_of(of_region[region][["block", "layer_type", "delta", "q_value"]]):
            # A block may have several matrices of one type (experts). The one with the largest |delta| is shown.
            at = row_of[int(cell.block)], column_of[cell.layer_type]
            if np.isnan(grid[at]) or abs(cell.delta) > abs(grid[at]):
                grid[at], sure[at] = cell.delta, cell.q_value < LEVEL
        image = panel.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        if one.noise_floor:
            noise = np.ma.masked_where(~(np.abs(grid) < one.noise_floor), grid)
            edges = np.arange(len(types) + 1) - 0.5, np.arange(len(blocks) + 1) - 0.5
            panel.pcolor(*edges, noise, hatch="////", alpha=0)
        words = figure_text(region_words(region)).replace(" %", "\N{NO-BREAK SPACE}%")
        title = textwrap.wrap(words, max(14, 6 * len(types)))
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
        room = grid.size <= 40 and figure_scale() == 1.0  # narrower panels have no room for numbers
        _annotate(panel, _Grid(grid, sure, colours, norm), decimals if room else None)
    for panel in list(axes.flat)[len(regions) :]:
        panel.set_axis_off()
    assert image is not None  # there is at least one region
    bar = figure.colorbar(image, ax=axes, extend=extend, pad=0.02, aspect=30)
    hatched = "; hatched: below the noise floor" if one.noise_floor else ""
    bar.set_label(f"delta against the baseline (blue is better;\nstar: q < {LEVEL}{hatched})")
    more = f" ({len(regions)} of {len(regions) + dropped} regions)" if dropped else ""
    figure.suptitle(wrapped(figure, _title(one, more)), fontsize="medium")
    save_figure(figure, path)
    return regions


def joined(cells: pandas.DataFrame, regions: Sequence[str]) -> list[list[str]]:
    """Return the groups of neighbouring regions that a line may join, because their kind orders them: deciles, sizes.

    regions: labels in the order of `region_order`. Controls are in no order, and `above`, `inside` and `below` the bulk
    are of different kinds.
    """
    first = cells.drop_duplicates("region").set_index("region")

    def kind(region: str) -> tuple[Any, Any] | str:
        by, kind = first.at[region, "region_by"], first.at[region, "region_kind"]
        return region if is_missing(by) or by == "control" else (by, kind)

    groups = [list(group) for _, group in itertools.groupby(regions, kind)]
    return [group for group in groups if len(group) > 1]


def _title(one: MeasuredMetric, more: str = "", bars: str = "") -> str:
    return f"{figure_text(one.title + more)}\n{figure_text(f'{measured_on(one)}{bars}')}"


def measured_on(one: MeasuredMetric) -> str:
    """Return the model, the text or the data, and the number of examples, for titles and captions."""
    parts = [model_name(one.cells["model"].iloc[0], one.cells["gguf_file"].iloc[0])]
    if one.baseline is not None:
        parts += [name] if (name := _data_name(one.baseline["protocol"])) else []
        parts += [] if is_missing(one.baseline["n"]) else [count(int(one.baseline["n"]), "example")]
    return ", ".join(parts)


def _data_name(protocol: Any) -> str | None:
    data = json.loads(protocol).get("data") if isinstance(protocol, str) else None
    return shorten(data, 40) if isinstance(data, str) else None


def _effect_name(one: MeasuredMetric, found: Effects | None) -> str:
    metric = figure_text(one.metric)
    if found is None:
        return f"{metric} ({'higher' if one.higher_is_better else 'lower'} is better)"
    if found.ratio:
        return f"{metric} / that without ablation\n(below 1 is better)"
    return f"change of {metric}\n({'above' if one.higher_is_better else 'below'} 0 is better)"


def by_series(cells: pandas.DataFrame) -> list[tuple[str, pandas.DataFrame]]:
    """Return the rows of each series of a figure by its name: of each block, else of each layer type or target."""
    if (cells["target_kind"] == "block").all():
        return [(f"block {int(block)}", rows) for block, rows in groups_of(cells, "block")]
    by_type = cells["layer_type"].notna()
    groups = sorted(groups_of(cells[by_type], "layer_type"), key=lambda item: layer_key(item[0]))
    return [*groups, *groups_of(cells[~by_type], "target")]


def tick(region: str, cells: pandas.DataFrame) -> str:
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


def _decimals(deltas: np.ndarray) -> int:
    """Return the number of decimals with which all cells are written, so that the median has two digits."""
    import numpy as np

    sizes = np.abs(deltas[deltas != 0])
    return min(4, max(0, 1 - math.floor(math.log10(np.median(sizes))))) if len(sizes) else 0


@dataclass(frozen=True)
class _Grid:
    """One panel of a heat map: its deltas, which of them are sure, and the colours."""

    deltas: np.ndarray
    sure: np.ndarray
    colours: Colormap
    norm: Normalize

    def ink(self, delta: float) -> str:
        """Return the colour of writing that is seen on the colour of a delta."""
        red, green, blue, _ = self.colours(self.norm(delta))
        return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def _annotate(panel: Axes, grid: _Grid, decimals: int | None) -> None:
    """Write the deltas and stars into a panel; without a number of decimals stars alone."""
    import numpy as np

    if decimals is None:
        for ink in ("white", "black"):
            stars = [(x, y) for y, x in np.argwhere(grid.sure) if grid.ink(grid.deltas[y, x]) == ink]
            if stars:
                panel.plot(*zip(*stars), linestyle="none", marker="*", markersize=4, color=ink, markeredgewidth=0)
        return
    for (y, x), value in np.ndenumerate(grid.deltas):
        if not np.isnan(value):
            text = f"{value:+.{decimals}f}" if abs(value) >= 0.5 * 10**-decimals else "0"
            panel.text(x, y, text + "*" * bool(grid.sure[y, x]), ha="center", va="center", fontsize=6,
                       color=grid.ink(value))
