"""What a part says of itself, and whether the name and the folder under which it is found say the same.

Files are copied, renamed and dropped into other folders. Every part therefore carries a label in the key-value metadata
of its parquet footer: the id of its run, its table with the version of the schema, the unit or the merged part that it
holds, and its state. A part whose label is another than its place demands is a bad part. Readers skip it, and a new run
moves it to corrupt/ and measures its unit again.

The label is compared as text with the last bytes of the file. This takes some microseconds, a hundredth of what it
takes to parse the footer, so that `harness status` can compare thousands of parts. The rows are compared with the label
when a part is read (rows.py).

The run of a folder is the one that its manifest names. Without a manifest a part may be of any run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import InputError
from harness.tables.schema import UNIT_ID, VERSION_KEY, TableSet

MANIFEST = "manifest.json"
OK, ERROR, MERGED = "ok", "error", "merged"
SUFFIX, ERROR_SUFFIX, MERGED_PREFIX = ".parquet", ".error.parquet", "merged-"
PART_KEY, UNITS_KEY = b"harness.part", b"harness.units"
NOT_PARQUET = "truncated or not a parquet file"
_TAIL = 1 << 16  # bytes; most footers are shorter
DESCRIPTION = {OK: "done", ERROR: "failed", MERGED: "merged"}


class BadPart(Exception):
    """A part cannot be used. The message is the reason."""


@dataclass(frozen=True)
class Part:
    """A part of a table, and what its folder and its name say of it.

    run: the id of the run to which the folder belongs, or None if the folder does not say.
    """

    path: Path
    tables: TableSet
    table: str
    run: str | None

    @property
    def state(self) -> str:
        """OK or ERROR for the part of one unit, MERGED for a merged part."""
        name = self.path.name
        return MERGED if name.startswith(MERGED_PREFIX) else ERROR if name.endswith(ERROR_SUFFIX) else OK

    @property
    def holds(self) -> str:
        """The id of its unit, or the name of a merged part."""
        return self.path.name.removesuffix(ERROR_SUFFIX if self.state == ERROR else SUFFIX)

    def label(self) -> bytes:
        """Return what the part must say of itself. Without a run, this is the end of it that follows the run."""
        said = {"table": self.tables.qualified(self.table), "version": self.tables.version, "holds": self.holds,
                "state": self.state}
        if self.run is None:
            return (", " + json.dumps(said)[1:]).encode()
        return json.dumps({"run": self.run, **said}).encode()


def load_manifest(folder: Path) -> Any:
    """Return the content of a folder's manifest as JSON; None if there is none. Raises InputError if it is unreadable.

    What the content must be is known to the engine, which reads the manifest with `read_manifest`. Nobody may alter the
    content, see `parsed_manifest`.
    """
    text = manifest_text(folder)
    return None if text is None else parsed_manifest(folder, text)


def manifest_text(folder: Path) -> str | None:
    """Return the text of a folder's manifest as it is now; None if there is none. Raises InputError."""
    path = folder / MANIFEST
    if not path.is_file():
        if os.path.lexists(path):
            raise InputError(f"{path}: not a file; move it away, restore the manifest or run the study anew")
        return None
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def parsed_manifest(folder: Path, text: str) -> Any:
    """Return the content of the text of a folder's manifest, an empty one for null. Raises InputError.

    Equal texts give the same object, because to parse the manifest of 100,000 units takes a sixth of a second and a
    report asks for it many times. So nobody may alter it.
    """
    try:
        content = _json(text)
    except ValueError as error:
        raise _unreadable(folder / MANIFEST, error) from error
    except RecursionError:
        raise InputError(f"{folder / MANIFEST}: nested too deeply for a manifest; restore it or run the study anew"
                         ) from None
    return {} if content is None else content


@functools.lru_cache(maxsize=2)
def _json(text: str) -> Any:
    return json.loads(text)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not readable as JSON ({error}); restore it or run the study anew")


def run_of(folder: Path) -> str | None:
    """Return the id of the run to which a folder belongs; None without a manifest. Raises InputError."""
    content = load_manifest(folder)
    if content is None:
        return None
    found = content.get("id") if isinstance(content, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{folder / MANIFEST}: not a manifest, without an id; restore it or run the study anew")
    return found


def said_by(path: Path) -> dict[str, Any] | None:
    """Return the label of a part as a dictionary; None if it has none, or is not a parquet file."""
    try:
        return _said(_metadata(path))
    except BadPart:
        return None


def problem(part: Part) -> str | None:
    """Return why a part cannot be used, as far as its label says, or None.

    Raises FileNotFoundError, and SchemaVersionError if another version of the harness wrote the part for this run.
    """
    footer = _footer(part.path)
    if footer is None:
        return NOT_PARQUET
    if part.label() in footer:
        return None
    try:
        metadata = _metadata(part.path)
    except BadPart as bad:
        return str(bad)
    said, table = _said(metadata), part.tables.qualified(part.table)
    if said is None:
        if part.run is None and VERSION_KEY in metadata:
            part.tables.check_version(part.path, metadata[VERSION_KEY].decode(errors="replace"))
        return "it does not say to which run it belongs"
    if part.run is not None and said.get("run") != part.run:
        return f"it belongs to the run {said.get('run')!r}, not to {part.run}"
    if said.get("table") != table:
        return f"it holds the table {said.get('table')!r}, not {table}"
    part.tables.check_version(part.path, said.get("version"))
    return (f"it holds {said.get('holds')!r}, {DESCRIPTION.get(str(said.get('state')), 'of no known state')},"
            f" not {part.holds}, {DESCRIPTION[part.state]}")


def units_digest(units: Iterable[str]) -> bytes:
    """Return a hash of the ids in a merged part, by which its list is known to be its own."""
    return hashlib.blake2b("\n".join(sorted(units)).encode(), digest_size=12).hexdigest().encode()


def units_file(part: Path) -> Path:
    """Return the path of the file that lists the unit ids of a merged part, one per line."""
    return part.with_name(f".{part.name}.units")


def part_units(part: Path, key: str) -> frozenset[str]:
    """Return the unit ids in a merged part, from its list if that is its own, else from its rows.

    key: the column with the ids. If the part is damaged, its list is all that there is. Raises FileNotFoundError if
    neither is there.
    """
    try:
        status = os.stat(part)
    except FileNotFoundError:
        return _valid(_listed(part))
    return _part_units(str(part), key, (status.st_ino, status.st_size, status.st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _part_units(part: str, key: str, version_of_file: tuple[int, int, int]) -> frozenset[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(part)
    listed = _listed(path)
    try:
        said = _metadata(path).get(UNITS_KEY)
        if listed and said == units_digest(listed):
            return frozenset(listed)
        return frozenset(pq.read_table(path, columns=[key], partitioning=None)[key].unique().to_pylist()) - {None}
    except (BadPart, pa.ArrowException, OSError, ValueError, KeyError):
        return _valid(listed)


def _listed(part: Path) -> list[str]:
    try:
        return units_file(part).read_text(errors="replace").split()
    except OSError:
        return []


def _valid(units: Iterable[str]) -> frozenset[str]:
    """Return those that can be ids. A list that cannot be checked must not lead to files outside of the folder."""
    return frozenset(unit for unit in units if UNIT_ID.fullmatch(unit))


def _said(metadata: Mapping[bytes, bytes]) -> dict[str, Any] | None:
    try:
        said = json.loads(metadata[PART_KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _metadata(path: Path) -> Mapping[bytes, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if _footer(path) is None:
        raise BadPart(NOT_PARQUET)
    try:
        return pq.read_metadata(path).metadata or {}
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadPart((str(error).splitlines() or [type(error).__name__])[0]) from error


def looks_like_parquet(path: Path) -> bool:
    """Return whether a file begins and ends as parquet files do. Raises OSError if the file cannot be read."""
    return _footer(path) is not None


def _footer(path: Path) -> bytes | None:
    """Return the footer of a parquet file; None for anything else, such as a cut file, a folder or a pipe.

    Raises OSError if the file cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # to open a pipe would otherwise wait for a writer
    except OSError:
        if path.is_symlink():  # to nothing, or in a circle
            return None
        raise
    try:
        status = os.fstat(fd)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode) or size < 12 or os.pread(fd, 4, 0) != b"PAR1":
            return None
        tail = os.pread(fd, _TAIL, max(0, size - _TAIL))
        if tail[-4:] != b"PAR1":
            return None
        length = int.from_bytes(tail[-8:-4], "little")
        if length > size - 12:
            return None
        return tail[-8 - length : -8] if length <= len(tail) - 8 else os.pread(fd, length, size - 8 - length)
    finally:
        os.close(fd)
