"""The report of `harness tune`: effects over seeds as sentences, Markdown, CSV and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import MANIFEST, read_in_order, read_manifest
from harness.engine.page import write_run_page
from harness.errors import printable
from harness.files import replacing, write_text
from harness.measurements.ablation.summary import region_order
from harness.measurements.tuning.effects import AFTER, BEFORE, ORDER, UNPRUNED, effects
from harness.measurements.tuning.tables import TABLES
from harness.tables.charts import Axes, Points, interval_points
from harness.tables.drawing import (
    MARKERS,
    SERIES_COLOURS,
    can_draw,
    new_figure,
    remove_figures,
    save_figure,
    why_no_figures,
)
from harness.tables.failures import failure_count
from harness.tables.frames import rows_of
from harness.tables.labels import region_words
from harness.tables.page import Chart, Page, Section, frame_table
from harness.tables.text import aligned, count, figure_text, file_stem, markdown_text, p_text, safe_for_csv, shorten

if TYPE_CHECKING:
    import pandas

NAMES = {BEFORE: "removed before tuning", AFTER: "removed after tuning"}
LEVEL = 0.05
REMOVED = "removed part of the spectrum (0 = largest singular value)"
PAGE_COLUMNS = ("target", "region", "compared", "n_seeds", "value", "against", "effect", "low", "high", "p_holm")
Row = dict[str, Any]


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path | None:
    """Print the effects, and write tune.md, effects.csv and a figure for each task into <folder>/report/.

    write: a function that prints the text. Returns the path of tune.md, or None if nothing has been measured yet.
    Raises SchemaVersionError.
    """
    import pandas

    folder = Path(folder)
    tunings, results = (read_in_order(folder, TABLES, name) for name in TABLES.names())
    if tunings.empty:
        write(f"{folder}: no fine-tuning has been measured yet")
        return None
    regions = region_order(tunings[tunings["order"] != UNPRUNED])
    rows = sorted(effects(results), key=lambda row: regions.index(row["region"]))
    out = folder / "report"
    remove_figures(out)
    with replacing(out / "effects.csv") as temporary:
        safe_for_csv(pandas.DataFrame(rows)).to_csv(temporary, index=False)
    problems = _problems(folder, tunings)
    if not can_draw():
        problems.append(why_no_figures())
    lines = [f"# Fine-tuning of {markdown_text(tunings['model'].iloc[0])} and removals", "",
             *(f"> {markdown_text(line)}" for line in problems), "",
             "Each effect is a mean over seeds of differences within a seed, with the 95 % interval of Student's t over"
             " seeds. p is corrected for the regions (Holm). The measured examples are the same for all seeds, so the"
             " intervals hold for these examples.", ""]
    said: list[str] = [*problems]
    for task, metric in _primary(results):
        of_metric = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        title, sentences = f"{task}: {metric}", _sentences(task, metric, results, of_metric)
        said += ["", title, *(f"  {line}" for line in [*sentences, *aligned(_table(of_metric), 2)])]
        lines += [f"## {markdown_text(title)}", "", *(f"{markdown_text(line)}  " for line in sentences), ""]
        head, *body = _table(of_metric)
        lines += ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
        lines += ["| " + " | ".join(map(markdown_text, line)) + " |" for line in body] + [""]
        if can_draw() and of_metric:
            name = f"{file_stem(task, metric)}-orders.png"
            _figure(title, of_metric, regions, out / name)
            lines += [f"![Effect of each removal on {markdown_text(title)}]({name})", ""]
    write_text(out / "tune.md", "\n".join(lines))
    sections = [_section(task, metric, rows, regions) for task, metric in _primary(results)]
    sentence = "\n".join(line for task, metric in _primary(results)
                         for line in [f"{task}: {metric}", *_sentences(task, metric, results, [
                             row for row in rows if (row["task"], row["metric"]) == (task, metric)])])
    write_run_page(folder, TABLES, tunings, Page(
        f"Fine-tuning of {tunings['model'].iloc[0]} and removals", sentence, sections, problems=problems))
    write("\n".join(map(printable, [*said, "", f"{out / 'tune.md'} and effects.csv"])).strip())
    return out / "tune.md"


def _section(task: str, metric: str, rows: Sequence[Row], regions: Sequence[str]) -> Section:
    """Return the effects of both orders as charts, one for each target, and as a table."""
    import pandas

    of_metric = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
    table = frame_table("Effects", pandas.DataFrame(of_metric).assign(
        region=[region_words(row["region"]) for row in of_metric]), shown=PAGE_COLUMNS)
    views = []
    for target in dict.fromkeys(row["target"] for row in of_metric):
        series = []
        for i, (compared, label) in enumerate(NAMES.items()):
            at = [(regions.index(row["region"]) + 0.3 * (i - 0.5), k, row) for k, row in enumerate(of_metric)
                  if (row["target"], row["compared"]) == (target, compared)]
            series.append(Points(label, *([part(one) for one in at] for part in (
                lambda one: one[0], lambda one: one[2]["effect"], lambda one: one[2]["low"],
                lambda one: one[2]["high"], lambda one: one[1]))))
        ticks = [region_words(region) for region in regions]
        views.append(interval_points(target, series, Axes(REMOVED, "change against the tuned model", ticks, 0.0)))
    chart = Chart("Change against the tuned model", "Bars are 95 % intervals over seeds.", views, "target", table)
    return Section(f"{task}: {metric}", charts=[chart] if views else [], tables=[table])


def _problems(folder: Path, tunings: pandas.DataFrame) -> list[str]:
    lines = []
    if (folder / MANIFEST).is_file():
        planned = len(read_manifest(folder).units)
        if len(tunings) < planned:
            lines.append(f"Incomplete: {len(tunings)} of {planned} units have been measured.")
    return lines + failure_count(tunings, TABLES.key, "unit")


def _primary(results: pandas.DataFrame) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for row in rows_of(results[["task", "metric"]].drop_duplicates()):
        found.setdefault(row.task, row.metric)
    return list(found.items())


def _sentences(task: str, metric: str, results: pandas.DataFrame, rows: Sequence[Row]) -> list[str]:
    of_metric = results[(results["task"] == task) & (results["metric"] == metric)]
    tuned = of_metric[of_metric["order"] == UNPRUNED]["value"]
    lines = []
    if len(tuned):
        spread = f", between {tuned.min():.4g} and {tuned.max():.4g}" if len(tuned) > 1 else ""
        lines.append(f"Tuned with nothing removed: {tuned.mean():.4g} in the mean over {count(len(tuned), 'seed')}"
                     f"{spread}.")
    for compared, words in NAMES.items():
        members = [row for row in rows if row["compared"] == compared]
        if members:
            hurt = [row for row in members if row["p_holm"] < LEVEL and _damage(row) > 0]
            listed = ", ".join(f"{region_words(row['region'])} ({row['effect']:+.3g})" for row in hurt) or "none"
            lines.append(f"Regions whose removal {words.split()[1]} tuning hurts (p below {LEVEL} after Holm's"
                         f" correction, of {len(members)}): {listed}.")
    return lines


def _damage(row: Row) -> float:
    return -row["effect"] if row["higher_is_better"] else row["effect"]


def _table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the head and the lines of a table with one line for each target and region."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["target"], row["region"]), {})[row["compared"]] = row
    head = ["target", "region", "seeds", "removed before tuning", "p", "removed after tuning", "p", "before - after",
            "p"]
    table = [head]
    for (target, region), of_edit in lines.items():
        n = "/".join(dict.fromkeys(str(row["n_seeds"]) for row in of_edit.values()))
        cells = [target, region_words(region), n]
        for compared in (BEFORE, AFTER, ORDER):
            found = of_edit.get(compared)
            cells += ["-", "-"] if found is None else [_interval(found), p_text(found["p_holm"])]
        table.append(cells)
    return table


def _interval(row: Row) -> str:
    if row["low"] != row["low"]:
        return f"{row['effect']:+.4f}"
    return f"{row['effect']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"


def _figure(title: str, rows: Sequence[Row], regions: Sequence[str], path: Path) -> None:
    """Save the effects of both orders, one panel for each target, with 95 % intervals over seeds."""
    targets = list(dict.fromkeys(row["target"] for row in rows))[:4]
    figure = new_figure(min(15.0, 2.0 + max(4.4, 0.55 * len(regions)) * len(targets)), 4.6)
    axes = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for panel, target in zip(axes, targets):
        for i, (compared, label) in enumerate(NAMES.items()):
            members = {row["region"]: row for row in rows if (row["target"], row["compared"]) == (target, compared)}
            at = [(place, members[region]) for place, region in enumerate(regions) if region in members]
            if at:
                x = [place + 0.2 * (i - 0.5) for place, _ in at]
                y = [row["effect"] for _, row in at]
                ends = [[0.0 if row[end] != row[end] else abs(row["effect"] - row[end]) for _, row in at]
                        for end in ("low", "high")]
                panel.errorbar(x, y, ends, label=label, color=SERIES_COLOURS[i], marker=MARKERS[i], markersize=4.5,
                               linewidth=1.2, capsize=2)
        panel.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        ticks = [figure_text(shorten(region_words(region).split("(")[-1].rstrip(")"), 24)) for region in regions]
        panel.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
        panel.set_title(figure_text(shorten(target, 30)), fontsize="medium")
    axes[0].set_ylabel("change against the tuned model\n(95 % interval over seeds)")
    axes[-1].legend(frameon=False, fontsize="small")
    figure.suptitle(figure_text(title))
    figure.supxlabel(REMOVED, fontsize="medium")
    save_figure(figure, path)
