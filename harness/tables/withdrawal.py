"""Take back the rows of done units that turned out to be wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from harness.tables.frames import dicts_of
from harness.tables.identity import ERROR, OK, SUFFIX, part_units
from harness.tables.parts import locked, mark_redo, merged_parts, set_aside
from harness.tables.reader import read_table, unit_states
from harness.tables.schema import TableSet
from harness.tables.writer import write_unit


def withdraw(folder: str | os.PathLike, tables: TableSet, units: Iterable[str], run: str, reason: str) -> None:
    """Turn done units into failed ones. Units that are not done stay as they are.

    The files of a unit go to corrupt/. Its error rows keep the columns that are never null, and `error` is the reason.
    run: the id of the run. A unit that `compact` has merged meanwhile counts as missing until it is done again. Raises
    OSError.
    """
    folder, primary = Path(folder), tables.primary
    states = unit_states(folder, tables)
    done = [unit for unit in units if states.get(unit) == OK]
    rows: dict[str, list[dict]] = {unit: [] for unit in done}
    required = [column.name for column in primary.columns if column.required]
    for row in dicts_of(read_table(folder, tables, primary.name, done)):
        kept = {name: row[name] for name in required}
        rows[row[tables.key]].append({**primary.blank(), **kept, "status": ERROR, "error": reason})
    for unit in done:
        with locked(folder, exclusive=True):
            for table in tables.names():
                path = folder / table / (unit + SUFFIX)
                if path.exists():
                    set_aside(folder, table, path)
                if any(unit in part_units(part, tables.key) for part in merged_parts(folder / table)):
                    mark_redo(folder, [unit])
        write_unit(folder, tables, unit, {primary.name: rows[unit]}, run)
