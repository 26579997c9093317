"""The store of tables: write, read, states of units, damaged files and compaction; parts.py describes its layout."""

from harness.tables.compact import compact
from harness.tables.parts import Listing, list_table
from harness.tables.reader import (
    CorruptPart,
    SkippedParts,
    corrupt_parts,
    failed_since,
    quarantine,
    read_table,
    states_and_damage,
    unit_states,
)
from harness.tables.withdrawal import withdraw
from harness.tables.writer import Rows, write_unit

__all__ = [
    "CorruptPart",
    "Listing",
    "Rows",
    "SkippedParts",
    "compact",
    "corrupt_parts",
    "failed_since",
    "list_table",
    "quarantine",
    "read_table",
    "states_and_damage",
    "unit_states",
    "withdraw",
    "write_unit",
]
