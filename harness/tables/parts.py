"""Cells on disk: one small parquet file per cell and table, renamed into place, later merged by `compact`.

    <folder>/metrics/<cell_id>.parquet          the cell is done
    <folder>/metrics/<cell_id>.error.parquet    the cell failed; its rows say why
    <folder>/metrics/merged-<id>.parquet        many done cells (compact); failed ones are never merged
    <folder>/examples/...                       the same names; written before metrics, so a done cell has its examples
    <folder>/.tmp/                              files being written
    <folder>/.redo/<cell_id>                    the cell is done but lost its examples: it counts as missing
    <folder>/corrupt/                           damaged files, moved aside by `quarantine` or by the rerun of their cell

A cell's state is read off the file names, so 100,000 cells are one directory listing. Where a cell has several files
(two runs of one study, a crash between two steps), done wins over failed and a loose file over a merged one.

Locks: publishing a file takes a shared flock on <folder>/.lock for the instant of the rename, the swap of `compact`
takes it exclusively. Where the file system has no flock nothing is locked: no row is lost there either, but compact
only when nothing writes if readers are not to miss a row for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.tables.schema import arrow_schema

OK, ERROR = "ok", "error"
SUFFIX, ERROR_SUFFIX, MERGED_PREFIX = ".parquet", ".error.parquet", "merged-"
# Lives inside the table's folder, so that whoever sees a folder sees the list of merged parts that belongs to it.
MERGED_LIST = ".merged"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@dataclass(frozen=True)
class Listing:
    """The parts of one table at one moment, as file names."""

    folder: Path
    done: dict[str, str]  # cell id -> file
    failed: dict[str, str]  # cell id -> file
    merged: tuple[str, ...]


def list_table(folder: str | os.PathLike, table: str) -> Listing:
    """The parts of "metrics" or "examples"; empty when there is no such folder. Opens no part."""
    folder = Path(folder)
    live = folder / table
    for attempt in range(40):
        try:
            fd = os.open(live, os.O_RDONLY)
        except FileNotFoundError:
            successor = folder / f".{table}.next"
            if live == successor or not successor.exists():
                return Listing(live, {}, {}, ())
            # Between the two steps of a swap; if the compaction died there the successor is the table.
            if attempt == 20:
                live = successor
            time.sleep(0.05)
            continue
        try:
            with os.scandir(fd) as entries:
                names = [entry.name for entry in entries]
            # A folder that was swapped out while we listed it may have been emptied under us.
            if os.fstat(fd).st_ino == os.stat(live).st_ino:
                return sort_names(names, live)
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
    raise OSError(f"{live}: the folder keeps changing; is it being compacted again and again?")


def sort_names(names: Iterable[str], folder: Path) -> Listing:
    """The listing of the file names of one table's folder; what is not a part is left out."""
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
    """The merged parts in a table's folder, without listing it."""
    try:
        names = (live / MERGED_LIST).read_text().split()
    except FileNotFoundError:
        return []
    return [live / name for name in names if (live / name).exists()]  # one may have been set aside as damaged


def cells_file(part: Path) -> Path:
    """Where the cell ids of a merged part are listed, one per line."""
    return part.with_name(f".{part.name}.cells")


def part_cells(part: Path) -> frozenset[str]:
    """The cell ids in a merged part; from its list beside it, so also when the part itself is damaged."""
    return _part_cells(str(part))


@functools.lru_cache(maxsize=64)
def _part_cells(part: str) -> frozenset[str]:
    # Cached by name: a merged part has a unique name and never changes.
    import pyarrow.parquet as pq

    path = Path(part)
    ids = cells_file(path)
    if ids.exists():
        return frozenset(ids.read_text().split())
    return frozenset(pq.read_table(path, columns=["cell_id"])["cell_id"].unique().to_pylist())


def looks_like_parquet(path: Path) -> bool:
    """Whether the file starts and ends as parquet does; catches empty, truncated and overwritten files cheaply."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return size >= 12 and os.pread(fd, 4, 0) == b"PAR1" and os.pread(fd, 4, size - 4) == b"PAR1"
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_writer(path: Path, table: str, small: bool = False):
    """A ParquetWriter of the table's schema; the file is on disk (fsync) when the block ends, gone if it raises."""
    import pyarrow.parquet as pq

    try:
        # Without the serialised Arrow schema a cell's file is a third smaller; the types are plain parquet ones.
        with pq.ParquetWriter(
            path,
            arrow_schema(table),
            compression="zstd",
            store_schema=False,
            write_page_checksum=True,
            use_dictionary=not small,
            write_statistics=not small,
        ) as writer:
            writer.add_key_value_metadata(dict(arrow_schema(table).metadata))
            yield writer
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path, exclusive: bool = False, name: str = ".lock"):
    """Hold the folder's lock; shared unless `exclusive`. Released by the system if the process dies."""
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
    """Finish the two-step swap of a compaction that died between its steps (see compact.swap). Needs the lock."""
    live, successor = folder / table, folder / f".{table}.next"
    if not live.exists() and successor.exists():
        os.rename(successor, live)


def set_aside(folder: Path, table: str, path: Path) -> None:
    (folder / "corrupt").mkdir(exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another writer was faster
        os.rename(path, folder / "corrupt" / f"{table}-{path.name}.{secrets.token_hex(4)}")


def redo_cells(folder: Path) -> list[str]:
    """Done cells that count as missing because their examples were damaged."""
    try:
        return os.listdir(folder / ".redo")
    except FileNotFoundError:
        return []


def mark_redo(folder: Path, cells: Iterable[str]) -> None:
    (folder / ".redo").mkdir(exist_ok=True)
    for cell in cells:
        (folder / ".redo" / cell).touch()
