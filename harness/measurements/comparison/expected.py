"""Numbers that were published, beside those that a run measured: the file expected.csv (docs/compare.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import read_in_order, read_manifest
from harness.errors import InputError, one_line, printable
from harness.files import replacing, told_in_one_line, write_text
from harness.measurements import find
from harness.registry import nearest
from harness.tables.frames import dicts_of
from harness.tables.schema import TableSet
from harness.tables.text import aligned, is_missing, markdown_table, safe_for_csv

if TYPE_CHECKING:
    import pandas

OWN = ("expected", "column", "table", "over", "tolerance", "source")
ADDED = ("measured", "measured_stderr", "n_rows", "difference", "agrees", "status")
OVER = ("mean", "sum", "min", "max")
_STDERR_OF = {"value": "stderr", "delta": "delta_stderr"}
_SHOWN = 60


@dataclass(frozen=True)
class Expected:
    """One published number.

    number: its row in the file, from 1. columns: the column of the table that holds it, or two for a quotient. keys:
    column -> the text of the value that a row must have. line: the whole row of the file.
    """

    number: int
    expected: float
    columns: tuple[str, ...]
    table: str
    over: str | None
    tolerance: float | None
    keys: Mapping[str, str]
    line: Mapping[str, str]


def against(folder: str | Path, file: str | Path, write: Callable[[str], object] = print) -> pandas.DataFrame:
    """Compare a run with published numbers. Write report/expected.csv and expected.md into its folder, and a summary.

    file: a CSV file as docs/compare.md describes it. Returns the rows of the file with the columns ADDED. Raises
    InputError if the folder holds no run, or the file has a column, a table or a number that cannot be.
    """
    import pandas

    folder, file = Path(folder), Path(file)
    tables = find(read_manifest(folder).kind).tables
    asked = read_expected(file, tables)
    known: dict[str, pandas.DataFrame] = {}
    rows = []
    for one in asked:
        if one.table not in known:
            known[one.table] = read_in_order(folder, tables, one.table)
        rows.append({**one.line, **_measured(file, one, known[one.table])})
    found = pandas.DataFrame(rows)
    out = folder / "report"
    with told_in_one_line(folder):
        with replacing(out / "expected.csv") as temporary:
            safe_for_csv(found).to_csv(temporary, index=False)
        shown = found.drop(columns=[name for name in found if name in one.line and not (found[name] != "").any()])
        texts = [{key: "" if value is None or is_missing(value) else value for key, value in row.items()}
                 for row in dicts_of(shown.astype(object))]
        write_text(out / "expected.md", f"# Measured against published\n\n{markdown_table(texts)}")
    write("\n".join([*map(printable, _summary(rows)), "", f"{printable(str(out / 'expected.md'))} and .csv"]))
    return found


def read_expected(file: Path, tables: TableSet) -> list[Expected]:
    """Return the numbers of a file. tables: those of the run, by which its columns are checked. Raises InputError."""
    import pandas

    try:
        content = pandas.read_csv(file, dtype=str, keep_default_na=False, comment="#")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give the path of a CSV file (docs/compare.md)") from None
    except (OSError, ValueError) as error:  # pandas' errors of parsing and of decoding are ValueErrors
        reason = one_line(error)
        raise InputError(f"{file}: not readable as CSV ({reason}); docs/compare.md says what it holds") from error
    for name in ("expected", "column"):
        if name not in content.columns:
            raise InputError(f"{file}: it has no column {name!r}; docs/compare.md says what the file holds")
    if content.empty:
        raise InputError(f"{file}: it has no rows; each row is one published number")
    return [_expected(file, number, line, tables) for number, line in enumerate(dicts_of(content), start=1)]


def _expected(file: Path, number: int, line: Mapping[str, str], tables: TableSet) -> Expected:
    where = f"{file} row {number}"
    table = line.get("table") or tables.primary.name
    if table not in tables.names():
        raise InputError(f"{where}: {table!r} is no table of {tables.measurement}; it has {', '.join(tables.names())}")
    names = tables[table].names()
    keys = {key: value for key, value in line.items()
            if key not in OWN and not str(key).startswith("note") and value != ""}
    columns = tuple(line["column"].split("/"))
    for name in (*columns, *keys):
        if name not in names:
            near = nearest(str(name), list(names))
            raise InputError(f"{where}: {name!r} is no column of the table {table}; {near}docs/tables.md lists them")
    types = {column.name: column.type for column in tables[table].columns}
    for name in columns:
        if types[name] not in ("float64", "int64") or len(columns) > 2:
            raise InputError(f"{where}: column {line['column']!r} must be a column of numbers, or a quotient of two")
    over = line.get("over") or None
    if over is not None and over not in OVER:
        raise InputError(f"{where}: over {over!r} is wrong; use {', '.join(OVER)} or leave it empty")
    expected = _number(where, "expected", line["expected"])
    if expected is None:
        raise InputError(f"{where}: expected is empty; give the published number")
    tolerance = _number(where, "tolerance", line.get("tolerance", ""))
    return Expected(number, expected, columns, table, over, tolerance, keys, line)


def _number(where: str, name: str, text: str) -> float | None:
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or name == "tolerance" and value < 0:
        raise InputError(f"{where}: {name} {text[:80]!r} is wrong; give a finite number, with a point and no unit")
    return value


def _measured(file: Path, one: Expected, rows: pandas.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(ADDED)
    for key, text in one.keys.items():
        rows = rows[_equals(rows[key], text)]
    there = rows if "status" not in rows else rows[rows["status"] == "ok"]
    found |= {"n_rows": len(there), "status": "measured" if len(there) else "failed" if len(rows) else "not measured"}
    if not len(there):
        return found
    if one.over is None and len(there) > 1:
        differ = [name for name in there.columns if there[name].nunique(dropna=False) > 1 and name not in one.columns]
        raise InputError(f"{file} row {one.number}: {len(there)} rows of {one.table} match, which differ in"
                         f" {', '.join(differ[:6])}; give more columns, or set over to {', '.join(OVER)}")
    values = there[one.columns[0]].astype(float)
    if len(one.columns) == 2:
        values = values / there[one.columns[1]].astype(float)
    measured = float(getattr(values, one.over)() if one.over else values.iloc[0])
    if not math.isfinite(measured):
        return found | {"status": "not measured"}
    stderr = None
    if len(there) == 1 and len(one.columns) == 1:
        column = _STDERR_OF.get(one.columns[0])
        if column in there and not is_missing(there[column].iloc[0]):
            stderr = float(there[column].iloc[0])
    difference = measured - one.expected
    agrees = None
    if stderr is not None or one.tolerance is not None:
        # The last digits of a decimal number are not exact in binary.
        room = (one.tolerance or 0.0) + 1.96 * (stderr or 0.0)
        agrees = bool(abs(difference) <= room + 1e-12 * max(1.0, abs(one.expected)))
    return found | {"measured": measured, "measured_stderr": stderr, "difference": difference, "agrees": agrees}


def _equals(column: pandas.Series, text: str) -> pandas.Series[bool]:
    """Return which values of a column a text means; numbers are compared as numbers."""
    if column.dtype.kind in "if":
        try:
            value = float(text)
        except ValueError:
            return column != column
        return (column - value).abs() <= 1e-9 * max(1.0, abs(value))
    if column.dtype.kind == "b":
        return column == (text.lower() == "true")
    return column.astype(object).map(str) == text


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    there = [row for row in rows if row["status"] == "measured"]
    judged = [row for row in there if row["agrees"] is not None]
    lines = [f"{len(there)} of {len(rows)} published numbers were measured here"
             f"; of the {len(judged)} with an error or a tolerance, {sum(row['agrees'] for row in judged)} agree."]
    keys = [key for key in rows[0] if key not in (*OWN, *ADDED) and any(row[key] for row in rows)]
    head = [*keys, "column", "expected", "measured", "difference", "agrees"]
    body = []
    for row in rows[:_SHOWN]:
        cells = [str(row[key]) for key in [*keys, "column", "expected"]]
        cells += ["-" if row[key] is None else f"{row[key]:.4g}" for key in ("measured", "difference")]
        body.append([*cells, {None: "-", True: "yes", False: "no"}[row["agrees"]] if row["status"] == "measured"
                     else row["status"]])
    lines += aligned([head, *body], len(keys) + 1)
    return lines + [f"and {len(rows) - _SHOWN} more rows"] * (len(rows) > _SHOWN)
