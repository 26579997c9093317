"""Read the folder of a run: the states of its units, its tables, and which parts are damaged."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.tables.identity import ERROR, MERGED, OK, BadPart, Part, part_units, problem, run_of
from harness.tables.parts import list_table, locked, mark_redo, redo_units, set_aside
from harness.tables.rows import read_loose, read_merged
from harness.tables.schema import TableSet

if TYPE_CHECKING:
    import pandas
    import pyarrow


class SkippedParts(UserWarning):
    """Parts of a table were bad, and their rows are not among those that were read."""


@dataclass(frozen=True)
class CorruptPart:
    """A bad part, why it is bad, and the units whose rows were in it."""

    path: Path
    reason: str
    units: tuple[str, ...]


def unit_states(folder: str | os.PathLike, tables: TableSet, verify: bool = False) -> dict[str, str]:
    """Return the state "ok" or "error" of every unit that has rows, by unit id. All other units are missing.

    A bad part of the primary table does not count; with verify=True, units with a bad part of any table count as
    missing. Of every part the last bytes are read, which takes a tenth of a second for 5,000 units on a local disk.
    Raises SchemaVersionError if the folder was written under another schema version.
    """
    return states_and_damage(folder, tables, verify)[0]


def states_and_damage(
    folder: str | os.PathLike, tables: TableSet, verify: bool = True
) -> tuple[dict[str, str], list[CorruptPart]]:
    """Return the states as `unit_states`, and the bad parts that were found: of the primary table, or of all."""
    folder = Path(folder)
    for _ in range(20):
        try:
            return _states_and_damage(folder, tables, verify)
        except FileNotFoundError:
            continue  # a compaction has swapped the folder since it was listed
    raise OSError(f"{folder}: the folder keeps changing; is it being compacted again and again?")


def _states_and_damage(folder: Path, tables: TableSet, verify: bool) -> tuple[dict[str, str], list[CorruptPart]]:
    primary = tables.primary.name
    listing = list_table(folder, primary)
    bad = corrupt_parts(folder, tables, names=None if verify else (primary,))
    damaged = {part.path for part in bad}
    states = {unit: ERROR for unit, name in listing.failed.items() if listing.folder / name not in damaged}
    for name in listing.merged:
        if listing.folder / name not in damaged:
            states.update(dict.fromkeys(part_units(listing.folder / name, tables.key), OK))
    states.update((unit, OK) for unit, name in listing.done.items() if listing.folder / name not in damaged)
    incomplete = {unit for part in bad if part.path.parent.name != primary for unit in part.units}
    for unit in incomplete.union(redo_units(folder)):
        states.pop(unit, None)
    return states, bad


def failed_since(folder: str | os.PathLike, tables: TableSet, when: float) -> set[str]:
    """Return the units whose error rows were written at or after `when`, an st_mtime of the same file system."""
    listing, found = list_table(folder, tables.primary.name), set()
    for unit, name in listing.failed.items():
        with contextlib.suppress(FileNotFoundError):  # a success has replaced it since it was listed
            if os.stat(listing.folder / name).st_mtime >= when:
                found.add(unit)
    return found


def corrupt_parts(
    folder: str | os.PathLike, tables: TableSet, deep: bool = False, names: Iterable[str] | None = None
) -> list[CorruptPart]:
    """Return the bad parts. names: the tables to look into, by default all.

    deep=True reads every part completely, which checks its page checksums, its columns and its rows.
    """
    folder = Path(folder)
    run, found = run_of(folder), []
    for table in tables.names() if names is None else names:
        listing = list_table(folder, table)
        loose = [(name, (unit,)) for files in (listing.done, listing.failed) for unit, name in files.items()]
        parts: list[tuple[str, tuple[str, ...] | None]] = [*loose, *((name, None) for name in listing.merged)]
        for name, known in parts:
            part = Part(listing.folder / name, tables, table, run)
            try:
                reason = _damage(part, deep)
            except FileNotFoundError:
                continue  # the part was replaced or merged since it was listed
            if reason:
                units = tuple(sorted(part_units(part.path, tables.key))) if known is None else known
                found.append(CorruptPart(part.path, reason, units))
    return found


def _damage(part: Part, deep: bool) -> str | None:
    if not deep:
        return problem(part)
    if part.state != MERGED:
        return read_loose([part])[1].get(part.path)
    try:
        read_merged(part)
    except BadPart as bad:
        return str(bad)
    return None


def quarantine(folder: str | os.PathLike, tables: TableSet, deep: bool = False) -> list[CorruptPart]:
    """Move bad parts to <folder>/corrupt/, and return them with their former paths. deep: as in `corrupt_parts`.

    This is called when a run starts. After it `unit_states` counts units as missing if these parts held rows of them.
    """
    folder = Path(folder)
    found = corrupt_parts(folder, tables, deep)
    if found:
        run = run_of(folder)
        with locked(folder, exclusive=True):
            for bad in found:
                table = bad.path.parent.name
                with contextlib.suppress(FileNotFoundError):
                    if _damage(Part(bad.path, tables, table, run), deep):
                        if table != tables.primary.name:
                            mark_redo(folder, bad.units)
                        set_aside(folder, table, bad.path)
    return found


def read_table(
    folder: str | os.PathLike, tables: TableSet, table: str, units: Iterable[str] | None = None,
    where: Mapping[str, str] | None = None,
) -> pandas.DataFrame:
    """Return a table as a DataFrame with the columns of its schema, sorted by unit id.

    units: the ids of the units to read; None for all. where: column -> the value that its rows must have. Each unit
    appears once, even if units are written or compacted meanwhile, and its rows keep the order in which they were
    written. Bad parts are skipped with a warning. Raises SchemaVersionError.
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
    import pyarrow as pa
    import pyarrow.compute as pc

    listing, schema = list_table(folder, table), tables.arrow_schema(table)
    run, skipped, contents = run_of(folder), list[str](), list[pa.Table]()

    def keep(content: Any, seen: set[str] | None) -> Any:
        mask = None
        of_rows = [(name, {value}, True) for name, value in where.items()]
        for column, values, wanted in [(tables.key, units, True), (tables.key, seen, False), *of_rows]:
            if values:
                inside = pc.is_in(content[column], value_set=pa.array(sorted(values), pa.string()))
                inside = inside if wanted else pc.invert(inside)
                mask = inside if mask is None else pc.and_(mask, inside)
        return content if mask is None else content.filter(mask)

    def part(name: str) -> Part:
        return Part(listing.folder / name, tables, table, run)

    def loose(files: dict[str, str]) -> set[str]:
        """Read the files of some units, and return the units of those that are not bad."""
        if not files:
            return set()
        content, bad = read_loose([part(name) for name in files])
        skipped.extend(f"{path}: {reason}" for path, reason in bad.items())
        contents.append(keep(content, None))
        return set(files.values()) - {files[path.name] for path in bad}

    def chosen(files: dict[str, str], seen: set[str]) -> dict[str, str]:
        wanted = files.keys() - seen if units is None else (files.keys() & units) - seen
        return {files[unit]: unit for unit in wanted}

    if units is not None and not units:
        return schema.empty_table()
    seen = loose(chosen(listing.done, set()))
    for name in listing.merged:
        try:
            content = read_merged(part(name), units)
        except BadPart as bad:
            skipped.append(f"{listing.folder / name}: {bad}")
            continue
        contents.append(keep(content, seen))
        seen |= set(pc.unique(content[tables.key]).to_pylist())
    loose(chosen(listing.failed, seen))
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        warnings.warn(f"{min(skipped)}{more}; skipped: run the study again to replace what is missing", SkippedParts,
                      stacklevel=3)
    if not contents:
        return schema.empty_table()
    # The sort is stable: the rows of a unit keep their order, in which the primary metric of a task comes first.
    whole = pa.concat_tables(contents)
    return whole.take(pc.sort_indices(whole[tables.key]))
