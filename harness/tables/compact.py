"""Merge the many small files of a run into few large ones, even while the run is being read and written.

No reader may see a row twice or not at all, not even pandas or DuckDB, which list the folder and do not know this
module. Many files cannot be replaced by one in a single step, but a folder can be replaced by a folder. The successor
of a table's folder, for example of `metrics/`, is therefore built beside it as `.metrics.next`, with the new merged
part and hard links to everything that stays. Then the two folders change places in one system call,
renameat2(RENAME_EXCHANGE). Every listing thus shows either the small files or the merged part, but never both. A reader
that listed the folder before the swap and opens a file after it gets FileNotFoundError, and can read again, as the
readers of this package do.

Writers: a unit that was published while the merged part was written is linked into the successor. This is done under
the exclusive lock, of which publishing takes a share, so that the unit is in the folder before and after the swap.
Without locks a unit may be published into the folder that was just replaced; it is moved over before that folder is
deleted.

If there is no RENAME_EXCHANGE (NFS, Lustre, other systems than Linux) the swap takes two renames. Between them the
folder does not exist, which again gives FileNotFoundError and never a wrong count. If the compaction dies between them,
readers use the successor, and the next writer moves it into place.

If the compaction is killed at any other moment, the next one deletes the unfinished successor or the retired folder.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import time
from pathlib import Path

from harness.tables.parts import (
    MERGED_LIST,
    MERGED_PREFIX,
    SUFFIX,
    list_table,
    locked,
    looks_like_parquet,
    merged_parts,
    open_writer,
    part_units,
    recover,
    sort_names,
    units_file,
)
from harness.tables.reader import check_version, read_part
from harness.tables.schema import TableSet

ROWS_PER_GROUP = 200_000
STALE_SECONDS = 24 * 3600
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(folder: str | os.PathLike, tables: TableSet, grace: float = 2.0) -> dict[str, int]:
    """Merge the loose files of done units, and return the number of merged files of each table.

    grace: seconds for which the retired files stay, so that a reader that has just opened the folder can list it.
    Failed and damaged units stay loose, so that a new run can replace them; parts that were merged before stay as they
    are. Writers, readers and other compactions may run at the same time. There must be free disk space for one more
    copy of the loose rows. Raises FileNotFoundError if there is no such folder, and SchemaVersionError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with locked(folder, exclusive=True, name=".compact.lock"):
        check_version(folder, tables)
        for table in tables.names():
            _clean_up(folder, tables, table)
        merged = {table: _compact_table(folder, tables, table) for table in tables.names()}
        if any(merged.values()):
            time.sleep(grace)
        for table in tables.names():
            _clean_up(folder, tables, table)
        _remove_stale(folder / ".tmp")
    return merged


def _compact_table(folder: Path, tables: TableSet, table: str) -> int:
    live, successor, retired = folder / table, folder / f".{table}.next", folder / f".{table}.old"
    already = _merged_units(live, tables.key)
    loose = {
        unit: name
        for unit, name in list_table(folder, table).done.items()
        if unit not in already and looks_like_parquet(live / name)
    }
    if len(loose) < 2:
        return 0
    successor.mkdir()
    try:
        part = f"{MERGED_PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        merged = _merge(live, loose, successor / part, tables, table)
        _write_text(units_file(successor / part), merged)
        with locked(folder, exclusive=True):
            gone = already.union(merged)
            for name in os.listdir(live):
                if name != MERGED_LIST and (name.startswith(MERGED_PREFIX) or name.split(".")[0] not in gone):
                    _link(live / name, successor / name)
            _write_text(successor / MERGED_LIST, [*(path.name for path in merged_parts(live)), part])
            swap(live, successor, retired)
    except BaseException:
        if live.exists():
            shutil.rmtree(successor, ignore_errors=True)
        raise
    return len(merged)


def _merged_units(live: Path, key: str) -> frozenset[str]:
    return frozenset().union(*(part_units(path, key) for path in merged_parts(live) if looks_like_parquet(path)))


def _merge(live: Path, loose: dict[str, str], part: Path, tables: TableSet, table: str) -> list[str]:
    """Write the rows of the loose files into `part`, sorted by unit, and return the units that could be read."""
    from multiprocessing.pool import ThreadPool

    import pyarrow as pa

    units: list[str] = []
    pending: list[pa.Table] = []
    with open_writer(part, tables, table) as writer, ThreadPool(min(8, os.cpu_count() or 1)) as pool:

        def flush() -> None:
            if pending:
                writer.write_table(pa.concat_tables(pending), row_group_size=ROWS_PER_GROUP)
                pending.clear()

        order = sorted(loose)
        # Files are read in slices, because imap would read all of them before they are written, and memory may not
        # hold all examples.
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            for unit, content in zip(chunk, pool.map(lambda u: read_part(live / loose[u], tables, table), chunk)):
                if content is not None:
                    units.append(unit)
                    pending.append(content)
            if sum(content.num_rows for content in pending) >= ROWS_PER_GROUP:
                flush()
        flush()
    return units


def _write_text(path: Path, lines: list[str]) -> None:
    with path.open("w") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except FileNotFoundError:
        pass  # without locks a writer may have replaced the file of a failed unit by that of its success
    except OSError:
        shutil.copy2(source, destination)  # a file system without hard links


def swap(live: Path, successor: Path, retired: Path) -> None:
    """Put the folder `successor` in the place of `live`, and rename `live` to `retired`, in one step if possible."""
    try:
        _exchange(live, successor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        os.rename(live, retired)
        os.rename(successor, live)
    else:
        os.rename(successor, retired)


def _exchange(one: Path, other: Path) -> None:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def _clean_up(folder: Path, tables: TableSet, table: str) -> None:
    """Delete the folders that this or a killed compaction has left, after moving units that are only there."""
    live = folder / table
    for left in (folder / f".{table}.next", folder / f".{table}.old"):
        with locked(folder, exclusive=True):
            recover(folder, table)
            if left.exists() and live.exists():
                _rescue(folder, tables, table, left)
        if live.exists():
            shutil.rmtree(left, ignore_errors=True)


def _rescue(folder: Path, tables: TableSet, table: str, left: Path) -> None:
    live = folder / table
    there = list_table(folder, table)
    units = _merged_units(live, tables.key).union(there.done)
    stragglers = sort_names(os.listdir(left), left)
    for files, known in ((stragglers.done, units), (stragglers.failed, units.union(there.failed))):
        for unit, name in files.items():
            if unit not in known and looks_like_parquet(left / name):
                os.rename(left / name, live / name)


def _remove_stale(temporary: Path) -> None:
    for path in temporary.glob("*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue
