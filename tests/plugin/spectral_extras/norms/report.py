"""Norms as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.engine.manifest import in_order
from harness.files import write_text
from harness.tables.store import read_table
from harness.tables.text import markdown_table
from spectral_extras.norms.tables import TABLES


def report(folder: Path, write: Callable[[str], object] = print) -> Path | None:
    """Write <folder>/report/norms.md."""
    rows = in_order(folder, read_table(folder, TABLES, "norms"), TABLES.key)
    if rows.empty:
        return None
    page = Path(folder) / "report" / "norms.md"
    write_text(page, markdown_table(rows[["matrix", "frobenius", "largest_row"]].to_dict("records")))
    write(page.read_text())
    return page
