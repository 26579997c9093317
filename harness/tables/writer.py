"""Write the rows of one unit: check them against the schema, and rename their files into place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import write_durably
from harness.tables.identity import (
    ERROR,
    ERROR_SUFFIX,
    MERGED_PREFIX,
    OK,
    SUFFIX,
    Part,
    part_units,
    problem,
)
from harness.tables.parts import locked, merged_parts, recover, set_aside, unit_bytes
from harness.tables.schema import UNIT_ID, Column, TableSet

if TYPE_CHECKING:
    import pyarrow

# Rows of one table: either one mapping for each row, or columns, where a single value holds for every row.
Rows = Sequence[Mapping[str, Any]] | Mapping[str, Any]


@dataclass(frozen=True)
class _Unit:
    """A unit that is being written: its id, whether it failed, and the id of its run."""

    id: str
    failed: bool
    run: str


def write_unit(
    folder: str | os.PathLike, tables: TableSet, unit_id: str, rows: Mapping[str, Rows], run: str
) -> None:
    """Write one unit atomically. When this returns, the unit is done or failed; if it is killed before, it is missing.

    rows: name of a table -> the rows of this unit, with every column of the table. The primary table must be there. If
    one of its rows has the status "error", the unit is a failed one. A later success replaces a failed unit; a failure
    never replaces a success. A unit that was merged is not written again, because the same id means the same numbers.
    run: the id of the run, which the files name, so that they count in a folder of this run only.
    NaN is written as null if the column may be null. Raises ValueError for missing, unknown or ill-typed columns, and
    OSError, for example if the disk is full; no file is left behind then.
    """
    folder = Path(folder)
    if not UNIT_ID.fullmatch(unit_id) or unit_id.startswith(MERGED_PREFIX):
        raise ValueError(f"unit id: {unit_id!r} is not letters, digits, '-' and '_' only")
    if not rows.get(tables.primary.name):
        raise ValueError(f"unit {unit_id}: no rows of {tables.primary.name}; a failed unit needs one with its error")
    content = {name: _arrow_table(tables, name, unit_id, of_table) for name, of_table in rows.items()}
    states = content[tables.primary.name]["status"].to_pylist()
    errors = content[tables.primary.name]["error"].to_pylist()
    for state, error in zip(states, errors):
        if state not in (OK, ERROR):
            raise ValueError(f"unit {unit_id}: status is {state!r}, must be 'ok' or 'error'")
        if state == ERROR and not error:
            raise ValueError(f"unit {unit_id}: status is 'error' but there is no error text")
    unit = _Unit(unit_id, ERROR in states, run)
    for table in (*tables.others, tables.primary):
        if table.name in content:
            _publish(folder, tables, table.name, unit, content[table.name])
    if not unit.failed:
        (folder / ".redo" / unit_id).unlink(missing_ok=True)


def _columns(tables: TableSet, name: str, unit_id: str, rows: Rows) -> dict[str, Any]:
    names = tables[name].names()
    for row in [rows] if isinstance(rows, Mapping) else rows:
        if row.keys() != set(names):
            missing, unknown = sorted(set(names) - row.keys()), sorted(row.keys() - set(names))
            raise ValueError(f"unit {unit_id}: a row of {name} lacks columns {missing} and has unknown ones {unknown}")
    if not isinstance(rows, Mapping):
        return {column: [row[column] for row in rows] for column in names}
    lengths = {len(values) for values in rows.values() if not _is_single(values)}
    if len(lengths) != 1:
        raise ValueError(f"unit {unit_id}: columns of {name} have lengths {sorted(lengths)}, must be one length")
    n = lengths.pop()
    return {column: [values] * n if _is_single(values) else values for column, values in rows.items()}


def _is_single(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _arrow_table(tables: TableSet, name: str, unit_id: str, rows: Rows) -> pyarrow.Table:
    import pyarrow as pa

    columns, schema = _columns(tables, name, unit_id, rows), tables.arrow_schema(name)
    arrays = [_array(column, columns[column.name], schema.field(column.name).type, unit_id)
              for column in tables[name].columns]
    table = pa.Table.from_arrays(arrays, schema=schema)
    if set(table[tables.key].to_pylist()) - {unit_id}:
        raise ValueError(f"unit {unit_id}: a row of {name} belongs to unit {table[tables.key][0].as_py()}")
    return table


def _array(column: Column, values: Any, type: pyarrow.DataType, unit_id: str) -> pyarrow.Array:
    import pyarrow as pa

    try:
        array = pa.array(values, type=type, from_pandas=not column.required)  # from_pandas turns NaN into null
    except (pa.ArrowInvalid, pa.ArrowTypeError) as problem:
        raise ValueError(f"unit {unit_id}: column {column.name} is not {column.type}: {problem}") from None
    if column.required and array.null_count:
        raise ValueError(f"unit {unit_id}: column {column.name} must not be null")
    return array


def _publish(folder: Path, tables: TableSet, table: str, unit: _Unit, content: pyarrow.Table) -> None:
    live = folder / table
    (folder / ".tmp").mkdir(parents=True, exist_ok=True)
    temporary = folder / ".tmp" / f"{unit.id}.{table}.{os.getpid()}.{secrets.token_hex(4)}"
    ok_part, error_part = (Part(live / (unit.id + suffix), tables, table, unit.run)
                           for suffix in (SUFFIX, ERROR_SUFFIX))
    part = error_part if unit.failed else ok_part
    data = unit_bytes(content, part, few_rows=table == tables.primary.name)
    try:
        write_durably(temporary, data)
        if not live.is_dir():
            with locked(folder, exclusive=True):
                recover(folder, table)
                live.mkdir(exist_ok=True)
        with locked(folder):
            for existing in (ok_part, error_part):
                if _is_bad(existing):
                    set_aside(folder, table, existing.path)
            merged = any(unit.id in part_units(path, tables.key) for path in merged_parts(live)
                         if not _is_bad(Part(path, tables, table, unit.run)))
            if not merged and not (unit.failed and ok_part.path.exists()):
                os.rename(temporary, part.path)
            # This test comes after the rename: of two writers, the one that tests later sees both files.
            if merged or ok_part.path.exists():
                error_part.path.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)


def _is_bad(part: Part) -> bool:
    try:
        return problem(part) is not None
    except FileNotFoundError:
        return False
