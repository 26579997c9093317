"""The report of a search: its verdict as text, and its tables as Markdown and CSV."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from harness.engine.manifest import read_in_order
from harness.errors import printable
from harness.files import replacing, write_text
from harness.measurements.search.tables import TABLES
from harness.tables.frames import dicts_of, rows_of
from harness.tables.text import count, markdown_table, markdown_text, safe_for_csv

if TYPE_CHECKING:
    import pandas

# Tables on the page. The predictions are not shown, because they have a row for each cell.
SHOWN = ("verdict", "beside", "comparison", "composition")
SUMMARY = ("task", "metric", "target", "region", "baseline", "value", "delta", "noise_floor", "p_holm", "verdict")
TITLES = {
    "verdict": "The best cell of every metric, chosen on the selection part and judged on the report part",
    "beside": "What the best cells cost on the tasks without parts",
    "comparison": "How well the predictions by gradients rank the measured cells",
    "composition": "Several matrices at once, block after block",
}


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path | None:
    """Print the verdict, and write search.md and a CSV file for each table into <folder>/report/.

    Deltas below the noise floor of low precision are in parentheses.
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
    problems = [f"{row.stage}: {(row.error or '').strip().splitlines()[-1]}"
                for row in rows_of(stages[stages.status != "ok"])]
    lines, files = ["# Search", "", *(f"> {markdown_text(problem)}" for problem in problems), ""], 0
    for name in TABLES.names()[1:]:
        rows = read_in_order(folder, TABLES, name).drop(columns=TABLES.key)
        if rows.empty:
            continue
        with replacing(out / f"{name}.csv") as temporary:
            safe_for_csv(rows).to_csv(temporary, index=False)
        files += 1
        if name in SHOWN:
            lines += [f"## {TITLES[name]}", "", _table(rows), ""]
    write_text(out / "search.md", "\n".join(lines))
    verdict = read_in_order(folder, TABLES, "verdict")
    write("\n".join([*([_table(verdict[list(SUMMARY)])] if len(verdict) else []), *map(printable, problems)]).rstrip())
    write(f"\n{out / 'search.md'} and {count(files, 'table')} as CSV")
    return out / "search.md"


def _table(rows: pandas.DataFrame) -> str:
    shown = rows.dropna(axis="columns", how="all")
    texts = shown.astype(object).where(shown.notna(), "")
    if "noise_floor" in shown:
        noise = shown.delta.abs() < shown.noise_floor
        texts["delta"] = texts.delta.where(~noise, shown.delta.map("({:.4g})".format))
    return markdown_table(dicts_of(texts)).rstrip()
