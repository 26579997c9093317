"""A copy of the rows of one unit in the footer of its parquet file, which takes far less time to read than the pages.

To open a parquet file and to decode its 78 columns takes most of a millisecond, so that thousands of files of single
units took most of the time of a report. The copy is JSON in the key-value metadata, where other readers ignore it. A
digest of the whole file stands before it: the copy is used only if every byte of the file is as the harness wrote it,
and if the schema is the one of today. A file that was damaged, or that another program wrote anew together with its
metadata, is read from its pages, as a file without a copy is.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

KEY = b"harness.rows"
MOST_ROWS = 32  # in a file with a copy: of more rows the pages are not slower
_MARK = KEY + b" "  # how the value begins; then: digest of the schema, length of the copy, digest of the file, the copy
_SCHEMA, _LENGTH, _FILE = 16, 8, 32  # characters
_UNKNOWN = b"0" * _FILE  # the digest of the file while it is computed


def copied(content: pyarrow.Table) -> dict[bytes, bytes]:
    """Return the metadata for a file with these rows, which `sealed` completes; none for too many rows."""
    if content.num_rows > MOST_ROWS:
        return {}
    rows = json.dumps([column.to_pylist() for column in content.columns], separators=(",", ":")).encode()
    return {KEY: _MARK + _digest_of_schema(content.schema) + f"{len(rows):0{_LENGTH}x}".encode() + _UNKNOWN + rows}


def sealed(file: bytes) -> bytes:
    """Return the content of a parquet file with the digest before its copy; unchanged if there is no copy."""
    at = _found(file)
    if at is None:
        return file
    return file[: at - _FILE] + _digest_of_file(file, at) + file[at:]


class Copies:
    """The rows of many files, gathered from their copies. schema: that of their table."""

    def __init__(self, schema: pyarrow.Schema) -> None:
        self._schema, self._digest = schema, _digest_of_schema(schema)
        self._columns: list[list[Any]] = [[] for _ in schema.names]

    def add(self, file: bytes) -> int:
        """Add the rows in the content of a file, and return their number; 0 without a copy that can be trusted."""
        at = _found(file)
        if at is None or file[at - _FILE : at] != _digest_of_file(file, at):
            return 0
        length = at - _FILE - _LENGTH
        if file[length - _SCHEMA : length] != self._digest:
            return 0
        columns = json.loads(file[at : at + int(file[length : length + _LENGTH], 16)])
        for whole, values in zip(self._columns, columns):
            whole += values
        return len(columns[0])

    def table(self) -> pyarrow.Table:
        """Return all rows that were added, in the order of their files."""
        import pyarrow as pa

        arrays = [pa.array(values, field.type) for values, field in zip(self._columns, self._schema)]
        return pa.Table.from_arrays(arrays, schema=self._schema)


def _found(file: bytes) -> int | None:
    """Return where the copy begins in a parquet file."""
    footer = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    mark = file.find(_MARK, max(0, footer))
    return None if mark < 0 else mark + len(_MARK) + _SCHEMA + _LENGTH + _FILE


def _digest_of_file(file: bytes, at: int) -> bytes:
    digest = hashlib.blake2b(file[: at - _FILE], digest_size=_FILE // 2)
    digest.update(_UNKNOWN)
    digest.update(file[at:])
    return digest.hexdigest().encode()


def _digest_of_schema(schema: pyarrow.Schema) -> bytes:
    """Return a digest of the names and types of the columns, and of which of them may be null."""
    fields = repr([(field.name, str(field.type), field.nullable) for field in schema])
    return hashlib.blake2b(fields.encode(), digest_size=_SCHEMA // 2).hexdigest().encode()
