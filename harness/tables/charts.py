"""The charts of the page of a report, in the JSON of plotly: heat maps, and points with intervals.

The colours are those of drawing.py, which people with any colour vision can distinguish. Texts that come from a run
are escaped here, because plotly knows some tags in its labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.tables.drawing import LOG_SPAN, SERIES_COLOURS
from harness.tables.page import View, chart_text
from harness.tables.text import is_missing, layer_key, shorten

if TYPE_CHECKING:
    import pandas

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
LONGEST_TICK = 34
# ColorBrewer's RdBu, as matplotlib has it; plotly has another of that name.
RED_BLUE = ("#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3",
            "#2166ac", "#053061")  # fmt: skip
MOST_NUMBERS = 130  # a heat map with at most so many cells shows its values as numbers


@dataclass(frozen=True)
class Grid:
    """The values of a heat map, by row and column; None where there is none.

    marks: stars or other signs after the numbers. opens: rows of a table, which the pointer shows; without them it
    shows the value.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    marks: Sequence[Sequence[str]] = ()
    opens: Sequence[Sequence[int | None]] = ()


@dataclass(frozen=True)
class Points:
    """A series of points. at: their places on the x axis. low, high: the ends of their bars, None without a bar.

    opens: rows of a table, which the pointer shows; without them it shows the value. lines: the first and the last
    index of the points that a line joins, because they are in an order.
    """

    name: str
    at: Sequence[float]
    values: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    opens: Sequence[int | None] = ()
    lines: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Axes:
    """The names of both axes. ticks: the labels of the places 0, 1, ... of the x axis, or None for numbers.

    reference: the value at which a dashed line is drawn. log: whether the y axis is logarithmic.
    """

    x: str
    y: str
    ticks: Sequence[str] | None = None
    reference: float | None = None
    log: bool = False


def heat_map(label: str, grid: Grid, unit: str, centred: bool = True, blue_is_high: bool = False) -> View:
    """Return a heat map with the first row at the top.

    unit: the title of the colour bar. centred: colours diverge from zero; else they grow from zero. The colours end at
    the 99th percentile of the sizes, and are on the scale of asinh if the sizes span orders of magnitude.
    """
    sizes = sorted(abs(one) for line in grid.values for one in line if not is_missing(one) and one)
    top = sizes[min(len(sizes) - 1, math.ceil(0.99 * (len(sizes) - 1)))] if sizes else 1.0
    middle = sizes[len(sizes) // 2] if sizes else 1.0
    bent = top > LOG_SPAN * middle

    def place(value: float | None) -> float | None:
        return None if is_missing(value) else math.asinh(value / middle) if bent else value  # type: ignore[operator]

    few = len(grid.rows) * len(grid.columns) <= MOST_NUMBERS
    marks = grid.marks or [[""] * len(grid.columns)] * len(grid.rows)
    decimals = min(4, max(0, 1 - math.floor(math.log10(middle))))  # the same in all cells
    texts = [["" if is_missing(value) else f"{value:.{decimals}f}{mark}" for value, mark in zip(line, signs)]
             for line, signs in zip(grid.values, marks)]
    decades = range(math.ceil(math.log10(middle)), math.floor(math.log10(top)) + 1)
    ticks = [sign * 10.0**k for k in decades for sign in (-1, 1)]
    shown = [0.0, *ticks] if bent else None
    bar: dict[str, Any] = {"title": {"text": chart_text(unit), "side": "right"}, "thickness": 14}
    if shown is not None:
        bar |= {"tickvals": [place(one) for one in shown], "ticktext": [short_number(one) for one in shown]}
    trace = {
        "type": "heatmap", "z": [[place(value) for value in line] for line in grid.values],
        "x": list(range(len(grid.columns))), "y": list(range(len(grid.rows))),
        **({"text": texts, "texttemplate": "%{text}", "textfont": {"size": 11}} if few else {}),
        "hoverongaps": False, "xgap": 1, "ygap": 1,
        "hoverinfo": "text", "hovertext": [
            [f"{chart_text(grid.rows[y])}, {chart_text(grid.columns[x])}: {short_number(value)}"
             for x, value in enumerate(line)] for y, line in enumerate(grid.values)] if not grid.opens else [],
        "colorscale": [[i / 10, colour] for i, colour in enumerate(RED_BLUE)] if centred else "Cividis",
        "reversescale": centred and not blue_is_high,
        "zmin": -place(top) if centred else 0, "zmax": place(top), "colorbar": bar,  # type: ignore[operator]
    }
    if grid.opens:
        trace["customdata"] = [list(line) for line in grid.opens]
    traces = [trace]
    starred = [(x, y) for y, line in enumerate(marks) for x, mark in enumerate(line) if mark] if not few else []
    if starred:  # signs of their own are drawn faster than texts
        traces.append({"type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False,
                       "x": [x for x, _ in starred], "y": [y for _, y in starred],
                       "marker": {"symbol": "star", "size": 5, "color": "#222"}})
    height = 130 + max(230, min(900, (34 if len(grid.rows) < 16 else 20) * len(grid.rows)))
    return View(label, traces, {
        "height": height, "margin": {"t": 20, "r": 10, "l": 60, "b": 60},
        "xaxis": _ticks(grid.columns) | {"showgrid": False, "zeroline": False},
        "yaxis": _ticks(grid.rows) | {"autorange": "reversed", "showgrid": False, "zeroline": False},
    })


def interval_points(label: str, series: Sequence[Points], axes: Axes) -> View:
    """Return points with bars, one series beside the other."""
    traces = []
    for i, one in enumerate(series):
        colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
        trace: dict[str, Any] = {
            "type": "scatter", "mode": "markers", "name": chart_text(one.name), "x": list(one.at),
            "y": list(one.values), "hoverinfo": "text+name" if not one.opens else "text", "legendgroup": str(i),
            "marker": {"color": colour, "size": 8, "symbol": SYMBOLS[i % len(SYMBOLS)]},
        }
        if one.opens:
            trace["customdata"] = list(one.opens)
        else:
            trace["hovertext"] = [short_number(value) for value in one.values]
        if one.low:
            ends = [(0.0, 0.0) if is_missing(low) or is_missing(high) or is_missing(value) else
                    (value - low, high - value)  # type: ignore[operator]
                    for value, low, high in zip(one.values, one.low, one.high)]
            trace["error_y"] = {"type": "data", "symmetric": False, "color": colour, "thickness": 1.3, "width": 3,
                                "array": [up for _, up in ends], "arrayminus": [down for down, _ in ends]}
        traces.append(trace)
        traces += [{"type": "scatter", "mode": "lines", "x": list(one.at[first : last + 1]), "hoverinfo": "skip",
                    "y": list(one.values[first : last + 1]), "line": {"color": colour, "width": 1.5},
                    "legendgroup": str(i), "showlegend": False} for first, last in one.lines]
    x = {"title": {"text": chart_text(axes.x)}, "zeroline": False, "gridcolor": "#eef1f4"}
    if axes.ticks is not None:
        x |= _ticks(axes.ticks) | {"range": [-0.6, len(axes.ticks) - 0.4]}
    y: dict[str, Any] = {"title": {"text": chart_text(axes.y)}, "zeroline": False, "gridcolor": "#e6eaee",
                         "automargin": True}
    if axes.log:
        y |= {"type": "log", "dtick": "D2", "exponentformat": "none"}
    lines = [] if axes.reference is None else [{
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": axes.reference, "y1": axes.reference,
        "line": {"dash": "dash", "width": 1.2, "color": "#444"}}]
    return View(label, traces, {
        "height": 470, "margin": {"t": 20, "r": 10, "l": 70, "b": 60}, "xaxis": x, "yaxis": y, "shapes": lines,
        "hovermode": "closest", "showlegend": len(series) > 1, "legend": {"font": {"size": 12}},
    })


def block_maps(rows: pandas.DataFrame, columns: Mapping[str, str]) -> list[View]:
    """Return a heat map over blocks and layer types for each column that has values; experts of a block are averaged.

    rows: with the columns block and layer_type. columns: column -> the title of its colour bar.
    """
    blocks, types = sorted(set(rows["block"])), sorted(set(rows["layer_type"]), key=layer_key)
    views = []
    for column, unit in columns.items():
        if column in rows and rows[column].notna().any():
            table = rows.assign(**{column: rows[column].astype(float)}).pivot_table(
                index="block", columns="layer_type", values=column, aggfunc="mean")
            values = table.reindex(index=blocks, columns=types).to_numpy(float).tolist()
            views.append(heat_map(unit, Grid([str(int(b)) for b in blocks], types, values), unit, centred=False))
    return views


def short_number(value: float | None) -> str:
    """Return a number with three digits, for the cells of heat maps and for what the pointer shows."""
    if value is None or is_missing(value):
        return "–"
    size = abs(value)
    return "0" if value == 0 else f"{value:.0f}" if 100 <= size < 1e5 else f"{value:.3g}"


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    step = math.ceil(len(labels) / 40)
    places = list(range(0, len(labels), step))
    return {"tickmode": "array", "tickvals": places, "automargin": True,
            "ticktext": [chart_text(shorten(labels[i], LONGEST_TICK)) for i in places]}
