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
import shutil
import time
from pathlib import Path

from harness.tables.identity import (
    MERGED_PREFIX,
    Part,
    part_units,
    problem,
    run_of,
    said_by,
    units_file,
)
from harness.tables.parts import (
    MERGED_LIST,
    label_units,
    list_table,
    locked,
    merged_parts,
    new_merged_name,
    open_writer,
    recover,
    sort_names,
)
from harness.tables.rows import read_loose
from harness.tables.schema import TableSet

ROWS_PER_GROUP = 200_000
STALE_SECONDS = 24 * 3600
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def compact(folder: str | os.PathLike, tables: TableSet, grace: float = 2.0) -> dict[str, int]:
    """Merge the loose files of done units, and return the number of merged files of each table.

    grace: seconds for which the retired files stay, so that a reader that has just opened the folder can list it.
    Failed units and bad parts stay loose, so that a new run can replace them; what was merged before stays as it is.
    Writers, readers and other compactions may run at the same time. There must be free disk space for one more
    copy of the loose rows. Raises FileNotFoundError if there is no such folder, and SchemaVersionError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    with locked(folder, exclusive=True, name=".compact.lock"):
        run = run_of(folder) or _first_run(folder, tables)
        for table in tables.names():
            _clean_up(folder, tables, table, run)
        merged = {table: _compact_table(folder, tables, table, run) for table in tables.names()}
        if any(merged.values()):
            time.sleep(grace)
        for table in tables.names():
            _clean_up(folder, tables, table, run)
        _remove_stale(folder / ".tmp")
    return merged


def _first_run(folder: Path, tables: TableSet) -> str:
    """Return the run that the first part names. It is needed for a folder without a manifest only."""
    for table in tables.names():
        listing = list_table(folder, table)
        for name in [*listing.merged, *listing.done.values()]:
            said = said_by(listing.folder / name)
            if said is not None:
                return str(said.get("run"))
    return ""


def _compact_table(folder: Path, tables: TableSet, table: str, run: str) -> int:
    live, successor, retired = folder / table, folder / f".{table}.next", folder / f".{table}.old"
    already = _merged_units(live, tables, table, run)
    loose = {unit: part for unit, name in list_table(folder, table).done.items()
             if unit not in already and _is_good(part := Part(live / name, tables, table, run))}
    if len(loose) < 2:
        return 0
    successor.mkdir()
    try:
        part = Part(successor / new_merged_name(), tables, table, run)
        merged = _merge(loose, part)
        _write_text(units_file(part.path), merged)
        with locked(folder, exclusive=True):
            gone = already.union(merged)
            for name in os.listdir(live):
                if name != MERGED_LIST and (name.startswith(MERGED_PREFIX) or name.split(".")[0] not in gone):
                    _link(live / name, successor / name)
            _write_text(successor / MERGED_LIST, [*(path.name for path in merged_parts(live)), part.path.name])
            swap(live, successor, retired)
    except BaseException:
        if live.exists():
            shutil.rmtree(successor, ignore_errors=True)
        raise
    return len(merged)


def _is_good(part: Part) -> bool:
    try:
        return problem(part) is None
    except FileNotFoundError:
        return False  # a success has replaced it, or another writer has set it aside


def _merged_units(live: Path, tables: TableSet, table: str, run: str) -> frozenset[str]:
    good = [path for path in merged_parts(live) if _is_good(Part(path, tables, table, run))]
    return frozenset().union(*(part_units(path, tables.key) for path in good))


def _merge(loose: dict[str, Part], merged: Part) -> list[str]:
    """Write the rows of the loose parts into the part `merged`, sorted by unit, and return the units in it.

    Bad parts stay loose.
    """
    import pyarrow as pa

    units: list[str] = []
    pending: list[pa.Table] = []
    with open_writer(merged.path, merged) as writer:

        def flush() -> None:
            if pending:
                writer.write_table(pa.concat_tables(pending), row_group_size=ROWS_PER_GROUP)
                pending.clear()

        order = sorted(loose)
        # Files are read in slices, because memory may not hold all examples.
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            content, bad = read_loose([loose[unit] for unit in chunk])
            units += [unit for unit in chunk if loose[unit].path not in bad]
            pending.append(content)
            if sum(content.num_rows for content in pending) >= ROWS_PER_GROUP:
                flush()
        flush()
        label_units(writer, units)
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
        if source.is_dir():  # a user's, which has no place here and must not be deleted with the retired folder
            shutil.copytree(source, destination, symlinks=True)
        else:
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


def _clean_up(folder: Path, tables: TableSet, table: str, run: str) -> None:
    """Delete the folders that this or a killed compaction has left, after moving units that are only there."""
    live = folder / table
    for left in (folder / f".{table}.next", folder / f".{table}.old"):
        with locked(folder, exclusive=True):
            recover(folder, table)
            if left.exists() and live.exists():
                _rescue(left, live, tables, run)
        if live.exists():
            shutil.rmtree(left, ignore_errors=True)


def _rescue(left: Path, live: Path, tables: TableSet, run: str) -> None:
    table = live.name
    there = list_table(live.parent, table)
    units = _merged_units(live, tables, table, run).union(there.done)
    stragglers = sort_names(os.listdir(left), left)
    for files, known in ((stragglers.done, units), (stragglers.failed, units.union(there.failed))):
        for unit, name in files.items():
            if unit not in known and _is_good(Part(left / name, tables, table, run)):
                os.rename(left / name, live / name)


def _remove_stale(temporary: Path) -> None:
    for path in temporary.glob("*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue
