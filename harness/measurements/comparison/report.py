"""The report of a comparison as sentences, Markdown, CSV, parquet and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.plan import run_id
from harness.errors import InputError, printable
from harness.files import replacing, told_in_one_line, write_text
from harness.measurements.comparison.page import page_of
from harness.measurements.comparison.pairing import Joined, StudyOf, join, read_studies
from harness.measurements.comparison.tables import TABLES
from harness.tables.drawing import can_draw, remove_figures, why_no_figures
from harness.tables.labels import region_words
from harness.tables.page import write_page
from harness.tables.text import count, file_stem, is_missing, markdown_text, p_text, plus_minus, safe_for_csv, signed

if TYPE_CHECKING:
    import pandas

LEVEL = 0.05
MAX_ROWS, MAX_FIGURES, SHOWN = 120, 12, 8


@dataclass(frozen=True)
class Comparison:
    """A comparison of studies.

    folder: where its tables, its page and its figures are. rows: the table `compare`. left_out: what was not compared,
    and why. summary: the sentences that `harness compare` prints.
    """

    folder: Path
    rows: pandas.DataFrame
    left_out: pandas.DataFrame
    summary: tuple[str, ...]


def compare(
    folders: Sequence[str | Path], output: str | Path | None = None, write: Callable[[str], object] = print,
    figures: bool = True,
) -> Comparison:
    """Compare the first of some studies with each of the others, and write the comparison into a folder.

    folders: of studies that `harness run` wrote, at least two. output: by default results/compare-<id>. write: a
    function that prints the summary. Raises InputError for folders that are no studies, and if no cell can be compared.
    """
    import pandas

    studies = read_studies(folders)
    joined = join(studies)
    if not joined.rows:
        reasons = dict.fromkeys(f"{one['task']}: {one['reason']}" for one in joined.left_out)
        raise InputError(f"compare: no cell of these studies can be compared; {'; '.join(list(reasons)[:3])}")
    folder = Path(output) if output is not None else Path("results") / f"compare-{run_id(_ids(studies))[:8]}"
    problems = [*joined.notes]
    if figures and not can_draw():
        figures, problems = False, [*problems, why_no_figures()]
    with told_in_one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tables = {"compare": pandas.DataFrame(joined.rows), "left_out": pandas.DataFrame(joined.left_out)}
        for name, rows in tables.items():
            tables[name] = _write_table(folder, name, rows)
        summary = (*summary_of(joined, studies), *problems)
        drawn = _draw(folder, joined, studies) if figures else []
        write_text(folder / "compare.md", _markdown(joined, studies, summary, drawn))
        groups = {(task, metric): [row for row in joined.rows if (row["task"], row["metric"]) == (task, metric)]
                  for task, metric in primary_metrics(joined, studies)}
        title = f"Comparison of {' and '.join(one.model for one in studies)}"
        write_page(page_of(title, summary, groups, studies[0].metrics), folder / "index.html")
    write("\n".join(map(printable, [*summary, "", f"{folder / 'index.html'}, compare.md, compare.parquet and"
                                    f" {count(len(drawn), 'figure')}"])))
    return Comparison(folder, tables["compare"], tables["left_out"], tuple(summary))


def _ids(studies: Sequence[StudyOf]) -> list[str]:
    return [f"{i and 1} {study.manifest.id}" for i, study in enumerate(studies)]


def _write_table(folder: Path, name: str, rows: pandas.DataFrame) -> pandas.DataFrame:
    """Write a table as parquet and CSV. Return it with exactly the columns of its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = TABLES.arrow_schema(name)
    rows = rows.reindex(columns=list(TABLES[name].names()))
    table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
    with replacing(folder / f"{name}.parquet") as temporary:
        pq.write_table(table.replace_schema_metadata(schema.metadata), temporary)
    with replacing(folder / f"{name}.csv") as temporary:
        safe_for_csv(rows).to_csv(temporary, index=False)
    return rows


# ---------------------------------------------------------------- sentences


def primary_metrics(joined: Joined, studies: Sequence[StudyOf]) -> list[tuple[str, str]]:
    """Return (task, metric) of the first metric of each task that was compared."""
    compared = {(row["task"], row["metric"]) for row in joined.rows}
    found: dict[str, str] = {}
    for task, metric in studies[0].metrics[["task", "metric"]].drop_duplicates().itertuples(index=False):
        if (task, metric) in compared:
            found.setdefault(task, metric)
    return list(found.items())


def damage(row: dict[str, Any], value: float) -> float:
    """Return a change of the metric of a row with the sign by which positive is worse."""
    return -value if row["higher_is_better"] else value


def is_control(row: dict[str, Any]) -> bool:
    """Return whether a row is of a baseline, or of a control of the whole study that removes nothing."""
    return row["target"] in ("baseline", "control")


def summary_of(joined: Joined, studies: Sequence[StudyOf]) -> list[str]:
    """Return what a comparison found, in sentences: the primary metric of each task, for each pair of models."""
    lines = [f"{studies[0].model} (a) is compared with {', '.join(one.model for one in studies[1:])} (b):"
             f" {count(len(joined.rows), 'row')}, {len(joined.left_out)} left out."]
    for task, metric in primary_metrics(joined, studies):
        for other in studies[1:]:
            rows = [row for row in joined.rows
                    if (row["task"], row["metric"], row["model_b"]) == (task, metric, other.model)]
            if rows:
                lines += ["", *_sentences(rows)]
    reasons: dict[str, int] = {}
    for one in joined.left_out:
        whole = f"{one['task']}: {one['reason']} ({one['model_a']}, {one['model_b']})"
        reasons[whole] = reasons.get(whole, 0) + 1
    if reasons:
        lines += ["", "Not compared:"]
        lines += [f"  {reason}{f': {n} cells and metrics' if n > 1 else ''}"
                  for reason, n in list(reasons.items())[:SHOWN]]
        if len(reasons) > SHOWN:
            lines.append(f"  and {len(reasons) - SHOWN} more reasons; see left_out.csv")
    return lines


def _sentences(rows: list[dict[str, Any]]) -> list[str]:
    first = rows[0]
    a, b = first["model_a"], first["model_b"]
    better = "higher" if first["higher_is_better"] else "lower"
    lines = [f"{first['task']}, {first['metric']} ({better} is better), {count(first['n'], 'example')}:"]
    for row in rows:
        if row["target"] == "baseline":
            worse = damage(row, row["difference"])
            verdict = "the same" if worse == 0 else "worse" if worse > 0 else "better"
            lines.append(f"  Without ablation {a} has {row['value_a']:.4g} and {b} has {row['value_b']:.4g}: {b} is"
                         f" {verdict} by {_size(row)} (p {p_text(row['p_value'])}).")
    cells = [row for row in rows if not is_control(row)]
    if not cells:
        return lines
    known = [row for row in cells if row["p_holm"] is not None and not is_missing(row["p_holm"])]
    sure = [row for row in known if row["p_holm"] < LEVEL]
    more = sum(damage(row, row["difference"]) > 0 for row in sure)
    lines.append(f"  Of {count(len(cells), 'ablation')}, {more} {_hurt(more)} {b} more than {a}, {len(sure) - more}"
                 f" {_hurt(len(sure) - more)} {a} more than {b}, and {len(known) - len(sure)} do not differ (p below"
                 f" {LEVEL} after Holm's correction).")
    most = max(cells, key=lambda row: abs(row["difference"]))
    lines.append(f"  The largest difference is that of {most['target']}, {region_words(most['region'])}. It changes"
                 f" {a} by {signed(most['delta_a'], None)} and {b} by {signed(most['delta_b'], None)}, a difference of"
                 f" {signed(most['difference'], most['difference_stderr'])} (p {p_text(most['p_holm'])} after the"
                 " correction).")
    return lines


def _hurt(n: int) -> str:
    return "hurts" if n == 1 else "hurt"


def _size(row: dict[str, Any]) -> str:
    return plus_minus(abs(row["difference"]), row["difference_stderr"])


# ---------------------------------------------------------------- the page


def _markdown(
    joined: Joined, studies: Sequence[StudyOf], summary: Sequence[str], drawn: Sequence[tuple[str, str, str]]
) -> str:
    lines = ["# Comparison of " + markdown_text(" and ".join(one.model for one in studies)), ""]
    lines += [f"- {markdown_text(one.model)}: `{printable(str(one.folder))}`, study {one.manifest.id}"
              for one in studies]
    lines += ["", *(markdown_text(line.strip()) + "  " if line else "" for line in summary), ""]
    lines += ["`difference` is what the ablation does to b minus what it does to a; of a baseline it is b minus a. The"
              " number after `±` is its standard error, paired over the examples. p is corrected for all ablations of"
              " the task and metric (Holm). All rows are in [compare.csv](compare.csv), and everything that was not"
              " compared is in [left_out.csv](left_out.csv).", ""]
    for task, metric in primary_metrics(joined, studies):
        lines += [f"## {markdown_text(f'{task}: {metric}')}", ""]
        rows = [row for row in joined.rows if (row["task"], row["metric"]) == (task, metric)]
        lines += ["| b | target | region | delta a | delta b | difference | p |", "|---|---|---|--:|--:|--:|--:|"]
        for row in rows[:MAX_ROWS]:
            names = " | ".join(map(markdown_text, (row["model_b"], row["target"], region_words(row["region"]))))
            deltas = " | ".join("-" if row[key] is None else signed(row[key], row[f"delta_stderr_{key[-1]}"])
                                for key in ("delta_a", "delta_b"))
            difference = signed(row["difference"], row["difference_stderr"])
            lines.append(f"| {names} | {deltas} | {difference} | {p_text(row['p_holm'])} |")
        if len(rows) > MAX_ROWS:
            lines += ["", f"The first {MAX_ROWS} of {len(rows)} rows; the others are in compare.csv."]
        lines.append("")
        for of_task, name, caption in drawn:
            if of_task == task:
                lines += [f"![{markdown_text(caption)}]({name})", ""]
    return "\n".join(lines)


def _draw(folder: Path, joined: Joined, studies: Sequence[StudyOf]) -> list[tuple[str, str, str]]:
    """Draw the figures of the primary metrics. Return (task, file name, caption) of each."""
    from harness.measurements.comparison.figures import damage_figure, heat_map_figure, order_of

    remove_figures(folder)
    drawn: list[tuple[str, str, str]] = []
    for task, metric in primary_metrics(joined, studies):
        rows = [row for row in joined.rows
                if (row["task"], row["metric"]) == (task, metric) and not is_control(row)]
        if not rows or len(drawn) + 2 > MAX_FIGURES:
            continue
        order, stem = order_of(studies[0].metrics, rows), file_stem(task, metric)
        damage_figure(rows, order, folder / f"{stem}-damage.png")
        drawn.append((task, f"{stem}-damage.png", f"What each ablation costs, and the difference: {metric} of {task}"))
        if len(order.targets) > 1 or len(studies) > 2:
            heat_map_figure(rows, order, folder / f"{stem}-difference.png")
            drawn.append((task, f"{stem}-difference.png", f"Difference of the damage, {metric} of {task}"))
    return drawn
