"""Merge the many small files of a study into few, while it is being read and written.

The difficulty: no reader may see a row twice or not at all, not even pandas or DuckDB that list the folder and know
nothing of us. Files cannot be swapped many for one in one step, but a folder can. So the successor of `metrics/` is
built beside it (`.metrics.next`: the new merged part, and hard links to everything that stays) and the two folders
change places in one system call, renameat2(RENAME_EXCHANGE). A listing therefore shows either all small files and not
the merged part, or the merged part and not the small files. A reader that listed before the swap and opens after it
gets FileNotFoundError: loud, and reading again works (our own readers do). Nothing that it can open is counted twice.

Writers: a cell published while the merged part was being written is linked into the successor under the exclusive
lock that publishing shares, so it is in the folder before and after. Where there are no locks a straggler can land in
the retired folder; it is moved over before that folder is deleted.

Where RENAME_EXCHANGE is missing (NFS, Lustre, not Linux) the swap is two renames. Between them the folder is not
there at all, which again is FileNotFoundError and never a wrong count; if we die between them, the next reader uses
the successor and the next writer moves it into place.

Killed at any other moment: an unfinished successor is deleted by the next compaction, a retired folder likewise.
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
    cells_file,
    list_table,
    locked,
    looks_like_parquet,
    merged_parts,
    open_writer,
    part_cells,
    recover,
    sort_names,
)
from harness.tables.reader import check_version, read_part
from harness.tables.schema import TABLES

ROWS_PER_GROUP = 200_000
STALE_SECONDS = 24 * 3600
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(folder: str | os.PathLike, grace: float = 2.0) -> dict[str, int]:
    """Merge the loose files of done cells; returns how many files were merged, by table.

    grace: seconds for which the retired files stay, so that a reader that has just opened the folder can list it.
    Failed and damaged cells stay loose, so that a retry can replace them; parts merged earlier stay as they are.
    Safe beside running writers, readers and other compactions. Needs free space for one more copy of the loose rows.
    Raises FileNotFoundError when there is no study, SchemaVersionError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such study")
    with locked(folder, exclusive=True, name=".compact.lock"):
        check_version(folder)
        for table in TABLES:
            _clean_up(folder, table)
        merged = {table: _compact_table(folder, table) for table in TABLES}
        if any(merged.values()):
            time.sleep(grace)
        for table in TABLES:
            _clean_up(folder, table)
        _remove_stale(folder / ".tmp")
    return merged


def _compact_table(folder: Path, table: str) -> int:
    live, successor, retired = folder / table, folder / f".{table}.next", folder / f".{table}.old"
    already = _merged_cells(live)
    loose = {
        cell: name
        for cell, name in list_table(folder, table).done.items()
        if cell not in already and looks_like_parquet(live / name)
    }
    if len(loose) < 2:
        return 0
    successor.mkdir()
    try:
        part = f"{MERGED_PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        merged = _merge(live, loose, successor / part, table)
        _write_text(cells_file(successor / part), merged)
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


def _merged_cells(live: Path) -> frozenset[str]:
    return frozenset().union(*(part_cells(path) for path in merged_parts(live) if looks_like_parquet(path)))


def _merge(live: Path, loose: dict[str, str], part: Path, table: str) -> list[str]:
    """Write the rows of the loose files into `part`, sorted by cell; returns the cells that could be read."""
    from multiprocessing.pool import ThreadPool

    import pyarrow as pa

    cells, pending = [], []
    with open_writer(part, table) as writer, ThreadPool(min(8, os.cpu_count() or 1)) as pool:

        def flush():
            if pending:
                writer.write_table(pa.concat_tables(pending), row_group_size=ROWS_PER_GROUP)
                pending.clear()

        order = sorted(loose)
        # In slices, because imap would read everything ahead of the writer: examples may not fit into memory.
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            for cell, content in zip(chunk, pool.map(lambda cell: read_part(live / loose[cell], table), chunk)):
                if content is not None:
                    cells.append(cell)
                    pending.append(content)
            if sum(content.num_rows for content in pending) >= ROWS_PER_GROUP:
                flush()
        flush()
    return cells


def _write_text(path: Path, lines: list[str]) -> None:
    with path.open("w") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except FileNotFoundError:
        pass  # without locks a writer may remove a failed cell's file; its success is a file of its own
    except OSError:
        shutil.copy2(source, destination)  # a file system without hard links


def swap(live: Path, successor: Path, retired: Path) -> None:
    """Put the folder `successor` in the place of `live`, which becomes `retired`; in one step where possible."""
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


def _clean_up(folder: Path, table: str) -> None:
    """Delete what this or a killed compaction left, after moving any straggler among it to the table."""
    live = folder / table
    for left in (folder / f".{table}.next", folder / f".{table}.old"):
        with locked(folder, exclusive=True):
            recover(folder, table)
            if left.exists() and live.exists():
                _rescue(folder, table, left)
        if live.exists():
            shutil.rmtree(left, ignore_errors=True)


def _rescue(folder: Path, table: str, left: Path) -> None:
    live = folder / table
    there = list_table(folder, table)
    cells = _merged_cells(live).union(there.done)
    stragglers = sort_names(os.listdir(left), left)
    for files, known in ((stragglers.done, cells), (stragglers.failed, cells.union(there.failed))):
        for cell, name in files.items():
            if cell not in known and looks_like_parquet(left / name):
                os.rename(left / name, live / name)


def _remove_stale(temporary: Path) -> None:
    for path in temporary.glob("*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue
