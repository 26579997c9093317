"""The page of a study, report/index.html: effects as charts, a table of all cells, and the examples that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.page import write_run_page
from harness.measurements.ablation.effects import LEVEL, Effects, effects
from harness.measurements.ablation.series import by_series, joined, region_kinds, tick
from harness.measurements.ablation.summary import (
    MeasuredMetric,
    by_target_and_region,
    headline,
    is_baseline,
    origin,
    region_order,
    target_order,
)
from harness.measurements.ablation.tables import METRICS, TABLES, read_examples
from harness.measurements.ablation.texts import read_texts
from harness.measurements.ablation.titles import measured_on
from harness.tables.charts import Axes, Grid, Points, heat_map, interval_points
from harness.tables.frames import rows_of
from harness.tables.labels import region_words
from harness.tables.page import Chart, Example, Page, PageTable, Section, View, frame_table
from harness.tables.text import count, is_missing, layer_key, p_text, plus_minus, signed

if TYPE_CHECKING:
    import pandas

MOST_EXAMPLES = 8  # that are shown of one cell
# Of so many cells, and within so many rows of the table of examples, the page has the examples; others have none.
CELLS_WITH_EXAMPLES, ROWS_OF_EXAMPLES = 400, 400_000
MOST_VIEWS = 64
# All that charts read of a cell.
CHARTED = ("cell_id", "target", "target_kind", "block", "layer_type", "region", "region_by", "region_kind",
           "fraction_start", "fraction_stop", "delta", "q_value")  # fmt: skip
BARS = "Bars are 95 % intervals of the change, paired over the same examples."
SCORES = ("without ablation", "with ablation", "change")
SHOWN = ("task", "target", "region", "value", "delta", "ratio", "low", "high", "p", "q", "energy removed")
HELP = {"ratio": "The metric of the ablated model over that of the unablated model.",
        "low": "Lower end of the paired 95 % interval of the delta, or of the ratio of a perplexity.",
        "high": "Upper end of this interval.", "delta": "The value minus that of the unablated model.",
        "p": "Two-sided p-value of this cell alone.",
        "q": "p adjusted for all ablations of the task and metric (Benjamini-Hochberg).",
        "energy removed": "Removed share of the squared Frobenius norm."}  # fmt: skip
RENAMED = {"cell_id": "cell id", "p_value": "p", "q_value": "q", "energy_removed": "energy removed",
           "delta_stderr": "stderr of delta"}  # fmt: skip
DETAILS = ("task", "metric", "target", "region", "value", "stderr", "baseline", "delta", "delta_stderr", "p_value",
           "q_value", "n", "n_available", "energy_removed", "norm_removed", "n_removed", "n_values",
           "fraction_start", "fraction_stop", "output_energy_removed", "realised_removal", "svd_method", "seconds",
           "cell_id")  # fmt: skip


def write_study_page(
    folder: Path, metrics: pandas.DataFrame, found: Sequence[MeasuredMetric], problems: Sequence[str]
) -> Path:
    """Write report/index.html of a study, and return its path.

    metrics: as `read_metrics` returns. found: `measured(metrics)`. problems: lines that a reader must see.
    """
    primary = [one for one in found if one.primary and len(one.cells)]
    sections = study_sections(folder, found)
    sentence = "\n".join(headline_of(one) for one in primary) or headline(metrics) + "."
    baselines = metrics[is_baseline(metrics)].drop_duplicates("task")
    protocols = {f"protocol of {row.task}": row.protocol for row in rows_of(baselines)}
    page = Page(headline(metrics), sentence, sections, origin(metrics), problems, protocols)
    return write_run_page(folder, TABLES, metrics, page)


def study_sections(folder: Path, found: Sequence[MeasuredMetric]) -> list[Section]:
    """Return the sections of a study: charts of the primary metric of each task, and the table of all cells."""
    primary = [one for one in found if one.primary and len(one.cells)]
    table = _table(folder, found, primary)
    if table is None:
        return []
    cells = table.values[[column.name for column in table.columns].index("cell id")]
    rows = {cell: row for row, cell in enumerate(cells)}
    return [*(_section(one, table, rows) for one in primary), Section("All cells", [
        "Click on + for all that is known of a cell, and for the examples that it changed most. Filters of numbers are"
        " such as <0.05, >=2 or 1..2."], (), [table])]


def headline_of(one: MeasuredMetric) -> str:
    """Return what a study found for one metric, in one or two sentences."""
    cells = one.cells[one.cells["region_kind"] != "none"]
    start = f"{one.task}: "
    if one.baseline is not None:
        start += f"{one.metric} is {plus_minus(one.baseline['value'], one.baseline['stderr'])} without ablation; "
    sure = cells[cells["q_value"] < LEVEL]
    better = (sure["delta"] > 0) == one.higher_is_better
    said = (f"of {count(len(cells), 'ablation')}, {int((~better).sum())} make it worse and {int(better.sum())} better"
            f" (q below {LEVEL}).")
    if cells["delta"].isna().all():
        return f"{start}{count(len(cells), 'ablation')}."
    most = cells.iloc[int(cells["delta"].abs().fillna(-1).argmax())]
    return (f"{start}{said} The largest change: {most['target']}, {region_words(most['region'])},"
            f" {signed(most['delta'], most['delta_stderr'])} (q {p_text(most['q_value'])}).")


def _section(one: MeasuredMetric, table: PageTable, row_of: Mapping[str, int]) -> Section:
    """Return the section of a metric. row_of: cell id -> its row in the table."""
    found = effects(one)
    cells = one.cells[list(CHARTED)].join(found.rows)
    cells = cells[cells["effect"].notna()]
    better = "higher" if one.higher_is_better else "lower"
    sentences = [f"{note[0].upper()}{note[1:]}." for note in (one.note, one.floor_note) if note]
    order = one.ranked
    if len(order) and order["delta"].notna().any():
        sentences += [f"Best: {_listed(one, order.head(3))}.", f"Worst: {_listed(one, order.tail(3)[::-1])}."]
    charts = []
    if len(cells):
        for kind in dict.fromkeys(cells["target_kind"]):
            of_kind = cells[cells["target_kind"] == kind]
            charts += _charts(_Drawn(one, found, of_kind, row_of, table))
    return Section(f"{one.title} ({better} is better)", sentences, charts)


class _Drawn:
    """What all charts of one metric and kind of target share, and the texts under them.

    columns: the values of the cells by the name of their column; charts name a cell by its place there. opens: the rows
    of the cells in the table.
    """

    def __init__(
        self, one: MeasuredMetric, found: Effects, cells: pandas.DataFrame, row_of: Mapping[str, int], table: PageTable
    ) -> None:
        self.one, self.found, self.cells, self.table = one, found, cells, table
        self.columns: dict[str, list[Any]] = {str(name): cells[name].tolist() for name in cells.columns}
        self.opens = [row_of.get(cell) for cell in self.columns["cell_id"]]
        self.name = f"{one.metric} / baseline" if found.ratio else f"change of {one.metric}"
        self.about = f"{measured_on(one)}."
        wide = cells["effect"].max() > 4 * max(cells["effect"].min(), 1e-9)
        self.log = found.ratio and bool(wide)
        self.regions, self.of_region = region_order(cells), region_kinds(cells)
        self.ticks = {region: tick(region, self.of_region[region][0]) for region in self.regions}


def _charts(drawn: _Drawn) -> list[Chart]:
    cells, columns = drawn.cells, drawn.columns
    if cells["block"].notna().all() and cells["layer_type"].notna().all() and cells["block"].nunique() > 1:
        of_block: dict[int, dict[str, list[int]]] = {}
        for at, (block, layer_type) in enumerate(zip(columns["block"], columns["layer_type"])):
            of_block.setdefault(int(block), {}).setdefault(layer_type, []).append(at)
        curves = [_curves(drawn, sorted(of_block[block].items(), key=lambda item: layer_key(item[0])), f"block {block}")
                  for block in sorted(of_block)[:MOST_VIEWS]]
        chart = Chart("Change against the removed region, block by block", f"{drawn.about} {BARS} Lines join regions"
                      " that are in an order.", curves, "block", drawn.table)
        return [_block_maps(drawn), chart]
    placed = cells.assign(place=range(len(cells)))
    series = [(name, rows["place"].tolist()) for name, rows in by_series(placed)]
    return [Chart("Change against the removed region", f"{drawn.about} {BARS} Lines join regions that are in an order;"
                  " controls are the last.", [_curves(drawn, series, "all")], "view", drawn.table),
            *([_region_map(drawn)] if cells["target"].nunique() > 1 else [])]


def _curves(drawn: _Drawn, named: Sequence[tuple[str, Sequence[int]]], label: str) -> View:
    """Return the curves of some series. named: the places of the cells of each series by its name."""
    region_of, effect, low, high = (drawn.columns[name] for name in ("region", "effect", "low", "high"))
    there = {region_of[at] for _, cells in named for at in cells}
    regions = [region for region in drawn.regions if region in there]
    place = {region: i for i, region in enumerate(regions)}
    series = []
    for i, (name, cells) in enumerate(named):
        ordered = sorted(cells, key=lambda at: place[region_of[at]])
        shift = 0.7 * ((i + 0.5) / len(named) - 0.5)
        listed = [region_of[at] for at in ordered]
        lines = [(listed.index(group[0]), listed.index(group[-1])) for group in joined(drawn.of_region, listed)]
        series.append(Points(
            name, [place[region] + shift for region in listed], [effect[at] for at in ordered],
            [low[at] for at in ordered], [high[at] for at in ordered], [drawn.opens[at] for at in ordered], lines,
        ))  # fmt: skip
    x = "removed part of the spectrum (0 = largest singular value)"
    axes = Axes(x, drawn.name, [drawn.ticks[region] for region in regions], drawn.found.reference, drawn.log)
    return interval_points(label, series, axes)


def _block_maps(drawn: _Drawn) -> Chart:
    """Return heat maps over blocks and layer types, one for each region."""
    columns, deltas = drawn.columns, drawn.columns["delta"]
    blocks = sorted({int(block) for block in columns["block"]})
    types = sorted(set(columns["layer_type"]), key=layer_key)
    of_region: dict[str, dict[tuple[int, str], int]] = {}
    for at, (region, block, layer_type) in enumerate(zip(columns["region"], columns["block"], columns["layer_type"])):
        shown = of_region.setdefault(region, {})
        key = int(block), layer_type  # of several experts the one with the largest change is shown
        if key not in shown or abs(deltas[at]) > abs(deltas[shown[key]]):
            shown[key] = at
    views = [
        _map(drawn, region_words(region), [[of_region[region].get((block, one)) for one in types] for block in blocks],
             ([str(block) for block in blocks], types))
        for region in drawn.regions[:MOST_VIEWS]
    ]
    return Chart("Change by block and layer type", f"{drawn.about} Blue is better, red is worse; a star marks q below"
                 f" {LEVEL}.", views, "region", drawn.table)


def _region_map(drawn: _Drawn) -> Chart:
    targets, regions, columns = target_order(drawn.cells), drawn.regions, drawn.columns
    place = {key: at for at, key in enumerate(zip(columns["target"], columns["region"]))}
    lines = [[place.get((target, region)) for region in regions] for target in targets]
    ticks = [drawn.ticks[region] for region in regions]
    return Chart("Change by target and region", f"{drawn.about} Blue is better, red is worse; a star marks q below"
                 f" {LEVEL}.", [_map(drawn, "all", lines, (targets, ticks))], "view", drawn.table)


def _map(
    drawn: _Drawn, label: str, lines: list[list[int | None]], names: tuple[Sequence[str], Sequence[str]]
) -> View:
    """Return a heat map. lines: the places of the cells by row and column."""
    delta, q_value = drawn.columns["delta"], drawn.columns["q_value"]
    grid = Grid(
        *names, [[None if at is None else delta[at] for at in line] for line in lines],
        [["*" if at is not None and q_value[at] < LEVEL else "" for at in line] for line in lines],
        [[None if at is None else drawn.opens[at] for at in line] for line in lines],
    )  # fmt: skip
    return heat_map(label, grid, f"change of {drawn.one.metric}", blue_is_high=drawn.one.higher_is_better)


def _listed(one: MeasuredMetric, cells: pandas.DataFrame) -> str:
    return "; ".join(f"{row.target}, {region_words(row.region)}, {signed(row.delta, row.delta_stderr)}"
                     for row in rows_of(cells))


# ---------------------------------------------------------------- the table and its examples


def _table(
    folder: Path, found: Sequence[MeasuredMetric], primary: Sequence[MeasuredMetric]
) -> PageTable | None:
    import pandas

    if not primary:
        return None
    parts = []
    for one in primary:
        rows, of_cells = by_target_and_region(one.cells), effects(one)
        part = rows[list(DETAILS)].assign(low=of_cells.rows["low"], high=of_cells.rows["high"])
        if of_cells.ratio:
            part = part.assign(ratio=of_cells.rows["effect"])
        for other in found:
            if other.task == one.task and not other.primary:
                values = other.cells.set_index("cell_id")[["value", "delta"]].reindex(part["cell_id"])
                part = part.assign(**{f"{other.metric}: value": values["value"].to_numpy(),
                                      f"{other.metric}: delta": values["delta"].to_numpy()})
        parts.append(part)
    rows = pandas.concat(parts, ignore_index=True)
    if len(primary) == 1:
        rows = rows.drop(columns="task")
    help_of = {column.name: column.doc for column in METRICS}
    help_of = {RENAMED.get(name, name): text for name, text in help_of.items()} | HELP
    rows["region"] = rows["region"].map(region_words)
    examples = changed_examples(folder, rows, primary)
    return frame_table(
        "Cells", rows.rename(columns=RENAMED), help_of, SHOWN, examples=examples, score_names=SCORES,
        about_examples=f"The {MOST_EXAMPLES} examples whose score changed most. A score is what the metric averages: 0"
        " or 1 for an accuracy, the negative log-likelihood in nats per token or word for a perplexity.",
        no_examples="The page has the examples of the cells with the largest changes only, if the study kept them;"
        " harness.open(folder).examples in Python has all.",
    )


def changed_examples(
    folder: Path, rows: pandas.DataFrame, primary: Sequence[MeasuredMetric]
) -> dict[int, list[Example]]:
    """Return the examples that changed most by the row of their cell, for the cells with the largest changes.

    folder: a study. rows: cell_id and delta, and task if there are several; their index is the row in a table of the
    page. primary: the metric of each task that is meant.
    """
    import numpy as np

    texts = read_texts(folder)
    chosen: list[tuple[MeasuredMetric, str, pandas.Series]] = []  # with the baseline's id, and the ids of the cells
    for one in primary:
        if one.baseline is None or is_missing(one.baseline["n"]):
            continue
        most = min(CELLS_WITH_EXAMPLES, max(1, ROWS_OF_EXAMPLES // max(1, int(one.baseline["n"])))) // len(primary)
        of_task = rows if "task" not in rows else rows[rows["task"] == one.task]
        largest = of_task.dropna(subset=["delta"])["delta"].abs().nlargest(max(1, most)).index
        chosen.append((one, one.baseline["cell_id"], of_task.loc[largest, "cell_id"]))
    # At once, because cells lie everywhere in a merged part: every reading goes through all of it.
    whole = read_examples(folder, [cell for _, unablated, ids in chosen for cell in (*ids, unablated)])
    shown: dict[int, list[Example]] = {}
    for one, unablated, ids in chosen:
        table = whole[(whole["task"] == one.task) & (whole["metric"] == one.metric) & (whole["weight"] != 0)]
        means, names = (table["score"] / table["weight"]).to_numpy(float), table["example_id"].to_numpy(str)
        places = table.groupby("cell_id", sort=False).indices
        before = places.get(unablated)
        if before is None:
            continue
        baseline, text_of = dict(zip(names[before], means[before])), texts.get(one.task, {})
        for row, cell in zip(ids.index.tolist(), ids):
            at = [i for i in places.get(cell, ()) if names[i] in baseline]
            change = means[at] - np.array([baseline[names[i]] for i in at])
            shown[row] = [
                Example(names[at[k]], text_of.get(names[at[k]]), (baseline[names[at[k]]], means[at[k]], change[k]))
                for k in np.argsort(-np.abs(change), kind="stable")[:MOST_EXAMPLES]
            ]  # fmt: skip
    return shown
