"""The page of components, report/index.html: the atlas, from whose cells a click opens the card of a component.

A card is a row of the table of components with all that is known of it, and the examples that its removal changed most.
The table has the components that the charts show: the best and the worst of each matrix, and the best and the worst of
the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measurements.ablation.page import SCORES, changed_examples
from harness.measurements.ablation.summary import measured
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.components import summary
from harness.measurements.components.tables import COMPONENTS
from harness.tables.charts import Axes, Grid, Points, heat_map, interval_points
from harness.tables.frames import rows_of
from harness.tables.page import Chart, Example, Page, PageTable, Section, View, frame_table
from harness.tables.text import count, is_missing, layer_key, signed

if TYPE_CHECKING:
    import pandas

MOST_CARDS = 50  # of the whole model, of either sign and for each effect, beside those of each matrix
MOST_CURVES = 64  # matrices whose effects are drawn over the spectrum
WORDS = {"improvement": "measured", "predicted_improvement": "predicted to first order"}
BETTER = "An improvement is a change of the metric if the component is removed, positive where that is better."
ABOUT = ("index", "sigma", "energy", "predicted_loss", "output_rms", "output_rank", "output_mean", "constant_share",
         "mean_cosine", "leading_share", "input_participation", "input_coordinate", "output_participation",
         "output_coordinate", "stability_random", "stability_rounded", "stability_reference", "promoted", "suppressed")
SHOWN = ("sigma", "output_rms", "constant_share", "promoted")  # of them, in the rows of the table; the card has all


@dataclass(frozen=True)
class Effect:
    """The effects of components on one metric of a task, as measured or as predicted.

    rows: matrix, index and `column`, an improvement; of measured ones also p_value, delta and cell_id.
    """

    task: str
    metric: str
    column: str
    rows: pandas.DataFrame

    @property
    def name(self) -> str:
        """The name of its column in the table of components."""
        return f"{self.task}: {self.metric}, {WORDS[self.column].split()[0]}"


@dataclass(frozen=True)
class Cards:
    """The table of components, and the row of each in it: (matrix, index) -> row."""

    table: PageTable
    row_of: Mapping[tuple[str, int], int] = field(default_factory=dict)


def components_page(
    effects: Sequence[Effect], components: pandas.DataFrame, study: str | None, said: Sequence[str],
    problems: Sequence[str],
) -> Page:
    """Return the page.

    effects: those that are shown. components: the table `components`. study: the folder of the study that measured, or
    None. said: the first sentence is the title, and all are the headline. problems: lines that a reader must see.
    """
    if not effects:
        return Page(said[0], "\n".join(said), [], problems=problems)
    extremes = {id(one): summary.extremes(one.rows, one.column, components) for one in effects}
    cards = _cards(effects, extremes, components, study)
    of_metric: dict[tuple[str, str], list[Effect]] = {}
    for one in effects:
        of_metric.setdefault((one.task, one.metric), []).append(one)
    sections = [Section(f"{task}: {metric}", [*map(_sentence, group)], [
        Chart("The largest effect of a single component, by block and layer type",
              f"{BETTER} Blue is better, red is worse. A click opens the component's card in the table below.",
              [view for one in group for view in _atlas(one, extremes[id(one)], cards)], "effect", cards.table),
        Chart("Effect against the position in the spectrum",
              f"{BETTER} A click opens a card if the table below has it.",
              _curves(group, cards), "matrix", cards.table),
    ]) for (task, metric), group in of_metric.items()]
    sections.append(Section("Cards of components", [
        "Click on + for all that is known of a component. The table has the best and the worst one of each matrix,"
        f" and up to {MOST_CARDS} of the best and of the worst of the model, for each effect."], (), [cards.table]))
    return Page(said[0], "\n".join(said), sections, problems=problems)


def _sentence(one: Effect) -> str:
    """Return what stands above the charts of an effect: how many components, the best and the worst."""
    values = one.rows[one.column].to_numpy(float)
    best, worst = one.rows.iloc[int(values.argmax())], one.rows.iloc[int(values.argmin())]
    said = ", ".join(f"{what} {row['matrix']}:{row['index']} ({signed(row[one.column], row.get('delta_stderr'))})"
                     for what, row in (("the largest gain is", best), ("the largest harm", worst)))
    return f"{WORDS[one.column].capitalize()} for {count(len(one.rows), 'component')}: {said}."


def _cards(
    effects: Sequence[Effect], extremes: Mapping[int, pandas.DataFrame], components: pandas.DataFrame, study: str | None
) -> Cards:
    import pandas

    keys: dict[tuple[str, int], None] = {}
    for one in effects:
        ordered = one.rows.sort_values(one.column, ascending=False, kind="stable")
        ends = pandas.concat([ordered.head(MOST_CARDS), ordered.tail(MOST_CARDS)[::-1]])
        keys |= {(row.matrix, int(row.index_)): None for row in rows_of(ends.rename(columns={"index": "index_"}))}
        for row in rows_of(extremes[id(one)]):
            keys |= {(row.matrix, row.gain_index): None, (row.matrix, row.harm_index): None}
    about = components.set_index(["matrix", "index"]).reindex(list(keys)).reset_index()
    rows = pandas.DataFrame({"component": [f"{matrix}:{index}" for matrix, index in keys],
                             "block": about["block"], "layer type": about["layer_type"]})
    for one in effects:
        own = one.rows.drop_duplicates(["matrix", "index"]).set_index(["matrix", "index"]).reindex(list(keys))
        rows[one.name] = own[one.column].to_numpy()
        if "p_value" in own:
            rows[f"{one.name}: p"] = own["p_value"].to_numpy()
    for name in ABOUT:
        rows[name] = about[name].map(_words) if name in ("promoted", "suppressed") else about[name]
    named = [one.name for one in effects]
    help_of = {column.name: column.doc for column in COMPONENTS} | dict.fromkeys(named, BETTER)
    table = frame_table(
        "Components", rows, help_of, ("component", *named, *SHOWN), score_names=SCORES,
        examples=_examples(effects, list(keys), study),
        about_examples="The examples whose score the removal of the component changed most.",
        no_examples="" if study is None else "The study has no examples of this component.",
    )
    return Cards(table, {key: row for row, key in enumerate(keys)})


def _words(text: Any) -> str | None:
    return None if is_missing(text) else " ".join(map(repr, json.loads(text)))


def _examples(
    effects: Sequence[Effect], keys: Sequence[tuple[str, int]], study: str | None
) -> dict[int, list[Example]]:
    """Return the changed examples by the row of their component, for the first measured metric of the study."""
    import pandas

    exact = next((one for one in effects if one.column == "improvement"), None)
    if exact is None or study is None:
        return {}
    own = exact.rows.set_index(["matrix", "index"])
    there = [row for row, key in enumerate(keys) if key in own.index]
    rows = pandas.DataFrame(
        {"cell_id": [own.loc[keys[row], "cell_id"] for row in there],
         "delta": [own.loc[keys[row], "delta"] for row in there], "task": exact.task}, index=there)
    found = [one for one in measured(read_metrics(study)) if (one.task, one.metric) == (exact.task, exact.metric)]
    return changed_examples(Path(study), rows, found)


def _atlas(one: Effect, extremes: pandas.DataFrame, cards: Cards) -> list[View]:
    """Return heat maps of the largest gain and of the largest harm; of several experts the largest is shown."""
    blocks = sorted(set(extremes["block"]))
    types = sorted(set(extremes["layer_type"]), key=layer_key)
    views = []
    for what, sign in (("gain", 1.0), ("harm", -1.0)):
        at: dict[tuple[int, str], Any] = {}
        for row in rows_of(extremes):
            key = row.block, row.layer_type
            if key not in at or sign * (getattr(row, what) - getattr(at[key], what)) > 0:
                at[key] = row
        lines = [[at.get((block, one_type)) for one_type in types] for block in blocks]
        lines = [[None if row is None or sign * getattr(row, what) <= 0 else row for row in line] for line in lines]
        values = [[None if row is None else float(getattr(row, what)) for row in line] for line in lines]
        marks = [["" if row is None else f" :{getattr(row, f'{what}_index')}" for row in line] for line in lines]
        opens = [[None if row is None else cards.row_of[row.matrix, getattr(row, f"{what}_index")] for row in line]
                 for line in lines]
        grid = Grid([str(block) for block in blocks], types, values, marks, opens)
        few = len(blocks) * len(types) <= 130  # a mark is a position where numbers are shown, and else a star
        grid = grid if few else Grid(grid.rows, grid.columns, values, (), opens)
        views.append(heat_map(f"largest {what}, {WORDS[one.column]}", grid, "improvement", blue_is_high=True))
    return views


def _curves(group: Sequence[Effect], cards: Cards) -> list[View]:
    """Return a view for each of the matrices with the largest effects: every component over its position."""
    largest: dict[str, float] = {}
    parts = [{str(matrix): rows for matrix, rows in one.rows.groupby("matrix", sort=False)} for one in group]
    for one, part in zip(group, parts):
        for matrix, rows in part.items():
            largest[matrix] = max(largest.get(matrix, 0.0), float(rows[one.column].abs().max()))
    views = []
    for matrix in sorted(largest, key=lambda name: -largest[name])[:MOST_CURVES]:
        series = []
        for one, part in zip(group, parts):
            if matrix not in part:
                continue
            rows = part[matrix].sort_values("index", kind="stable")
            for word, sign in (("better", 1.0), ("worse", -1.0)):  # on a logarithmic axis, because sizes differ much
                of_sign = rows[sign * rows[one.column] > 0]
                at = [int(i) for i in of_sign["index"]]
                opens = [cards.row_of.get((matrix, i)) for i in at]
                series.append(Points(f"{word}, {WORDS[one.column].split()[0]}", at,
                                     (sign * of_sign[one.column]).tolist(), opens=opens))
        axes = Axes("position in the spectrum, 0 = the largest value", f"|improvement of {group[0].metric}|", log=True)
        views.append(interval_points(matrix, series, axes))
    return views
