"""Write one cell: checked against the schema, then renamed into place."""

from __future__ import annotations

import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.tables.parts import (
    ERROR,
    ERROR_SUFFIX,
    MERGED_PREFIX,
    OK,
    SUFFIX,
    locked,
    looks_like_parquet,
    merged_parts,
    open_writer,
    part_cells,
    recover,
    set_aside,
)
from harness.tables.schema import TABLES, arrow_schema, column_names

_CELL_ID = re.compile(r"[A-Za-z0-9_\-]+")


def write_cell(
    folder: str | os.PathLike,
    cell_id: str,
    metric_rows: Sequence[Mapping[str, object]],
    example_rows: Mapping[str, object] | None = None,
) -> None:
    """Write one cell atomically: when this returns the cell is done (or failed); if killed before, it never was.

    metric_rows: one mapping per metric, with every column of the schema as a key (`blank_row()`); all of this cell.
        If any has status "error" the cell is a failed one. A later success replaces it; a failure never replaces a
        success, and a cell that was merged is not written again (its id says that the numbers are the same).
    example_rows: column -> array of length n, or a single string standing for all n; every column of "examples".
    Raises ValueError for missing, unknown or ill-typed columns and for an ok row whose value is not finite;
    OSError (disk full, ...) with nothing left behind.
    """
    folder = Path(folder)
    if not _CELL_ID.fullmatch(cell_id) or cell_id.startswith(MERGED_PREFIX):
        raise ValueError(f"cell_id: {cell_id!r} is not letters, digits, '-' and '_' only")
    metrics = _metrics_table(cell_id, metric_rows)
    examples = _examples_table(cell_id, example_rows) if example_rows is not None else None
    failed = any(row["status"] == ERROR for row in metric_rows)
    if examples is not None:
        _publish(folder, "examples", cell_id, examples, failed)
    _publish(folder, "metrics", cell_id, metrics, failed)
    if not failed:
        (folder / ".redo" / cell_id).unlink(missing_ok=True)


def _metrics_table(cell_id, rows):
    if not rows:
        raise ValueError(f"cell {cell_id}: no metric rows; a failed cell needs a row with status 'error'")
    names = column_names("metrics")
    for row in rows:
        _check_keys(cell_id, "metrics", row, names)
        if row["status"] not in (OK, ERROR):
            raise ValueError(f"cell {cell_id}: status is {row['status']!r}, must be 'ok' or 'error'")
        if row["status"] == OK and (row["value"] is None or not math.isfinite(row["value"])):
            raise ValueError(f"cell {cell_id}: {row['metric']} is {row['value']} but its status is 'ok'")
        if row["status"] == ERROR and not row["error"]:
            raise ValueError(f"cell {cell_id}: {row['metric']} has status 'error' but no error text")
    return _table(cell_id, "metrics", {name: [row[name] for row in rows] for name in names})


def _examples_table(cell_id, columns):
    _check_keys(cell_id, "examples", columns, column_names("examples"))
    lengths = {len(values) for values in columns.values() if not isinstance(values, str)}
    if len(lengths) != 1:
        raise ValueError(f"cell {cell_id}: columns of examples have lengths {sorted(lengths)}, must be one length")
    n = lengths.pop()
    return _table(cell_id, "examples", {k: [v] * n if isinstance(v, str) else v for k, v in columns.items()})


def _check_keys(cell_id, table, row, names):
    if row.keys() != set(names):
        missing, unknown = sorted(set(names) - row.keys()), sorted(row.keys() - set(names))
        raise ValueError(f"cell {cell_id}: {table} row has missing columns {missing} and unknown columns {unknown}")


def _table(cell_id, table, columns):
    import pyarrow as pa

    schema = arrow_schema(table)
    arrays = []
    for column, field in zip(TABLES[table], schema):
        try:
            array = pa.array(columns[column.name], type=field.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as problem:
            raise ValueError(f"cell {cell_id}: column {column.name} is not {column.type}: {problem}") from None
        if column.required and array.null_count:
            raise ValueError(f"cell {cell_id}: column {column.name} must not be null")
        if column.name == "cell_id" and set(array.to_pylist()) - {cell_id}:
            raise ValueError(f"cell {cell_id}: {table} row belongs to cell {array[0].as_py()}")
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=schema)


def _publish(folder: Path, table: str, cell_id: str, content, failed: bool) -> None:
    live = folder / table
    (folder / ".tmp").mkdir(parents=True, exist_ok=True)
    temporary = folder / ".tmp" / f"{cell_id}.{table}.{os.getpid()}.{secrets.token_hex(4)}"
    with open_writer(temporary, table, small=table == "metrics") as writer:
        writer.write_table(content)
    ok_file, error_file = live / (cell_id + SUFFIX), live / (cell_id + ERROR_SUFFIX)
    try:
        if not live.is_dir():
            with locked(folder, exclusive=True):
                recover(folder, table)
                live.mkdir(exist_ok=True)
        with locked(folder):
            for existing in (ok_file, error_file):
                if existing.exists() and not looks_like_parquet(existing):
                    set_aside(folder, table, existing)
            merged = any(cell_id in part_cells(p) for p in merged_parts(live) if looks_like_parquet(p))
            if not merged and not (failed and ok_file.exists()):
                os.rename(temporary, error_file if failed else ok_file)
            # Looked at after the rename: of two writers, the later one to look sees both files.
            if merged or ok_file.exists():
                error_file.unlink(missing_ok=True)
    finally:
        temporary.unlink(missing_ok=True)
