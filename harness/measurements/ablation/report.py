"""The report of a study as text, Markdown, CSV and figures, from its parquet files alone."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import in_order
from harness.errors import InputError, printable
from harness.files import replacing, write_text
from harness.measurements.ablation import gallery
from harness.measurements.ablation.damage import per_removed, tables
from harness.measurements.ablation.effects import FEWEST
from harness.measurements.ablation.page import write_study_page
from harness.measurements.ablation.region_figure import region_figure
from harness.measurements.ablation.summary import (
    MeasuredMetric,
    by_target_and_region,
    headline,
    measured,
    origin,
    region_order,
    target_order,
    ties,
)
from harness.measurements.ablation.tables import TABLES, read_metrics
from harness.optional import require
from harness.tables.drawing import can_draw, why_no_figures
from harness.tables.failures import failure_count
from harness.tables.frames import rows_of
from harness.tables.labels import nominal_interval, percent, region_words
from harness.tables.store import corrupt_parts
from harness.tables.text import (
    count,
    is_missing,
    markdown_table,
    markdown_text,
    p_text,
    plus_minus,
    safe_for_csv,
    shorten,
    signed,
)

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

BEST = 5  # cells that are shown of the best, and of the worst
WIDE = 72  # a terminal with fewer columns has no room for the adjusted p-values
TERMINAL_ROWS = 24  # a study with at most so many cells is printed completely
MARKDOWN_ROWS, MARKDOWN_COLUMNS = 120, 24
CSV_COLUMNS = (
    "cell_id", "task", "metric", "status", "target", "target_kind", "block", "layer_type", "region", "label",
    "region_kind", "nominal_start", "nominal_stop", "fraction_start", "fraction_stop",
    "value", "stderr", "n", "baseline", "delta", "delta_stderr", "p_value",
    "q_value", "ci_low", "ci_high", "n_available", "precision", "higher_is_better", "n_removed", "energy_removed",
    "norm_removed", "output_energy_removed", "output_norm_removed", "delta_per_norm", "delta_per_output_energy",
    "realised_removal", "seconds", "noise_floor",
)  # fmt: skip
CELL_DIGITS = 10  # of the id of a cell, which are enough for `harness export --cell`
Q = "q is p adjusted for the {} of this metric (Benjamini-Hochberg)"
NO_P = "no p-values: the examples are in fewer than three clusters (docs/precision.md)"


def report(folder: str | os.PathLike, write: Callable[[str], object] = print, figures: bool = True) -> Path | None:
    """Print the summary of a study, and write report.md, metrics.csv and PNG figures into <folder>/report/.

    The primary metric of each task is drawn; `figure` draws the others. A figure that is there is not drawn again if it
    would be the same.

    write: a function that prints the text. Returns the path of report.md, or None if no cell has rows yet; then nothing
    is written. The study may be unfinished, or all its cells may have failed. Raises SchemaVersionError.
    """
    folder = Path(folder)
    metrics = in_order(folder, read_metrics(folder), TABLES.key)
    if metrics.empty:
        write(f"{folder}: no cell has been measured yet")
        return None
    found = measured(metrics)
    problems = _problems(folder, metrics)
    if figures and not can_draw():
        figures, problems = False, [*problems, why_no_figures()]
    out = folder / "report"
    out.mkdir(exist_ok=True)
    _write_csv(metrics, found, out / "metrics.csv")
    shown = gallery.draw(found, len(metrics), out) if figures else gallery.clear(out)
    write_text(out / "report.md", _markdown(metrics, found, problems, shown, folder))
    write_study_page(folder, metrics, found, problems)
    write(terminal_summary(metrics, problems, found=found))
    write(f"\n{out / 'index.html'}, report.md, metrics.csv and {count(shown.n_figures, 'figure')}")
    return out / "report.md"


def figure(folder: str | os.PathLike, task: str | None = None, metric: str | None = None) -> Figure:
    """Return a figure of one metric against the removed region.

    task, metric: their names; by default the first of each. Raises InputError if there is nothing to draw.
    """
    require("matplotlib", "plots", "a figure")
    found = [one for one in measured(in_order(folder, read_metrics(folder), TABLES.key)) if len(one.cells)]
    wanted = [one for one in found if task in (None, one.task) and metric in (None, one.metric)]
    if not wanted:
        there = ", ".join(f"{one.task}: {one.metric}" for one in found) or "nothing yet"
        raise InputError(f"{folder}: no cells of task {task or 'any'} and metric {metric or 'any'}; measured: {there}")
    return region_figure(wanted[0])


# ---------------------------------------------------------------- text


def terminal_summary(
    metrics: pandas.DataFrame, problems: Sequence[str] = (), width: int | None = None,
    found: Sequence[MeasuredMetric] | None = None,
) -> str:
    """Return the summary of the primary metrics as plain text.

    problems: lines to add at the end. width: the largest number of columns, by default that of the terminal.
    found: the result of `measured(metrics)`, if the caller has it already.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    lines = [headline(metrics)]
    for one in measured(metrics) if found is None else found:
        if not one.primary:
            continue
        lines += ["", f"{one.title} ({_better(one)})"]
        if one.baseline is not None:
            lines.append(f"  baseline {plus_minus(one.baseline['value'], one.baseline['stderr'])}")
            lines += [f"  {one.note}"] if one.note else []
        if one.control is not None:
            lines.append(f"  {_control(one.control)}")
        lines += [f"  {one.floor_note}"] if one.floor_note else []
        if len(one.cells) == 0:
            continue
        if len(one.cells) <= TERMINAL_ROWS:
            lines += _text_table(one, by_target_and_region(one.cells), width)
        else:
            order = one.ranked
            n = min(BEST, len(order) // 2)
            lines += [f"  best {n} of {len(order)}{ties(order, n)}:", *_text_table(one, order.head(n), width)]
            lines += [f"  worst {n}{ties(order[::-1], n)}:", *_text_table(one, order[::-1].head(n), width)]
        if width >= WIDE and one.cells["q_value"].notna().any():
            lines.append(f"  {Q.format(count(int(one.cells['q_value'].notna().sum()), 'ablation'))}")
        if one.cells["p_value"].isna().all() and (one.cells["n_clusters"].dropna() < FEWEST).any():
            lines.append(f"  {NO_P}")
    if problems:
        lines += ["", *(line[: max(width, 40)] for line in problems)]
    return "\n".join(map(printable, lines))


def is_adaptive(rows: pandas.DataFrame) -> bool:
    """Return whether a row was measured with adaptive precision."""
    return bool((rows["precision"] == "adaptive").any())


def _used(row: Any) -> str:
    return "-" if is_missing(row.n) else f"{int(row.n)}/{int(row.n_available)}"


def _delta(one: MeasuredMetric, row: Any) -> str:
    text = signed(row.delta, row.delta_stderr)
    return f"({text})" if one.is_noise(row.delta) else text


def _text_table(one: MeasuredMetric, cells: pandas.DataFrame, width: int) -> list[str]:
    adaptive, wide = is_adaptive(cells), width >= WIDE
    head = ("target", "region", "value", "delta", "p", *(("q",) if wide else ()), *(("n",) if adaptive else ()))
    body = [
        (
            row.target,
            region_words(row.region),
            plus_minus(row.value, row.stderr),
            _delta(one, row),
            p_text(row.p_value),
            *((p_text(row.q_value),) if wide else ()),
            *((_used(row),) if adaptive else ()),
        )
        for row in rows_of(cells)
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    # If the table is too wide, labels are shortened, the longer one first. Numbers are never shortened.
    while sum(widths) + 2 * len(head) > width and max(widths[:2]) > 8:
        widths[widths.index(max(widths[:2]))] -= 1
    lines = []
    for row in [head, *body]:
        labels = [shorten(row[i], widths[i]).ljust(widths[i]) for i in (0, 1)]
        lines.append("  " + "  ".join([*labels, *(row[i].rjust(widths[i]) for i in range(2, len(head)))]))
    return lines


# ---------------------------------------------------------------- Markdown and CSV


def _markdown(
    metrics: pandas.DataFrame, found: list[MeasuredMetric], problems: Sequence[str], shown: gallery.Gallery,
    folder: Path,
) -> str:
    lines = [f"# {markdown_text(headline(metrics))}", "", markdown_text(origin(metrics)), ""]
    lines += [f"> {markdown_text(line)}" for line in problems] + ([""] if problems else [])
    lines += [
        "The number after `±` is the standard error; that of a delta is paired over the same examples. "
        "p is the two-sided p-value of one cell alone; q is p adjusted for the number of ablations of that task and "
        "metric (Benjamini-Hochberg): of the cells with q below 0.05, about one in twenty or fewer moved by chance. "
        "`asked` is the interval of the rank that the region means and `removed` the one that a matrix with a whole "
        "number of singular values has, in percent, 0 being the largest value. `cell` is the beginning of the id of a "
        "cell, for `harness export --study FOLDER --cell ID`. "
        "`delta / norm` is the delta per removed Frobenius norm; metrics.csv has it, and the delta per removed energy "
        "of the outputs where a calibration text was set, for every row. "
        "All rows, also those of other metrics, are in [metrics.csv](metrics.csv) and in `../metrics/`.",
        "",
    ]
    if is_adaptive(metrics):
        lines += [
            "Adaptive precision: a cell used only as many examples (`n`) as were needed to decide its delta; "
            "metrics.csv holds the interval (`ci_low`, `ci_high`) of the delta over all examples. The p-values are "
            "valid although the number of examples was not fixed in advance.",
            "",
        ]
    if any(one.noise_floor for one in found):
        lines += [
            "The noise floor is what rounding alone does to a metric: another order of additions changes it by less"
            " than this in at least 95 % of cases. Numbers of ablations whose delta is smaller are in parentheses.",
            "",
        ]
    if (metrics["region_by"] == "decile").any():
        counted = gallery.FIRST_DECILE
        lines += [f"{counted[0].upper()}{counted[1:]}: its decile d is decile 11 - d here.", ""]
    for one in found:
        figures = shown.drawn.get((one.task, one.metric), [])
        if not one.primary and not figures:
            continue
        lines += [f"## {markdown_text(one.title)} ({_better(one)})", ""]
        if one.baseline is not None:
            baseline = plus_minus(one.baseline["value"], one.baseline["stderr"])
            over = "" if is_missing(one.baseline["n"]) else f" over {int(one.baseline['n'])} examples"
            lines += [f"Baseline: **{baseline}**{over}{f'; {one.note}' if one.note else ''}.", ""]
        if one.control is not None:
            lines += [f"{_control(one.control).capitalize()}.", ""]
        lines += [f"{one.floor_note}.".capitalize(), ""] if one.floor_note else []
        if len(one.cells):
            if one.primary:
                order = one.ranked
                n = min(BEST, len(order))
                lines += [f"Best {n} of {len(order)} ablations{ties(order, n)}:", ""]
                lines += [*_markdown_texts(one, order.head(n)), ""]
                lines += [f"Worst {n}{ties(order[::-1], n)}:", "", *_markdown_texts(one, order[::-1].head(n)), ""]
            lines += _pivot(one)
            for title, rows in tables(one, folder) if one.primary else ():
                lines += [title, "", *markdown_table(_with_dashes(rows)).splitlines(), ""]
        for name, caption in figures:
            lines += [f"![{markdown_text(caption)}]({name})", ""]
    if shown.left_out:
        lines += [f"Without a figure: {markdown_text(', '.join(shown.left_out))}. In Python,"
                  " `harness.open(folder).plot(task, metric)` draws one.", ""]
    return "\n".join(lines)


def _markdown_texts(one: MeasuredMetric, cells: pandas.DataFrame) -> list[str]:
    adaptive = is_adaptive(cells)
    heads = ["target", "region", "asked", "removed", "value", "delta", "delta / norm", "p", "q"]
    heads += [*(["n"] if adaptive else []), "cell"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|--:" * (len(heads) - 3) + "|---|"]
    for row in rows_of(per_removed(cells)):
        value = plus_minus(row.value, row.stderr)
        per_norm = "-" if is_missing(row.delta_per_norm) else f"{row.delta_per_norm:.3g}"
        texts = [
            markdown_text(row.target), markdown_text(region_words(row.region)), _stretch(*nominal_interval(row.region)),
            _stretch(row.fraction_start, row.fraction_stop), value, _delta(one, row), per_norm, p_text(row.p_value),
            p_text(row.q_value), *([_used(row)] if adaptive else []), f"`{row.cell_id[:CELL_DIGITS]}`",
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def _stretch(start: float | None, stop: float | None) -> str:
    if start is None or stop is None or is_missing(start) or is_missing(stop):
        return "-"
    return f"{percent(round(start, 5))}-{percent(round(stop, 5))} %"


def _pivot(one: MeasuredMetric) -> list[str]:
    targets, regions = target_order(one.cells), region_order(one.cells)
    if len(targets) > MARKDOWN_ROWS or len(regions) > MARKDOWN_COLUMNS:
        return [f"{len(targets)} targets x {len(regions)} regions: too many for a table here, see metrics.csv.", ""]
    texts = {}
    for row in rows_of(one.cells[["target", "region", "value", "stderr", "delta"]]):
        text = plus_minus(row.value, row.stderr)
        texts[row.target, row.region] = f"({text})" if one.is_noise(row.delta) else text
    heads = [markdown_text(region_words(region)) for region in regions]
    lines = ["| target | " + " | ".join(heads) + " |", "|---" + "|--:" * len(regions) + "|"]
    for target in targets:
        lines.append(f"| {markdown_text(target)} | " + " | ".join(texts.get((target, r), "") for r in regions) + " |")
    return [*lines, ""]


def _with_dashes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = [{key: "-" if value is None else value for key, value in row.items()} for row in rows[:MARKDOWN_ROWS]]
    return [{**row, **{key: region_words(row[key]) for key in ("region", "outliers") if key in row}} for row in shown]


def _write_csv(metrics: pandas.DataFrame, found: list[MeasuredMetric], path: Path) -> None:
    import pandas
    import pyarrow as pa
    import pyarrow.csv

    q_values = [one.cells["q_value"] for one in found]
    floors = [pandas.Series(one.noise_floor, one.cells.index, float) for one in found]
    nominal = {label: nominal_interval(label) for label in metrics["region"].unique()}
    metrics = per_removed(metrics).assign(
        label=metrics["region"].map(region_words),
        nominal_start=metrics["region"].map({label: start for label, (start, _) in nominal.items()}).astype(float),
        nominal_stop=metrics["region"].map({label: stop for label, (_, stop) in nominal.items()}).astype(float),
        q_value=pandas.concat(q_values) if q_values else math.nan,
        noise_floor=pandas.concat(floors) if floors else math.nan,
    )
    table = pa.Table.from_pandas(safe_for_csv(metrics[list(CSV_COLUMNS)]), preserve_index=False)
    with replacing(path) as temporary:
        pyarrow.csv.write_csv(table, temporary)


# ---------------------------------------------------------------- shared


def _control(control: pandas.Series) -> str:
    delta, n = control["delta"], int(control["n_matrices"])
    verdict = "not possible" if is_missing(delta) else "passed" if delta == 0 else "failed"
    moved = "unknown" if is_missing(delta) else f"{delta:.3g}"
    matrices = f"{n} {'matrix' if n == 1 else 'matrices'}"
    return f"sanity check {verdict}: {matrices} decomposed, nothing removed, {moved} change"


def _problems(folder: Path, metrics: pandas.DataFrame) -> list[str]:
    lines = failure_count(metrics, TABLES.key, "cell")
    damaged = corrupt_parts(folder, TABLES)
    if damaged:
        lines.append(
            f"{count(len(damaged), 'damaged file')}, such as {damaged[0].path}: run the study again to replace them"
        )
    return lines


def _better(one: MeasuredMetric) -> str:
    return f"{'higher' if one.higher_is_better else 'lower'} is better"
