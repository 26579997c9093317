"""The page of a search, report/index.html: each best cell beside its controls, all tables, and the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.measurements.ablation.page import study_sections
from harness.measurements.ablation.summary import measured
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.search.tables import TABLES
from harness.tables.charts import Axes, Points, interval_points
from harness.tables.frames import rows_of
from harness.tables.labels import region_words
from harness.tables.page import Chart, Page, PageTable, Section, View, frame_table
from harness.tables.text import is_missing

if TYPE_CHECKING:
    import pandas

SHOWN = ("task", "metric", "target", "region", "baseline", "value", "delta", "noise_floor", "p_holm", "verdict")


def page_of(
    grid: Path, said: Sequence[str], tables: Mapping[str, tuple[str, pandas.DataFrame]], problems: Sequence[str]
) -> Page:
    """Return the page of a search.

    grid: the folder of the study of the grid, which may be missing. said: one sentence for each metric. tables: the
    name of each table that is shown -> its title and rows. problems: lines that a reader must see.
    """
    sections = [_section(name, title, rows) for name, (title, rows) in tables.items()]
    metrics = read_metrics(grid)
    if not metrics.empty:
        sections += [replace(section, title=f"Selection part: {section.title}")
                     for section in study_sections(grid, measured(metrics))]
    return Page("Search", "\n".join(said) or "The search has no verdict yet.", sections, problems=problems)


def _section(name: str, title: str, rows: pandas.DataFrame) -> Section:
    texts = rows.assign(**{column: rows[column].map(region_words) for column in ("region", "cells") if column in rows})
    help_of = {column.name: column.doc for column in TABLES[name].columns}
    table = frame_table(name, texts, help_of, SHOWN if name == "verdict" else None)
    views = _verdict_views(rows) if name == "verdict" else []
    charts = [_chart(views, table)] if views else []
    return Section(title, charts=charts, tables=[table])


def _chart(views: Sequence[View], table: PageTable) -> Chart:
    return Chart("The best cell beside its controls", "On the report part, whose examples did not choose the cell. The"
                 " bar of the cell is its paired 95 % interval; that of a control is twice the standard deviation of"
                 " its draws.", views, "metric", table)


def _verdict_views(rows: pandas.DataFrame) -> list[View]:
    views = []
    names = [column.removesuffix("_spread") for column in map(str, rows.columns) if column.endswith("_spread")]
    for i, row in enumerate(rows_of(rows)):
        if is_missing(row.delta):
            continue
        controls = [one for one in names if not is_missing(getattr(row, f"{one}_spread"))]
        means = [getattr(row, f"{one}_delta") for one in controls]
        spreads = [2 * getattr(row, f"{one}_spread") for one in controls]
        best = Points("best cell", [0.0], [row.delta], [row.delta_low], [row.delta_high], [i])
        beside = Points("controls", [1.0 + k for k in range(len(controls))], means,
                        [mean - spread for mean, spread in zip(means, spreads)],
                        [mean + spread for mean, spread in zip(means, spreads)], [i] * len(controls))
        ticks = ["best cell", *(one.replace("_", " ") for one in controls)]
        axes = Axes("", f"change of {row.metric}", ticks, 0.0)
        views.append(interval_points(f"{row.task}: {row.metric}", [best, beside], axes))
    return views
