"""Take back the rows of done units that turned out to be wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from harness.files import write_text
from harness.tables.compact import ROWS_PER_GROUP
from harness.tables.frames import dicts_of
from harness.tables.identity import ERROR, OK, SUFFIX, BadPart, Part, part_units, units_file
from harness.tables.parts import MERGED_LIST, label_units, locked, merged_parts, new_merged_name, open_writer, set_aside
from harness.tables.reader import read_table, unit_states
from harness.tables.rows import read_merged
from harness.tables.schema import TableSet
from harness.tables.writer import write_unit


def withdraw(folder: str | os.PathLike, tables: TableSet, units: Iterable[str], run: str, reason: str) -> None:
    """Turn done units into failed ones. Units that are not done stay as they are.

    The files of a unit go to corrupt/. Its error rows keep the columns that are never null, and `error` is the reason.
    run: the id of the run. A merged part with such units goes to corrupt/, too, and a part with its other units takes
    its place; if the process dies between the two, these other units are missing. Raises OSError.
    """
    folder, primary = Path(folder), tables.primary
    states = unit_states(folder, tables)
    done = [unit for unit in units if states.get(unit) == OK]
    rows: dict[str, list[dict]] = {unit: [] for unit in done}
    required = [column.name for column in primary.columns if column.required]
    for row in dicts_of(read_table(folder, tables, primary.name, done)):
        kept = {name: row[name] for name in required}
        rows[row[tables.key]].append({**primary.blank(), **kept, "status": ERROR, "error": reason})
    # A compaction that is under way would merge what is withdrawn meanwhile.
    with locked(folder, exclusive=True, name=".compact.lock"), locked(folder, exclusive=True):
        for table in tables.names():
            for unit in done:
                path = folder / table / (unit + SUFFIX)
                if path.exists():
                    set_aside(folder, table, path)
            for path in merged_parts(folder / table):
                if not part_units(path, tables.key).isdisjoint(done):
                    _cut_out(folder, Part(path, tables, table, run), frozenset(done))
    for unit in done:
        write_unit(folder, tables, unit, {primary.name: rows[unit]}, run)


def _cut_out(folder: Path, part: Part, units: frozenset[str]) -> None:
    """Replace a merged part by one without these units. The caller must hold the exclusive lock."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        content = read_merged(part)
    except BadPart:
        return  # nobody reads it, and the next run sets it aside
    key, live = part.tables.key, part.path.parent
    left = sorted(part_units(part.path, key) - units)
    new = Part(live / new_merged_name(), part.tables, part.table, part.run)
    temporary = folder / ".tmp" / new.path.name
    if left:
        temporary.parent.mkdir(exist_ok=True)
        with open_writer(temporary, new) as writer:
            inside = pc.is_in(content[key], value_set=pa.array(sorted(units), pa.string()))
            writer.write_table(content.filter(pc.invert(inside)), row_group_size=ROWS_PER_GROUP)
            label_units(writer, left)
        write_text(units_file(new.path), "\n".join(left))
        write_text(live / MERGED_LIST, "\n".join([*(one.name for one in merged_parts(live)), new.path.name]))
    set_aside(folder, part.table, part.path)
    units_file(part.path).unlink(missing_ok=True)
    if left:
        os.rename(temporary, new.path)
