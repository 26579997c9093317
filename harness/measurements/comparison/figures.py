"""The figures of a comparison: the damage of each ablation to each model, and the differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measurements.ablation.summary import region_order, target_order
from harness.tables.drawing import MARKERS, SERIES_COLOURS, colour_map, new_figure, save_figure, wrapped
from harness.tables.labels import region_words
from harness.tables.text import figure_text, is_missing, shorten

if TYPE_CHECKING:
    import pandas

MAX_PANELS = 5  # targets in one figure of damage
MAX_TARGET_TICKS = 48
MAX_PAIRS = 4
LEVEL = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Order:
    """The labels of the targets and regions that were compared, in the order of the report of a study."""

    targets: list[str]
    regions: list[str]


def order_of(metrics: pandas.DataFrame, rows: Sequence[Row]) -> Order:
    """Return the order of the labels in `rows`. metrics: the table of a study that has them all."""
    targets, regions = {row["target"] for row in rows}, {row["region"] for row in rows}
    return Order([one for one in target_order(metrics[metrics["target"].isin(targets)]) if one in targets],
                 [one for one in region_order(metrics[metrics["region"].isin(regions)]) if one in regions])


def damage_figure(rows: Sequence[Row], order: Order, path: Path) -> None:
    """Save a figure with a column of two panels for each target: the damage to each model, and the differences.

    Bars are paired 95 % intervals of Student's t; up is worse. Lines join deciles alone. With more than
    five targets those with the largest difference relative to its error are drawn.
    """
    targets = _most_different(rows, order.targets)
    names = list(dict.fromkeys([rows[0]["model_a"], *(row["model_b"] for row in rows)]))
    figure = new_figure(min(16.0, max(7.4, 4.2 + max(1.15, 0.42 * len(order.regions)) * len(targets))), 6.4)
    axes = figure.subplots(2, len(targets), sharex=True, sharey="row", squeeze=False)
    sign = -1 if rows[0]["higher_is_better"] else 1
    for column, target in enumerate(targets):
        of_target = [row for row in rows if row["target"] == target]
        for i, name in enumerate(names):
            side = "a" if i == 0 else "b"
            of_model = of_target if i == 0 else [row for row in of_target if row["model_b"] == name]
            shift = 0.3 * ((i + 0.5) / len(names) - 0.5)
            style = {"color": SERIES_COLOURS[i % len(SERIES_COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            by_region = {row["region"]: row for row in of_model}
            at = sorted((order.regions.index(region), region) for region in by_region)
            x = [place + shift for place, _ in at]
            y = [sign * by_region[region][f"delta_{side}"] for _, region in at]
            errors = [half_width(by_region[region][f"delta_stderr_{side}"], by_region[region]["freedom"])
                      for _, region in at]
            label = figure_text(shorten(name, 32))
            style["linestyle"] = "-" if all(region.startswith("decile ") for region in order.regions) else "none"
            axes[0, column].errorbar(x, y, errors, label=label, linewidth=1.2, markersize=4, capsize=2, **style)
            if side == "b":
                y = [sign * by_region[region]["difference"] for _, region in at]
                errors = [half_width(by_region[region]["difference_stderr"], by_region[region]["freedom"])
                          for _, region in at]
                axes[1, column].errorbar(x, y, errors, label=label, linewidth=1.2, markersize=4, capsize=2, **style)
        for panel in axes[:, column]:
            panel.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
            panel.grid(axis="y", color="0.92", linewidth=0.8)
        axes[0, column].set_title(figure_text(shorten(target, 24)), fontsize="small")
        ticks = [figure_text(shorten(region_tick(region), 24)) for region in order.regions]
        axes[1, column].set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor",
                                   fontsize="small")
    first = rows[0]
    for row in axes:
        values = [abs(y) for panel in row for line in panel.lines for y in line.get_ydata() if math.isfinite(y) and y]
        if values and max(values) > 30 * sorted(values)[len(values) // 2]:
            row[0].set_yscale("symlog", linthresh=sorted(values)[len(values) // 2])
    metric = figure_text(shorten(first["metric"], 24))
    axes[0, 0].set_ylabel(f"damage: change of {metric}\n(up is worse; 95 % intervals)", fontsize="small")
    against = figure_text(shorten(first["model_a"], 24))
    axes[1, 0].set_ylabel(f"damage minus that to\n{against} (95 % interval)", fontsize="small")
    more = f" ({len(targets)} of {len(order.targets)} targets, the largest differences)"
    title = f"{first['task']}: {first['metric']}" + more * (len(targets) < len(order.targets))
    figure.suptitle(wrapped(figure, figure_text(title)), fontsize="medium")
    figure.supxlabel("removed part of the spectrum (0 = largest singular value)", fontsize="medium")
    handles = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize="small")
    save_figure(figure, path)


def heat_map_figure(rows: Sequence[Row], order: Order, path: Path) -> None:
    """Save a heat map of the difference of the damage, targets by regions, with a panel for each pair of models.

    Red: the ablation hurts b more; blue: it hurts a more. A dot marks differences with p below 0.05 after Holm's
    correction; grey means that there is no such pair of cells.
    """
    import numpy as np
    from matplotlib.colors import Normalize

    pairs = list(dict.fromkeys(row["model_b"] for row in rows))
    shown = pairs[:MAX_PAIRS]
    width = 1.6 + max(2.2, 0.42 * len(order.regions)) * len(shown)
    figure = new_figure(min(18.0, width + 1.2), min(12.0, max(3.8, 1.6 + 0.24 * len(order.targets))))
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    sign = -1 if rows[0]["higher_is_better"] else 1
    sizes = np.abs([row["difference"] for row in rows])
    top = float(np.quantile(sizes, 0.98)) or float(sizes.max()) or 1.0
    norm, colours = Normalize(-top, top), colour_map("RdBu_r").with_extremes(bad="0.8")
    image = None
    for panel, name in zip(axes, shown):
        grid = np.full((len(order.targets), len(order.regions)), np.nan)
        for row in rows:
            if row["model_b"] == name:
                at = order.targets.index(row["target"]), order.regions.index(row["region"])
                grid[at] = sign * row["difference"]
                if not is_missing(row["p_holm"]) and row["p_holm"] < LEVEL:
                    panel.plot(at[1], at[0], "o", color="black", markeredgecolor="white", markersize=5)
        image = panel.imshow(grid, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        panel.set_title(figure_text(shorten(name, 36)), fontsize="medium")
        ticks = [figure_text(shorten(region_tick(region), 24)) for region in order.regions]
        panel.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
    step = math.ceil(len(order.targets) / MAX_TARGET_TICKS)
    labels = [figure_text(shorten(target, 28)) for target in order.targets[::step]]
    axes[0].set_yticks(range(0, len(order.targets), step), labels, fontsize="small")
    assert image is not None  # there is at least one pair
    extend = "both" if sizes.max() > top * 1.0001 else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30, extend=extend)
    bar.set_label("difference of the damage\n(red: hurts this model more; dot: p < 0.05, Holm)", fontsize="small")
    more = f" ({len(shown)} of {len(pairs)} models)" if len(shown) < len(pairs) else ""
    first = rows[0]
    against = f"damage minus that to {shorten(first['model_a'], 28)}"
    title = figure_text(f"{first['task']}: {first['metric']}, {against}{more}")
    figure.suptitle(wrapped(figure, title), fontsize="medium")
    save_figure(figure, path)


def _most_different(rows: Sequence[Row], targets: list[str]) -> list[str]:
    if len(targets) <= MAX_PANELS:
        return targets
    largest = dict.fromkeys(targets, 0.0)
    for row in rows:
        error = _or_zero(row["difference_stderr"])
        size = abs(row["difference"]) / error if error else 0.0
        largest[row["target"]] = max(largest[row["target"]], size)
    chosen = sorted(targets, key=lambda target: -largest[target])[:MAX_PANELS]
    return [target for target in targets if target in chosen]


def half_width(error: float | None, freedom: float | None) -> float:
    """Return half the width of the 95 % interval of Student's t, or 0 without a standard error."""
    if error is None or is_missing(error) or freedom is None or is_missing(freedom):
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.975, freedom) * error)


def _or_zero(value: float | None) -> float:
    return 0.0 if value is None or is_missing(value) else float(value)


def region_tick(region: str) -> str:
    """Return the label of a region on an axis, which for a decile is only its interval."""
    words = region_words(region)
    return words.split("(")[-1].rstrip(")") if region.startswith("decile ") else words
