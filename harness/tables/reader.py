"""Read the folder of a run: the states of its units, its tables, and which parts are damaged."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.tables.parts import (
    ERROR,
    OK,
    list_table,
    locked,
    looks_like_parquet,
    mark_redo,
    part_units,
    redo_units,
    set_aside,
)
from harness.tables.schema import TableSet

if TYPE_CHECKING:
    import pandas
    import pyarrow


def unit_states(folder: str | os.PathLike, tables: TableSet, verify: bool = False) -> dict[str, str]:
    """Return the state "ok" or "error" of every unit that has rows, by unit id. All other units are missing.

    With verify=False only file names are read, which takes well under a second for 100,000 units. With verify=True the
    first and last bytes of every part are read, too, and units with a damaged part of any table count as missing.
    Raises SchemaVersionError if the folder was written under another schema version.
    """
    folder = Path(folder)
    for _ in range(20):
        try:
            return _unit_states(folder, tables, verify)
        except FileNotFoundError:
            continue  # a compaction has swapped the folder since it was listed
    raise OSError(f"{folder}: the folder keeps changing; is it being compacted again and again?")


def _unit_states(folder: Path, tables: TableSet, verify: bool) -> dict[str, str]:
    check_version(folder, tables)
    primary = tables.primary.name
    listing = list_table(folder, primary)
    damaged = {part.path: part.units for part in corrupt_parts(folder, tables)} if verify else {}
    states = {unit: ERROR for unit, name in listing.failed.items() if listing.folder / name not in damaged}
    for name in listing.merged:
        if looks_like_parquet(listing.folder / name):
            states.update(dict.fromkeys(part_units(listing.folder / name, tables.key), OK))
    states.update((unit, OK) for unit, name in listing.done.items() if listing.folder / name not in damaged)
    incomplete = {unit for path, units in damaged.items() if path.parent.name != primary for unit in units}
    for unit in incomplete.union(redo_units(folder)):
        states.pop(unit, None)
    return states


def failed_since(folder: str | os.PathLike, tables: TableSet, when: float) -> set[str]:
    """Return the units whose error rows were written at or after `when`, an st_mtime of the same file system."""
    listing, found = list_table(folder, tables.primary.name), set()
    for unit, name in listing.failed.items():
        with contextlib.suppress(FileNotFoundError):  # a success has replaced it since it was listed
            if os.stat(listing.folder / name).st_mtime >= when:
                found.add(unit)
    return found


def check_version(folder: str | os.PathLike, tables: TableSet) -> None:
    """Raise SchemaVersionError if a merged part, or the first loose part, of a table has another version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for table in tables.names():
        listing = list_table(folder, table)
        loose = [*listing.done.values(), *listing.failed.values()][:1]
        for name in [*listing.merged, *loose]:
            path = listing.folder / name
            # a part that no longer exists was replaced by a writer, which has checked the version
            with contextlib.suppress(pa.ArrowInvalid, FileNotFoundError):
                if looks_like_parquet(path):
                    tables.check_metadata(path, pq.read_metadata(path).metadata, table)


@dataclass(frozen=True)
class CorruptPart:
    """A damaged file, and the units whose rows were in it."""

    path: Path
    reason: str
    units: tuple[str, ...]


def corrupt_parts(folder: str | os.PathLike, tables: TableSet, deep: bool = False) -> list[CorruptPart]:
    """Return the damaged parts of all tables. deep=True decodes every part completely and checks its page checksums."""
    folder = Path(folder)
    found = []
    for table in tables.names():
        listing = list_table(folder, table)
        loose = [(name, (unit,)) for files in (listing.done, listing.failed) for unit, name in files.items()]
        parts: list[tuple[str, tuple[str, ...] | None]] = [*loose, *((name, None) for name in listing.merged)]
        for name, known in parts:
            path = listing.folder / name
            try:
                reason = _damage(path, deep)
            except FileNotFoundError:
                continue  # the part was replaced or merged since it was listed
            if reason:
                units = tuple(sorted(_units_of_damaged(path, tables.key))) if known is None else known
                found.append(CorruptPart(path, reason, units))
    return found


def _damage(path: Path, deep: bool) -> str | None:
    if not looks_like_parquet(path):
        return "truncated or not a parquet file"
    if deep:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            pq.ParquetFile(path, page_checksum_verification=True).read()
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as problem:
            return str(problem).splitlines()[0]
    return None


def _units_of_damaged(part: Path, key: str) -> frozenset[str]:
    import pyarrow as pa

    try:
        return part_units(part, key)
    except (pa.ArrowException, OSError):
        return frozenset()  # the ids are lost; for a part of the primary table that already makes its units missing


def quarantine(folder: str | os.PathLike, tables: TableSet, deep: bool = False) -> list[CorruptPart]:
    """Move damaged parts to <folder>/corrupt/, and return them with their former paths. deep: as in `corrupt_parts`.

    This is called when a run starts. After it `unit_states` counts units as missing if these parts held rows of them.
    """
    folder = Path(folder)
    found = corrupt_parts(folder, tables, deep)
    if found:
        with locked(folder, exclusive=True):
            for part in found:
                if part.path.exists() and _damage(part.path, deep):
                    table = part.path.parent.name
                    if table != tables.primary.name:
                        mark_redo(folder, part.units)
                    set_aside(folder, table, part.path)
    return found


def read_table(
    folder: str | os.PathLike, tables: TableSet, table: str, units: Iterable[str] | None = None,
    where: Mapping[str, str] | None = None,
) -> pandas.DataFrame:
    """Return a table as a DataFrame with the columns of its schema, sorted by unit id.

    units: the ids of the units to read; None for all. where: column -> the value that its rows must have. Each unit
    appears once, even if units are written or compacted meanwhile, and its rows keep the order in which they were
    written. A damaged part is skipped with a warning. Raises SchemaVersionError.
    """
    wanted = None if units is None else set(units)
    for _ in range(20):
        try:
            return _read_once(Path(folder), tables, table, wanted, where or {}).to_pandas()
        except FileNotFoundError:
            continue  # a compaction has swapped the folder, or a success has replaced a failure, since it was listed
    raise OSError(f"{folder}: the folder keeps changing; is it being compacted again and again?")


def _read_once(
    folder: Path, tables: TableSet, table: str, units: set[str] | None, where: Mapping[str, str]
) -> pyarrow.Table:
    from multiprocessing.pool import ThreadPool

    import pyarrow as pa
    import pyarrow.compute as pc

    listing, schema = list_table(folder, table), tables.arrow_schema(table)

    def keep(content: Any, seen: set[str] | None) -> Any:
        mask = None
        of_rows = [(name, {value}, True) for name, value in where.items()]
        for column, values, wanted in [(tables.key, units, True), (tables.key, seen, False), *of_rows]:
            if values:
                inside = pc.is_in(content[column], value_set=pa.array(sorted(values), pa.string()))
                inside = inside if wanted else pc.invert(inside)
                mask = inside if mask is None else pc.and_(mask, inside)
        return content if mask is None else content.filter(mask)

    def load(names: list[str]) -> dict[str, Any]:
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            parts = pool.map(lambda name: read_part(listing.folder / name, tables, table), names)
        return {name: part for name, part in zip(names, parts) if part is not None}

    def chosen(files: dict[str, str], seen: set[str]) -> dict[str, str]:
        wanted = files.keys() - seen if units is None else (files.keys() & units) - seen
        return {files[unit]: unit for unit in wanted}

    if units is not None and not units:
        return schema.empty_table()
    done = chosen(listing.done, set())
    loaded = load(list(done))
    contents, seen = [keep(part, None) for part in loaded.values()], {done[name] for name in loaded}
    for name in listing.merged:
        part = read_part(listing.folder / name, tables, table, units)
        if part is not None:
            contents.append(keep(part, seen))
            seen |= set(pc.unique(part[tables.key]).to_pylist())
    contents += [keep(part, None) for part in load(list(chosen(listing.failed, seen))).values()]
    if not contents:
        return schema.empty_table()
    # The sort is stable: the rows of a unit keep their order, in which the primary metric of a task comes first.
    whole = pa.concat_tables(contents)
    return whole.take(pc.sort_indices(whole[tables.key]))


def read_part(path: Path, tables: TableSet, table: str, units: set[str] | None = None) -> pyarrow.Table | None:
    """Return the rows of one part, of some units or of all (None); None, with a warning, if the part is damaged.

    Raises SchemaVersionError and FileNotFoundError.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not looks_like_parquet(path):
            raise pa.ArrowInvalid("truncated or not a parquet file")
        tables.check_metadata(path, pq.read_metadata(path).metadata, table)
        if units is None:
            content = pq.ParquetFile(path, page_checksum_verification=True).read()
        else:  # merged parts are sorted by unit, so that most row groups are skipped by their statistics
            filters = [(tables.key, "in", units)]
            content = pq.read_table(path, filters=filters, partitioning=None, page_checksum_verification=True)
        return content.cast(tables.arrow_schema(table))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        warnings.warn(f"{path}: damaged and skipped ({reason}); run the study again", stacklevel=2)
        return None
