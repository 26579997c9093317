"""Units on disk: one small parquet file for each unit and table, which is renamed into place, and later merged.

The folder of a run has a folder for every table; <primary> is the table that says which units are done:

    <primary>/<unit id>.parquet          the unit is done
    <primary>/<unit id>.error.parquet    the unit failed; its rows say why
    <primary>/merged-<id>.parquet        many done units, merged by `compact`; failed ones are never merged
    <other table>/...                    the same names; written before the primary table, so that a done unit has them
    .tmp/                                files that are being written
    .redo/<unit id>                      the unit is done but has lost rows of another table, so it counts as missing
    corrupt/                             bad parts, moved there by `quarantine` or by a new run of their unit

A file of one unit is called loose; that of the primary table holds a copy of its rows (row_copy.py). A part is bad if
it is damaged, or if its label (identity.py) is not what its name and its folder demand, as after a copy. A unit may
have several files, after two runs of one study or a crash between two steps. Then done wins over failed, and a loose
file wins over a merged one.

Locks: publishing a file takes a shared flock on .lock for the instant of the rename, and `compact` takes an exclusive
one to swap a folder. On a file system without flock nothing is locked. No row is lost there either, but a reader may
miss a row for a moment if a run is compacted while units are written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files import sync
from harness.tables.identity import (
    ERROR_SUFFIX,
    MERGED_PREFIX,
    PART_KEY,
    SUFFIX,
    UNITS_KEY,
    Part,
    units_digest,
)
from harness.tables.row_copy import copied, sealed
from harness.tables.schema import UNIT_ID

if TYPE_CHECKING:
    import pyarrow

# This file is inside the table's folder, so that whoever opens the folder sees the list that belongs to it.
MERGED_LIST = ".merged"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@dataclass(frozen=True)
class Listing:
    """The parts (parquet files) of one table at one moment, by their file names."""

    folder: Path
    done: dict[str, str]  # unit id -> file
    failed: dict[str, str]  # unit id -> file
    merged: tuple[str, ...]


def list_table(folder: str | os.PathLike, table: str) -> Listing:
    """List the parts of a table without opening them. The listing is empty if there is no such folder.

    Raises OSError if the folder is swapped again and again.
    """
    folder = Path(folder)
    live = folder / table
    for attempt in range(40):
        try:
            fd = os.open(live, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            successor = folder / f".{table}.next"
            if live == successor or not successor.exists():
                return Listing(live, {}, {}, ())
            # A compaction is between the two steps of its swap. If it died there, the successor is the table.
            if attempt == 20:
                live = successor
            time.sleep(0.05)
            continue
        try:
            with os.scandir(fd) as entries:
                names = [entry.name for entry in entries]
            # A folder that was swapped out while it was listed may have been emptied at the same time.
            if os.fstat(fd).st_ino == os.stat(live).st_ino:
                return sort_names(names, live)
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
    raise OSError(f"{live}: the folder keeps changing; is it being compacted again and again?")


def sort_names(names: Iterable[str], folder: Path) -> Listing:
    """Return the listing for the file names in a table's folder, without files that are not parts."""
    done, failed, merged = {}, {}, []
    for name in names:
        if name.startswith((".", "_")) or not name.endswith(SUFFIX):
            continue
        if name.startswith(MERGED_PREFIX):
            merged.append(name)
        elif name.endswith(ERROR_SUFFIX):
            failed[name[: -len(ERROR_SUFFIX)]] = name
        else:
            done[name[: -len(SUFFIX)]] = name
    return Listing(folder, done, failed, tuple(sorted(merged)))


def merged_parts(live: Path) -> list[Path]:
    """Return the merged parts in a table's folder, which are read from MERGED_LIST, so that nothing is listed."""
    try:
        names = (live / MERGED_LIST).read_text(errors="replace").split()
    except OSError:
        return []
    # a bad one may have been set aside
    # one that is bad may have been set aside
    merged = [name for name in names if name.startswith(MERGED_PREFIX) and "/" not in name]
    return [live / name for name in merged if (live / name).exists()]


def unit_bytes(content: pyarrow.Table, part: Part, few_rows: bool) -> bytes:
    """Return the file of one unit, with its label. It is made in memory, because parquet is written in tiny pieces.

    few_rows: leave out compression and dictionaries, which make a file of few rows larger and slower to read, and add
        the copy of the rows (row_copy.py).
    """
    import pyarrow as pa

    buffer = pa.BufferOutputStream()
    # Nobody reads the statistics of loose files, and zstd takes longer to begin than to compress so little.
    settings = {"compression": "none" if few_rows else "snappy", "use_dictionary": not few_rows,
                "write_statistics": False}  # fmt: skip
    with _labelled(buffer, part, settings) as writer:
        writer.write_table(content)
        writer.add_key_value_metadata(copied(content) if few_rows else {})
    return sealed(buffer.getvalue().to_pybytes())


@contextlib.contextmanager
def open_writer(path: Path, part: Part) -> Iterator[Any]:
    """Yield a ParquetWriter that writes to `path` the file of many units that will be `part`, with its label.

    When the block ends, the file is on the disk (fsync); if it raises, the file is removed.
    """
    try:
        with _labelled(path, part, {"compression": "zstd"}) as writer:
            yield writer
        sync(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _labelled(where: Any, part: Part, settings: dict[str, Any]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    schema = part.tables.arrow_schema(part.table)
    # Without the serialised Arrow schema the file of a unit is a third smaller. All types are plain parquet types.
    with pq.ParquetWriter(where, schema, store_schema=False, write_page_checksum=True, **settings) as writer:
        writer.add_key_value_metadata({**schema.metadata, PART_KEY: part.label()})
        yield writer


def new_merged_name() -> str:
    """Return a name for a merged part that no other has."""
    return f"{MERGED_PREFIX}{secrets.token_hex(8)}{SUFFIX}"


def label_units(writer: Any, units: Iterable[str]) -> None:
    """Add the digest of the units in a merged part to its metadata, by which its list is known to be its own."""
    writer.add_key_value_metadata({UNITS_KEY: units_digest(units)})


@contextlib.contextmanager
def locked(folder: Path, exclusive: bool = False, name: str = ".lock") -> Iterator[None]:
    """Hold a lock of the folder, shared or exclusive. The system releases it if the process dies."""
    fd = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(fd)


def recover(folder: Path, table: str) -> None:
    """Finish the swap of a compaction that died between its two steps (see `compact.swap`).

    The caller must hold the exclusive lock.
    """
    live, successor = folder / table, folder / f".{table}.next"
    if not live.exists() and successor.exists():
        os.rename(successor, live)


def set_aside(folder: Path, table: str, path: Path) -> None:
    """Move a bad part to corrupt/ under a unique name."""
    (folder / "corrupt").mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another writer has moved it
        os.rename(path, folder / "corrupt" / f"{table}-{path.name}.{secrets.token_hex(4)}")


def redo_units(folder: Path) -> list[str]:
    """Return the done units that count as missing because the part with their rows of another table was bad."""
    try:
        return os.listdir(folder / ".redo")
    except FileNotFoundError:
        return []


def mark_redo(folder: Path, units: Iterable[str]) -> None:
    """Make done units count as missing."""
    (folder / ".redo").mkdir(exist_ok=True)
    for unit in filter(UNIT_ID.fullmatch, units):
        (folder / ".redo" / unit).touch()
