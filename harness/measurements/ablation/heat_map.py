"""Heat maps of a metric over blocks and layer types, one for each region. Blue is always better, and red is worse."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.measurements.ablation.effects import LEVEL
from harness.measurements.ablation.summary import MeasuredMetric, region_order
from harness.measurements.ablation.titles import figure_title
from harness.tables.drawing import LOG_SPAN, colour_map, figure_scale, new_figure, save_figure, wrapped
from harness.tables.frames import rows_of
from harness.tables.labels import region_words
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.image import AxesImage

MAX_PANELS = 10  # regions in a heat map; ten, because there are ten deciles


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
    figure.suptitle(wrapped(figure, figure_title(one, more)), fontsize="medium")
    save_figure(figure, path)
    return regions


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
            panel.text(x, y, text + "*" * bool(grid.sure[y, x]), ha="center", va="center", fontsize=6, in_layout=False,
                       color=grid.ink(value))
