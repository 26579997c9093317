"""The page of any run: what its report hands in, and what every run has, which is settings, versions and failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import settings_of
from harness.tables.frames import dicts_of
from harness.tables.page import Page, write_page
from harness.tables.schema import PROVENANCE, TableSet

if TYPE_CHECKING:
    import pandas

PAGE = "index.html"
# Columns beside those of PROVENANCE that say with what a run was measured, where its primary table has them.
_WITH = ("model", "revision", "gguf_file", "model_digest", "model_type", "dtype", "device", "edit", "seed")
_MOST_VALUES = 3


def write_run_page(folder: Path, tables: TableSet, rows: pandas.DataFrame, page: Page) -> Path:
    """Write <folder>/report/index.html, and return its path.

    rows: the primary table with the rows of failed units, from which come the failures and the versions. page: what the
    report of the measurement shows; its settings stay, and those of the manifest are added.
    """
    failed = rows[rows["status"] == "error"].drop_duplicates(tables.key)
    failures = [(_name(row, tables), str(row["error"] or "unknown")) for row in dicts_of(failed)]
    settings = _versions(rows) | dict(page.settings) | settings_of(folder)
    path = folder / "report" / PAGE
    write_page(replace(page, settings=settings, failures=[*page.failures, *failures]), path)
    return path


def captioned(out: Path, names: Sequence[str], captions: Sequence[str] | None = None) -> list[tuple[Path, str]]:
    """Return pictures in a folder with their captions, by default their names, for a Section."""
    return [(out / name, caption) for name, caption in zip(names, captions or names)]


def _name(row: dict[str, Any], tables: TableSet) -> str:
    words = [str(row[column]) for column in tables.label if isinstance(row.get(column), (str, int))]
    return f"{', '.join(words)} ({row[tables.key]})"


def _versions(rows: pandas.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (*_WITH, *(column.name for column in PROVENANCE)):
        values = sorted(rows[name].dropna().unique(), key=str) if name in rows else []
        if values:
            more = f" and others, to {values[-1]}" if len(values) > _MOST_VALUES else ""
            found[name] = ", ".join(map(str, values[:_MOST_VALUES])) + more
    return found
