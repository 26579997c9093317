"""The figure of a metric against the removed region."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measurements.ablation.effects import Effects, effects
from harness.measurements.ablation.series import by_series, joined, region_kinds, tick
from harness.measurements.ablation.summary import MeasuredMetric, is_control, region_order
from harness.measurements.ablation.titles import figure_title
from harness.tables.drawing import (
    MARKERS,
    SERIES_COLOURS,
    colour_map,
    figure_scale,
    new_figure,
    save_figure,
    wrapped,
)
from harness.tables.text import figure_text

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    of_region = region_kinds(one.cells)
    labels = [figure_text(tick(region, of_region[region][0])) for region in regions]
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
            _draw_baseline(panel, one, found)
        _region_ticks(panel, labels, upright)
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    _log_axis(axes[0], whole["effect"].to_numpy(float))
    axes[0].set_ylabel(_effect_name(one, found))
    figure.supxlabel("removed part of the spectrum (0 = largest singular value)", fontsize="medium")
    bars = "" if notes or found is None or whole["low"].isna().all() else "; bars: paired 95 % intervals"
    figure.suptitle(wrapped(figure, figure_title(one, bars=bars)), fontsize="medium")
    if sequential:
        _block_bar(figure, axes, [name for name, _ in series])
    _draw_legend(figure, axes, notes, named=not sequential)
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
        for group in joined(region_kinds(rows), there):
            axes.plot([at[region] for region in group], values[group], color=colour, linewidth=1.3, zorder=3)
    first_control = next((i for i, region in enumerate(look.regions) if region in look.controls), None)
    if first_control:
        axes.axvline(first_control - 0.5, color="0.8", linewidth=0.8)
    return notes


def _draw_baseline(panel: Axes, one: MeasuredMetric, found: Effects) -> None:
    """Draw the line of the unablated model into a panel, and the band of the noise floor around it."""
    panel.axhline(found.reference, color="0.25", linestyle="--", linewidth=1.1, label="baseline", zorder=1)
    if one.noise_floor and one.baseline is not None:
        floor = one.noise_floor / one.baseline["value"] if found.ratio else one.noise_floor
        ends = found.reference - floor, found.reference + floor
        panel.axhspan(*ends, color="0.5", alpha=0.2, linewidth=0, label="noise floor", zorder=0)


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


def _effect_name(one: MeasuredMetric, found: Effects | None) -> str:
    metric = figure_text(one.metric)
    if found is None:
        return f"{metric} ({'higher' if one.higher_is_better else 'lower'} is better)"
    if found.ratio:
        return f"{metric} / that without ablation\n(below 1 is better)"
    return f"change of {metric}\n({'above' if one.higher_is_better else 'below'} 0 is better)"


def _block_bar(figure: Figure, axes: np.ndarray, names: list[str]) -> None:
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(0, len(names) - 1), colour_map("viridis")), ax=axes, pad=0.02)
    at = np.unique(np.linspace(0, len(names) - 1, 8).astype(int)).tolist()
    bar.set_ticks(at, labels=[names[i] for i in at])


def _draw_legend(figure: Figure, axes: Iterable[Axes], notes: Iterable[str], named: bool) -> None:
    """Draw one legend for all panels. notes: its heading. named: whether it names the series, too."""
    handles = {}
    for panel in axes:
        handles.update(
            {label: handle for handle, label in zip(*panel.get_legend_handles_labels()) if label not in handles}
        )
    if not named:  # the colour bar already names the series
        handles = {label: handle for label, handle in handles.items() if label in ("baseline", "noise floor")}
    if handles:
        heading = "\n".join(notes) or None
        figure.legend(
            handles.values(), handles, loc="outside right upper", frameon=False, fontsize="small", title=heading,
            title_fontsize="small",
        )  # fmt: skip
