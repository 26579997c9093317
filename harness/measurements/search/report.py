"""The report of a search: its verdict as text, and its tables as Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.engine.manifest import read_in_order
from harness.engine.page import write_run_page
from harness.errors import printable
from harness.files import replacing, write_text
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.search.page import page_of
from harness.measurements.search.tables import TABLES
from harness.tables.drawing import can_draw
from harness.tables.failures import failure_lines
from harness.tables.frames import dicts_of
from harness.tables.labels import region_words
from harness.tables.text import count, is_missing, markdown_table, markdown_text, p_text, safe_for_csv

if TYPE_CHECKING:
    import pandas

# Tables on the page. The predictions are not shown, because they have a row for each cell.
SHOWN = ("verdict", "beside", "comparison", "composition")
GRID = Path("studies", "selection")  # the study of the grid, inside the folder of a search
FIGURE = "grid.png"
CONTROLS = {
    "random": "random", "random_disjoint": "random elsewhere", "energy_matched": "same energy",
    "energy_matched_disjoint": "same energy elsewhere",
}  # fmt: skip
TITLES = {
    "verdict": "The best cell of every metric, chosen on the selection part and judged on the report part",
    "beside": "What the best cells cost on the tasks without parts",
    "comparison": "How well the predictions by gradients rank the measured cells",
    "composition": "Several matrices at once, block after block",
}


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path | None:
    """Print the verdict, and write search.md, index.html, a figure and a CSV file for each table into <folder>/report/.

    The last lines that are printed are one sentence for each metric. Deltas below the noise floor of low precision are
    in parentheses.
    write: a function that prints the text. Returns the path of search.md, or None if no stage has rows yet. Raises
    SchemaVersionError.
    """
    folder = Path(folder)
    stages = read_in_order(folder, TABLES, "stages")
    if stages.empty:
        write(f"{folder}: no stage has been measured yet")
        return None
    out = folder / "report"
    out.mkdir(exist_ok=True)
    problems = failure_lines(stages, lambda row: row["stage"])
    verdict = read_in_order(folder, TABLES, "verdict")
    said = sentences(verdict)
    lines, files = ["# Search", "", *(f"> {markdown_text(problem)}" for problem in problems), ""], 0
    lines += [*(f"- {markdown_text(one)}" for one in said), ""] if said else []
    if _draw(folder, verdict, out / FIGURE):
        lines += ["![Improvement of each searched metric over blocks and regions on the selection part; blue is better,"
                  f" the star is the best cell, and grey was not measured]({FIGURE})", ""]
    on_page: dict[str, tuple[str, pandas.DataFrame]] = {}
    for name in TABLES.names()[1:]:
        rows = read_in_order(folder, TABLES, name).drop(columns=TABLES.key)
        if rows.empty:
            continue
        with replacing(out / f"{name}.csv") as temporary:
            safe_for_csv(rows).to_csv(temporary, index=False)
        files += 1
        if name in SHOWN:
            on_page[name] = TITLES[name], rows
            more = "All columns are in [verdict.csv](verdict.csv)." if name == "verdict" else ""
            lines += [f"## {TITLES[name]}", "", verdict_table(rows) if name == "verdict" else _table(_worded(rows)), ""]
            lines += [more, ""] if more else []
    write_text(out / "search.md", "\n".join(lines))
    write_run_page(folder, TABLES, stages, page_of(folder / GRID, said, on_page, problems))
    shown = [verdict_table(verdict), ""] if len(verdict) else []
    write("\n".join([*shown, *map(printable, [*said, *problems])]).rstrip())
    write(f"\n{out / 'search.md'} and {count(files, 'table')} as CSV")
    return out / "search.md"


def sentences(verdict: pandas.DataFrame) -> list[str]:
    """Return one sentence for each row of the table `verdict`: what the best cell does to examples that did not choose
    it, beside its controls."""
    found = []
    for row in dicts_of(verdict):
        what = f"{row['task']}, {row['metric']}: {row['target']}, {region_words(row['region'])}"
        if is_missing(row["value"]) or is_missing(row["n"]):
            found.append(f"{what}: {row['verdict']}, no value on the report part")
            continue
        drawn = [f"{words} {_signed(row[f'{name}_delta'])}" for name, words in CONTROLS.items()
                 if not is_missing(row[f"{name}_delta"])]
        controls = f", controls {', '.join(drawn)}" if drawn else ""
        found.append(f"{what}: {_number(row['baseline'])} -> {_number(row['value'])} on"
                     f" {count(int(row['n']), 'fresh example')}{controls}: {row['verdict']}")
    return found


def verdict_table(verdict: pandas.DataFrame) -> str:
    """Return the table `verdict` as Markdown with eight columns."""
    rows = []
    for row in dicts_of(verdict):
        delta = "" if is_missing(row["delta"]) else _signed(row["delta"])
        if delta and not is_missing(row["delta_low"]):
            delta += f" ({_signed(row['delta_low'])} to {_signed(row['delta_high'])})"
        below = not is_missing(row["noise_floor"]) and abs(row["delta"]) < row["noise_floor"]
        rows.append({
            "task": row["task"], "metric": row["metric"], "cell": f"{row['target']}, {region_words(row['region'])}",
            "baseline": _number(row["baseline"]), "value": _number(row["value"]),
            "delta (95 % interval)": f"({delta})" if delta and below else delta, "p (Holm)": p_text(row["p_holm"]),
            "verdict": row["verdict"],
        })
    return markdown_table(rows).rstrip()


def _number(value: float | None) -> str:
    if value is None or is_missing(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+.4g}"


def _worded(rows: pandas.DataFrame) -> pandas.DataFrame:
    return rows.assign(**{name: rows[name].map(region_words) for name in ("region", "cells") if name in rows})


def _draw(folder: Path, verdict: pandas.DataFrame, path: Path) -> bool:
    """Draw the grid if there is one. Return whether there is a figure now."""
    path.unlink(missing_ok=True)
    if not can_draw() or not (folder / GRID / "metrics").is_dir():
        return False
    import numpy as np

    from harness.measurements.search.figures import grid_figure

    rows = read_metrics(folder / GRID)
    rows = rows[(rows["status"] == "ok") & (rows["region_by"] != "control") & rows["delta"].notna()]
    better = np.where(rows["higher_is_better"].astype(bool), rows["delta"], -rows["delta"])
    return grid_figure(rows.assign(improvement=better), verdict, path) is not None


def _table(rows: pandas.DataFrame) -> str:
    shown = rows.dropna(axis="columns", how="all")
    texts = shown.astype(object).where(shown.notna(), "")
    if "noise_floor" in shown:
        noise = shown.delta.abs() < shown.noise_floor
        texts["delta"] = texts.delta.where(~noise, shown.delta.map("({:.4g})".format))
    return markdown_table(dicts_of(texts)).rstrip()
