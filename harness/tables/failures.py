"""What a report says of the units that failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from harness.tables.frames import dicts_of
from harness.tables.identity import OK
from harness.tables.text import count, is_missing

if TYPE_CHECKING:
    import pandas


def last_line(traceback: Any) -> str:
    """Return the last line of a traceback, which names the exception, or "unknown" if there is no text or a null."""
    lines = [] if is_missing(traceback) else traceback.strip().splitlines()
    return lines[-1] if lines else "unknown"


def failed_rows(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows of a primary table that belong to failed units."""
    return rows[rows["status"] != OK]


def failure_lines(rows: pandas.DataFrame, name: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """Return one line for each failed row of a primary table. name: a function that returns the name of a row's unit.
    """
    return [f"failed: {name(row)}: {last_line(row['error'])}" for row in dicts_of(failed_rows(rows))]


def failure_count(rows: pandas.DataFrame, key: str, thing: str) -> list[str]:
    """Return one line that counts the failed units of a primary table and shows the first error, or no line.

    key: the column with the id of a unit. thing: what a unit is called, such as "cell".
    """
    failed = failed_rows(rows)
    if failed.empty:
        return []
    return [f"{count(failed[key].nunique(), thing)} failed; the first: {last_line(failed['error'].iloc[0])}"]
