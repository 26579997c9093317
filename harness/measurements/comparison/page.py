"""The page of a comparison, index.html: what each ablation does to either model, and the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.measurements.comparison.figures import LEVEL, Order, Row, half_width, order_of, region_tick
from harness.measurements.comparison.tables import TABLES
from harness.tables.charts import Axes, Grid, Points, heat_map, interval_points
from harness.tables.labels import region_words
from harness.tables.page import Chart, Page, Section, View, frame_table

if TYPE_CHECKING:
    import pandas

SHOWN = ("model_b", "target", "region", "value_a", "delta_a", "value_b", "delta_b", "difference", "low", "high",
         "p_value", "p_holm")  # fmt: skip
REMOVED = "removed part of the spectrum (0 = largest singular value)"


def page_of(
    title: str, summary: Sequence[str], groups: Mapping[tuple[str, str], Sequence[Row]], metrics: pandas.DataFrame
) -> Page:
    """Return the page of a comparison.

    summary: its sentences. groups: (task, metric) -> the rows of the table `compare`. metrics: the table of the first
    study, which has the order of the labels.
    """
    sections = [_section(task, metric, rows, metrics) for (task, metric), rows in groups.items() if rows]
    headline, *others = [line.strip() for line in summary if line.strip()]
    return Page(title, headline, [Section("What was found", others), *sections])


def _section(task: str, metric: str, rows: Sequence[Row], metrics: pandas.DataFrame) -> Section:
    import pandas

    halves = [half_width(row["difference_stderr"], row["freedom"]) for row in rows]
    frame = pandas.DataFrame(rows).assign(
        region=[region_words(row["region"]) for row in rows],
        low=[row["difference"] - half for row, half in zip(rows, halves)],
        high=[row["difference"] + half for row, half in zip(rows, halves)],
    )  # fmt: skip
    help_of = {column.name: column.doc for column in TABLES["compare"].columns}
    help_of |= {"low": "Lower end of the paired 95 % interval of the difference.", "high": "Its upper end."}
    table = frame_table("All pairs", frame, help_of, SHOWN)
    number = {id(row): i for i, row in enumerate(rows)}
    cells = [row for row in rows if row["target"] not in ("baseline", "control")]
    if not cells:
        return Section(f"{task}: {metric}", tables=[table])
    order, sign = order_of(metrics, cells), -1 if rows[0]["higher_is_better"] else 1
    about = f"{rows[0]['model_a']} is a; {rows[0]['n']} examples. Up is worse."
    views = [_target(target, [row for row in cells if row["target"] == target], order, number)
             for target in order.targets]
    charts = [
        Chart("Damage to each model", f"{about} Bars are 95 % intervals, paired over the same examples.", views,
              "target", table),
        Chart("Difference of the damage", f"Red: the ablation hurts this model more than a; blue: it hurts a more. A"
              f" star marks p below {LEVEL} after Holm's correction.", [
                  _map(name, [row for row in cells if row["model_b"] == name], order, (sign, number))
                  for name in dict.fromkeys(row["model_b"] for row in cells)], "model", table),
    ]
    return Section(f"{task}: {metric}", charts=charts, tables=[table])


def _target(target: str, rows: Sequence[Row], order: Order, number: Mapping[int, int]) -> View:
    sign = -1 if rows[0]["higher_is_better"] else 1
    names = [(rows[0]["model_a"], "a", [row for row in rows if row["model_b"] == rows[0]["model_b"]])]
    names += [(name, "b", [row for row in rows if row["model_b"] == name])
              for name in dict.fromkeys(row["model_b"] for row in rows)]
    series = []
    for i, (name, side, of_model) in enumerate(names):
        shift = 0.5 * ((i + 0.5) / len(names) - 0.5)
        values = [sign * row[f"delta_{side}"] for row in of_model]
        halves = [half_width(row.get(f"delta_stderr_{side}"), row["freedom"]) for row in of_model]
        series.append(Points(name, [order.regions.index(row["region"]) + shift for row in of_model], values,
                             [value - half for value, half in zip(values, halves)],
                             [value + half for value, half in zip(values, halves)],
                             [number[id(row)] for row in of_model]))
    ticks = [region_tick(region) for region in order.regions]
    return interval_points(target, series, Axes(REMOVED, f"damage: change of {rows[0]['metric']}", ticks, 0.0))


def _map(name: str, rows: Sequence[Row], order: Order, shared: tuple[int, Mapping[int, int]]) -> View:
    sign, number = shared
    at: dict[tuple[str, str], Any] = {(row["target"], row["region"]): row for row in rows}
    lines = [[at.get((target, region)) for region in order.regions] for target in order.targets]
    grid = Grid(
        order.targets, [region_tick(region) for region in order.regions],
        [[None if row is None else sign * row["difference"] for row in line] for line in lines],
        [["*" if row is not None and row["p_holm"] is not None and row["p_holm"] < LEVEL else "" for row in line]
         for line in lines],
        [[None if row is None else number[id(row)] for row in line] for line in lines],
    )  # fmt: skip
    return heat_map(name, grid, "difference of the damage")
