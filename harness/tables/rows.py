"""Read the rows of parts. They are compared with the label of their part, and with the schema of the table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from harness.tables.identity import DESCRIPTION, ERROR, MERGED, OK, BadPart, Part, part_units, problem
from harness.tables.row_copy import Copies

if TYPE_CHECKING:
    import pyarrow

_THREADS = 8  # that read files
_AT_ONCE = 64  # files that are in memory before they are decoded


def read_merged(part: Part, units: Iterable[str] | None = None) -> pyarrow.Table:
    """Return the rows of a merged part, of some units or of all (None).

    Raises BadPart, SchemaVersionError and FileNotFoundError.
    """
    import pyarrow.parquet as pq

    _require_label(part)
    with _as_bad_part():
        if units is None:
            content = pq.ParquetFile(part.path, page_checksum_verification=True).read()
        else:  # merged parts are sorted by unit, so that most row groups are skipped by their statistics
            filters = [(part.tables.key, "in", set(units))]
            content = pq.read_table(part.path, filters=filters, partitioning=None, page_checksum_verification=True)
        _check_columns(part, content)
        _check_rows(part, content, units is None)
    return content.replace_schema_metadata(part.tables.arrow_schema(part.table).metadata)


def read_loose(parts: Sequence[Part]) -> tuple[pyarrow.Table, dict[Path, str]]:
    """Return the rows of parts of single units, one part after the other, and the reasons by the paths of the bad ones.

    A bad part has no rows there. parts: of one table, at least one. Raises SchemaVersionError and FileNotFoundError.
    """
    import pyarrow as pa

    schema = parts[0].tables.arrow_schema(parts[0].table)
    bad: dict[Path, str] = {}
    copies = Copies(schema)
    copied: list[tuple[Part, int]] = []  # with the number of their rows
    decoded: list[tuple[Part, pyarrow.Table]] = []
    for part, content in _bytes_of(parts):
        if isinstance(content, BadPart):
            bad[part.path] = str(content)
        elif n := copies.add(content):
            copied.append((part, n))
        else:
            try:
                decoded.append((part, _decoded(part, content)))
            except BadPart as reason:
                bad[part.path] = str(reason)
    whole = pa.concat_tables([copies.table(), *(content for _, content in decoded)])
    lengths = [*copied, *((part, content.num_rows) for part, content in decoded)]
    if _are_theirs(lengths, whole):
        return whole, bad
    good, start = [schema.empty_table()], 0
    for part, n in lengths:
        content, start = whole.slice(start, n), start + n
        try:
            with _as_bad_part():
                _check_rows(part, content, True)
            good.append(content)
        except BadPart as reason:
            bad[part.path] = str(reason)
    return pa.concat_tables(good), bad


def _bytes_of(parts: Sequence[Part]) -> Iterator[tuple[Part, bytes | BadPart]]:
    """Yield parts with what is in their files. Raises SchemaVersionError and FileNotFoundError.

    Threads read the files, because each may take milliseconds on the file system of a cluster. Nothing is decoded
    meanwhile: that is done in one thread, as threads which do it at once wait for each other most of the time.
    """
    from multiprocessing.pool import ThreadPool

    def one(part: Part) -> bytes | BadPart:
        try:
            _require_label(part)
            with _as_bad_part():
                return part.path.read_bytes()
        except BadPart as bad:
            return bad

    threads = min(_THREADS, len(parts))
    with ThreadPool(threads) if threads > 1 else nullcontext() as pool:
        for start in range(0, len(parts), _AT_ONCE):
            some = parts[start : start + _AT_ONCE]
            yield from zip(some, pool.map(one, some) if pool else map(one, some))


def _decoded(part: Part, content: bytes) -> pyarrow.Table:
    """Return the rows in the file of one unit. Raises BadPart."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _as_bad_part():
        # For the few rows of one unit it is quicker to read the file at once, not ahead, and not in threads.
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True, pre_buffer=False)
        rows = file.read(use_threads=False)
        _check_columns(part, rows)
    return rows


def _require_label(part: Part) -> None:
    reason = problem(part)
    if reason is not None:
        raise BadPart(reason)


@contextmanager
def _as_bad_part() -> Iterator[None]:
    """Turn what pyarrow and the system say of a damaged file into BadPart. A file that is gone is not damaged."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadPart((str(error).splitlines() or [type(error).__name__])[0]) from error


def _check_columns(part: Part, content: pyarrow.Table) -> None:
    """Raise BadPart unless the columns are those of the schema."""
    schema = part.tables.arrow_schema(part.table)
    if not content.schema.equals(schema):
        differing = sorted({*content.schema} ^ {*schema}, key=lambda field: field.name)
        names = ", ".join(dict.fromkeys(field.name for field in differing)) or "their order"
        raise BadPart(f"its columns are not those of the table: {names}")


def _are_theirs(found: Sequence[tuple[Part, int]], whole: pyarrow.Table) -> bool:
    """Return whether all is certainly as `_check_rows` demands, which takes longer for thousands of parts one by one.

    found: parts of single units, with the number of their rows. whole: these rows together.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if not found:
        return True
    first, lengths = found[0][0], [n for _, n in found]
    holds = pa.array([part.holds for part, _ in found], pa.string())
    expected = [(first.tables.key, holds)]
    if first.table == first.tables.primary.name:
        if 0 in lengths:
            return False
        expected.append(("status", pa.array([part.state for part, _ in found], pa.string())))
    of_row = pa.array(np.repeat(np.arange(len(found)), lengths))
    return all(pc.all(pc.equal(whole[name], values.take(of_row)), skip_nulls=False).as_py()
               for name, values in expected)


def _check_rows(part: Part, content: pyarrow.Table, whole: bool) -> None:
    """Raise BadPart unless the rows are those of the label. whole: whether these are all rows of the part."""
    import pyarrow.compute as pc

    there = set(pc.unique(content[part.tables.key]).to_pylist())
    if part.state != MERGED and there - {part.holds}:
        raise BadPart(f"its rows belong to {', '.join(sorted(there - {part.holds})[:3])}, not to {part.holds}")
    if part.state == MERGED and whole:
        listed = part_units(part.path, part.tables.key)
        if there - listed or (part.table == part.tables.primary.name and there != listed):
            raise BadPart("its rows are not those of its units")
    if part.table == part.tables.primary.name:
        states = set(pc.unique(content["status"]).to_pylist())
        if not (ERROR in states if part.state == ERROR else states == {OK} or not whole and not states):
            raise BadPart(f"its rows have the status {', '.join(sorted(states)) or 'of nothing'}, which is not that of"
                          f" a {DESCRIPTION[part.state]} part")
