"""Figures of spectra: histograms with the Marchenko-Pastur density, overlaps, and counts of outliers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from harness.tables.drawing import MARKERS, SERIES_COLOURS, colour_map, new_figure, save_figure
from harness.tables.text import figure_text, layer_key

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from numpy.typing import ArrayLike

BULK, ABOVE, BELOW = SERIES_COLOURS[5], SERIES_COLOURS[1], SERIES_COLOURS[2]
MAX_BLOCK_ROWS = 4  # of more blocks, so many are drawn: the first, the last and evenly spaced ones between them
HISTOGRAM_REACH = 2.0  # a histogram ends at so many times the upper edge; its last bar counts all larger values
N_BINS = 48
ANNOTATED_CELLS = 84  # heat maps with at most so many cells show the counts as numbers
LEAST_SCALE = 2.0  # the colours of a heat map end at this percentage of the singular values, or at a larger one


def marchenko_pastur_density(values: ArrayLike, noise: float, shape: tuple[int, int]) -> np.ndarray:
    """Return the Marchenko-Pastur density of the singular values of a random matrix with independent entries.

    It is sqrt((y^2 - a^2) (b^2 - y^2)) / (pi q y s) with y = values / s, s = noise sqrt(max(shape)),
    q = min(shape) / max(shape), a = 1 - sqrt(q), b = 1 + sqrt(q), and 0 outside of the edges.

    values: in the units of the weights. noise: the standard deviation of the entries. Returns float64 of the shape of
    `values`.
    """
    import numpy as np

    unit, aspect = noise * math.sqrt(max(shape)), min(shape) / max(shape)
    y = np.asarray(values, dtype=float) / unit
    low, high = 1 - math.sqrt(aspect), 1 + math.sqrt(aspect)
    inside = (y > low) & (y < high)
    safe = np.where(inside, y, 1.0)
    root = np.sqrt(np.clip((safe**2 - low**2) * (high**2 - safe**2), 0, None))
    return np.where(inside, root / (math.pi * aspect * safe * unit), 0.0)


def spectrum_figure(matrices: pandas.DataFrame, values: pandas.DataFrame, path: Path | None, title: str) -> Figure:
    """Return histograms of the singular values of single matrices with the Marchenko-Pastur density and its edges.

    matrices, values: the rows of one set of weights. The rows of panels are up to 4 blocks, the columns layer types.
    path: a PNG file in which the figure is saved too.
    """
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.patches import StepPatch

    grid = _panels(matrices)
    figure, axes = _panel_figure(grid)
    of_matrix = dict(list(values.groupby("matrix")))
    for panel, matrix in _filled(axes, grid):
        sigma = of_matrix[matrix.matrix]["sigma"].to_numpy(float)
        shape, upper = (int(matrix.n_out), int(matrix.n_in)), float(matrix.edge_upper)
        reach = min(float(sigma.max()), HISTOGRAM_REACH * upper) * 1.03 if upper > 0 else 1.0
        edges = np.linspace(0, max(reach, 1.1 * upper), N_BINS + 1)
        position = of_matrix[matrix.matrix]["position"].to_numpy()
        weight = 1 / (len(sigma) * (edges[1] - edges[0]))
        below = np.zeros(N_BINS)
        for name, colour in (("inside", BULK), ("above", ABOVE), ("below", BELOW)):
            counts, _ = np.histogram(np.minimum(sigma[position == name], edges[-1]), edges)
            # One patch for all bars, because a histogram of matplotlib has one for each. The methods of axes would also
            # look for the limits of each artist, which takes most of the time and is known here.
            heights = below + weight * counts
            panel.add_artist(StepPatch(heights, edges, baseline=cast(Any, below), linewidth=0, color=colour))
            below = heights
        at, top = np.linspace(0, edges[-1], 600), below.max()
        if matrix.noise > 0:
            density = marchenko_pastur_density(at, matrix.noise, shape)
            panel.add_artist(Line2D(at, density, color="black", linewidth=1.1))
            top = max(top, density.max())
        lower, upper = matrix.edge_lower, matrix.edge_upper
        panel.add_artist(Line2D([lower, lower, math.nan, upper, upper], [0, 1, math.nan, 0, 1], color="0.35",
                                linestyle="--", linewidth=0.8, transform=panel.get_xaxis_transform()))
        beyond = int((sigma > edges[-1]).sum())
        note = f"{int(matrix.n_above)} above, {int(matrix.n_below)} below"
        if beyond:
            note += f"\nlast bar: {beyond} up to {sigma.max():.3g}"
        panel.set_title(note, fontsize=7)
        panel.set_yticks([])
        panel.tick_params(labelsize=7)
        panel.set_xlim(0, edges[-1])
        panel.set_ylim(0, 1.05 * top)
    handles = {
        "inside the edges": _patch(BULK), "above": _patch(ABOVE), "below": _patch(BELOW),
        "Marchenko-Pastur density": _line("black", "-"), "its edges": _line("0.35", "--"),
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    _name_x_axis(axes, "singular value")
    figure.suptitle(title)
    if path is not None:
        save_figure(figure, path)
    return figure


def overlap_figure(matrices: pandas.DataFrame, vectors: pandas.DataFrame, path: Path, title: str) -> None:
    """Save a figure of the overlap of each input vector against the position of its singular value, as PNG.

    The grey band is that of random vectors (3 sigma), and dashed lines mark the edges of the bulk. The rows of panels
    are up to 4 blocks, the columns layer types. matrices, vectors: the rows of one set of weights.
    """
    matrices = matrices[matrices["overlap_null_mean"].notna()]
    grid = _panels(matrices)
    figure, axes = _panel_figure(grid)
    wanted = vectors[vectors["side"] == "input"]
    of_matrix = dict(list(wanted.groupby("matrix")))
    for panel, matrix in _filled(axes, grid):
        rows = of_matrix[matrix.matrix]
        band = 3 * matrix.overlap_null_std
        panel.axhspan(
            max(0.0, matrix.overlap_null_mean - band), matrix.overlap_null_mean + band, color="0.85", linewidth=0
        )
        panel.plot(rows["index"], rows["overlap"], "o", markersize=1.8, color=SERIES_COLOURS[0])
        for edge in (matrix.n_above, matrix["rank"] - matrix.n_below):
            panel.axvline(edge - 0.5, color="0.35", linestyle="--", linewidth=0.8)
        panel.set_title(f"{int(matrix.n_overlapping)} of {int(matrix['rank'])} above the band", fontsize=7)
        panel.tick_params(labelsize=7)
        panel.set_ylim(0, 1)
        panel.set_xlim(-0.02 * matrix["rank"], 1.02 * matrix["rank"])
    handles = {
        "overlap": _line(SERIES_COLOURS[0], "none", "o"), "3-sigma band of random vectors": _patch("0.85"),
        "edges of the bulk": _line("0.35", "--"),
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    _name_x_axis(axes, "position of the singular value, 0 = the largest")
    figure.suptitle(title)
    save_figure(figure, path)


def outlier_figure(matrices: pandas.DataFrame, path: Path, title: str) -> None:
    """Save heat maps over blocks and layer types of the singular values above and below the bulk, as PNG.

    The colour is their share of the rank, the number is their count. Numbers are left out of large heat maps. The
    experts of a block are averaged. Grey means that there is no such matrix.
    """
    import numpy as np

    blocks = sorted({int(block) for block in matrices["block"]})
    types = sorted(set(matrices["layer_type"]), key=layer_key)
    grids = []
    for column in ("n_above", "n_below"):
        tables = [matrices.pivot_table(index="block", columns="layer_type", values=name, aggfunc="mean")
                  for name in (column, "rank")]
        grids.append([table.reindex(index=blocks, columns=types).to_numpy(float) for table in tables])
    height = 1.6 + min(9.0, max(1.2, 0.3 * len(blocks)))
    figure = new_figure(max(6.4, 2.2 + 1.1 * len(types)), height)
    axes = figure.subplots(1, 2, squeeze=False)[0]
    for panel, name, (counts, ranks) in zip(axes, ("above the bulk", "below the bulk"), grids):
        shares = 100 * counts / ranks
        colours = colour_map("cividis").with_extremes(bad="0.8")
        # One or two values outside of the bulk are normal for noise, and must not look like many.
        image = panel.imshow(shares, cmap=colours, vmin=0, vmax=max(np.nanmax(shares), LEAST_SCALE), aspect="auto",
                             interpolation="nearest")
        panel.set_title(name, fontsize="medium")
        panel.set_xticks(range(len(types)), types, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        step = math.ceil(len(blocks) / 20)
        panel.set_yticks(range(0, len(blocks), step), blocks[::step], fontsize="small")
        if counts.size <= ANNOTATED_CELLS:
            _write_counts(panel, image, counts, shares)
        bar = figure.colorbar(image, ax=panel, pad=0.02)
        bar.set_label("% of the singular values", fontsize="small")
        bar.ax.tick_params(labelsize="small")
    axes[0].set_ylabel("block")
    figure.suptitle(title)
    save_figure(figure, path)


def checkpoint_figure(matrices: pandas.DataFrame, path: Path, title: str) -> None:
    """Save a figure of the share of singular values above and below the bulk against the checkpoint, as PNG.

    There is a line for each layer type, which is the mean over blocks.
    """
    trained = matrices[(matrices["init"] == "trained") & matrices["checkpoint_index"].notna()]
    order = trained.drop_duplicates("checkpoint_index").sort_values("checkpoint_index")["checkpoint"].tolist()
    types = sorted(set(trained["layer_type"]), key=layer_key)
    figure = new_figure(max(7.0, 3.0 + 0.9 * len(order)), 4.2)
    axes = figure.subplots(1, 2, sharex=True)
    for panel, column, name in zip(axes, ("n_above", "n_below"), ("above the bulk", "below the bulk")):
        for i, layer_type in enumerate(types):
            rows = trained[trained["layer_type"] == layer_type]
            share = (100 * rows[column] / rows["rank"]).groupby(rows["checkpoint"]).mean().reindex(order)
            panel.plot(range(len(order)), share, marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.3,
                       color=SERIES_COLOURS[i % len(SERIES_COLOURS)], label=layer_type)
        names = [figure_text(one) for one in order]
        panel.set_xticks(range(len(order)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        panel.set_title(name, fontsize="medium")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="0.92", linewidth=0.8)
    axes[0].set_ylabel("% of the singular values, mean over blocks")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def _write_counts(panel: Axes, image: AxesImage, counts: np.ndarray, shares: np.ndarray) -> None:
    import numpy as np

    for (y, x), count in np.ndenumerate(counts):
        if not np.isnan(count):
            red, green, blue, _ = image.cmap(image.norm(shares[y, x]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            # They are inside the panel, so that the layout needs not measure them.
            panel.text(x, y, f"{count:g}", ha="center", va="center", fontsize=7, color="white" if dark else "black",
                       in_layout=False)


def _panels(matrices: pandas.DataFrame) -> list[list[Any]]:
    """Return a grid of rows of `matrices`: a list for each of up to 4 blocks, with a row or None for each layer type.

    Of several experts the first is taken.
    """
    blocks = sorted({int(block) for block in matrices["block"]})
    if len(blocks) > MAX_BLOCK_ROWS:
        last = len(blocks) - 1
        blocks = [blocks[round(i * last / (MAX_BLOCK_ROWS - 1))] for i in range(MAX_BLOCK_ROWS)]
    types = sorted(set(matrices["layer_type"]), key=layer_key)
    first: dict[tuple[int, str], Any] = {}
    for _, row in matrices.iterrows():
        first.setdefault((int(row["block"]), row["layer_type"]), row)
    return [[first.get((block, layer_type)) for layer_type in types] for block in blocks]


def _panel_figure(grid: list[list[Any]]) -> tuple[Figure, np.ndarray]:
    rows, columns = len(grid), len(grid[0])
    figure = new_figure(max(6.4, 0.8 + 1.75 * columns), 1.5 + 1.55 * rows)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _filled(axes: np.ndarray, grid: list[list[Any]]) -> Iterator[tuple[Axes, Any]]:
    """Yield the axes and the row of `matrices` of each panel that has one. Label the margins and blank the others."""
    for y, (line, matrices) in enumerate(zip(axes, grid)):
        for x, (panel, matrix) in enumerate(zip(line, matrices)):
            if matrix is None:
                panel.set_axis_off()
                continue
            yield panel, matrix
            if y == 0:
                panel.set_title(f"{matrix.layer_type}\n{panel.get_title()}", fontsize=7)
            if x == 0:
                panel.set_ylabel(f"block {int(matrix.block)}", fontsize="small")


def _name_x_axis(axes: np.ndarray, name: str) -> None:
    """Label the x axis in the middle of the last row, because a label of the whole figure would overlap its legend."""
    axes[-1][(len(axes[-1]) - 1) // 2].set_xlabel(name, fontsize="small")


def _patch(colour: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _line(colour: str, style: Literal["-", "--", "none"], marker: str | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, linestyle=style, marker=marker, markersize=3)
