"""The manifest: a run frozen as JSON. Every later command on the run reads the manifest and no YAML file.

    {"manifest_version": 3, "kind": "ablation", "id": "0123456789ab", "working_directory": "/home/me",
     "title": "model gpt2", "settings": {...}, "parts": ["ioi", "wikitext"], "units": [["<unit id>", 0], ...], ...,
     "checksum": "<24 hexadecimal digits>"}

`kind` names the measurement. `parts` are the parts of the run that `harness status` counts separately; a unit names its
part by its index there. `id` is a hash of the ids of the units, and every part of the tables names it. `checksum` is a
hash of all but the keys in UNSEALED, so that an edit of what is measured is noticed. Whether the settings still mean
these units is checked when the run is restored. A measurement adds keys of its own for whatever else it needs to
restore the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.measurement import Measurement
from harness.engine.plan import Plan, canonical, digest
from harness.errors import InputError
from harness.files import write_json
from harness.settings.validation import plain
from harness.tables.identity import MANIFEST, load_manifest, manifest_text, parsed_manifest, said_by
from harness.tables.schema import UNIT_ID, TableSet

if TYPE_CHECKING:
    import pandas

MANIFEST_VERSION = 3
KEYS = ("manifest_version", "kind", "id", "working_directory", "title", "settings", "parts", "units", "checksum")
UNSEALED = ("manifest_version", "kind", "working_directory", "title", "settings", "checksum")
MAX_DEPTH = 50  # of lists and mappings inside each other; what the harness writes has fewer than ten
# Settings that no number depends on: two runs that differ in them alone differ in nothing that a message should name.
_NUMBERLESS = ("output", "cluster.", "tracker.", "report.", "runtime.threads", "runtime.cache")


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read. units: (unit id, part) in the order in which they run. content: the whole file."""

    kind: str
    id: str
    title: str
    units: tuple[tuple[str, str], ...]
    content: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings as plain values. It is a copy, because others share the content."""
        return deepcopy(self.content["settings"])

    def enter(self) -> None:
        """Change into the working directory in which the run was frozen, so that relative paths have their meaning."""
        if Path(self.content["working_directory"]).is_dir():
            os.chdir(self.content["working_directory"])


def manifest_of(measurement: Measurement, plan: Plan) -> dict[str, Any]:
    """Return the manifest of a plan as JSON."""
    parts = list(dict.fromkeys(unit.part for unit in plan.units))
    index = {part: i for i, part in enumerate(parts)}
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "kind": measurement.name,
        "id": plan.id,
        "working_directory": os.getcwd(),
        "title": plan.title(),
        "settings": plain(plan.settings),
        "parts": parts,
        "units": [[unit.id, index[unit.part]] for unit in plan.units],
        **plan.frozen(),
    }
    return {**manifest, "checksum": checksum_of(manifest)}


def checksum_of(content: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest, which is the same before and after it is added, and before and after JSON."""
    sealed = {key: value for key, value in content.items() if key not in UNSEALED}
    return digest(canonical(json.loads(json.dumps(sealed, default=str))))


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings of a run by dotted name, without those that are null; none if there is no manifest."""
    content = load_manifest(folder)
    settings = content.get("settings") if isinstance(content, dict) else None
    return {key: value for key, value in _flat(settings or {}) if value is not None and value != []}


def freeze(measurement: Measurement, plan: Plan) -> None:
    """Write the manifest atomically, or check that the folder already holds this very run.

    Raises InputError as `require_own` does, and if the manifest cannot be written.
    """
    if require_own(measurement, plan):
        return
    try:
        write_json(plan.folder / MANIFEST, manifest_of(measurement, plan))
    except OSError as error:
        raise InputError(f"output: cannot write to {plan.folder}: {error.strerror}; name another folder") from error


def require_own(measurement: Measurement, plan: Plan) -> bool:
    """Return whether the folder of a plan holds its manifest. Without one it may hold parts of this run.

    Raises InputError if the folder holds another run, naming the first setting that differs, or parts of another run.
    """
    folder, there = plan.folder, manifest_there(measurement.name, plan.folder)
    if there is None:
        _refuse_parts_of_others(measurement, plan)
        return False
    if there.id != plan.id:
        raise InputError(
            f"output: {folder} holds another {measurement.name} ({there.id}, not {plan.id};"
            f" {_first_difference(there.settings, plain(plan.settings))}); leave output unset or name another"
            " folder"
        )
    return True


def _refuse_parts_of_others(measurement: Measurement, plan: Plan) -> None:
    for part in sorted(plan.folder.glob("*/*.parquet")):
        said = said_by(part)
        if said is None and part.parent.name not in measurement.tables.names():
            continue  # not a file of the harness
        if said is None or said.get("run") != plan.id:
            whose = "an unknown run" if said is None else f"the run {said.get('run')!r}"
            raise InputError(f"output: {plan.folder} has no {MANIFEST}, and {part.parent.name}/{part.name} belongs to"
                             f" {whose}, not to {plan.id}; restore the manifest or name another folder")


def manifest_there(kind: str, folder: Path) -> Manifest | None:
    """Return the manifest of the run of this kind that a folder holds already, or None if it holds no run.

    Raises InputError if the folder holds a run of another kind.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    there = read_manifest(folder)
    if there.kind != kind:
        raise InputError(f"output: {folder} holds a run of another kind ({there.kind}); name another folder")
    return there


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """Return the manifest of a folder that the harness wrote.

    Raises InputError if there is none, if it cannot be read, and if it is not as the harness wrote it.
    """
    text = manifest_text(Path(folder))
    if text is None:
        raise InputError(f"{folder}: holds nothing that harness can read (no {MANIFEST}); give the folder that harness"
                         " run, spectra or search wrote")
    return _checked(Path(folder), text)


@lru_cache(maxsize=2)  # of the text, so that a manifest that was changed is checked again
def _checked(folder: Path, text: str) -> Manifest:
    path, content = folder / MANIFEST, parsed_manifest(folder, text)
    version = content.get("manifest_version") if isinstance(content, dict) else None
    if version is not None and version != MANIFEST_VERSION:
        raise InputError(
            f"{path}: version {version!r}, this harness reads version {MANIFEST_VERSION};"
            " use the harness version that froze the study"
        )
    lacking = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if lacking:
        raise InputError(f"{path}: not a manifest, without {', '.join(lacking)}; restore it or run the study anew")
    wrong = _wrong_key(content)
    if wrong is not None:
        raise InputError(f"{path}: not a manifest, {wrong}; restore it or run the study anew")
    units = tuple((unit_id, content["parts"][part]) for unit_id, part in content["units"])
    if content["checksum"] != checksum_of(content):
        raise InputError(f"{path}: changed since it was frozen (its checksum is another); restore it or run the study"
                         " anew")
    return Manifest(content["kind"], content["id"], content["title"], units, content)


def _wrong_key(content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a value of the manifest's own keys, or None."""
    for key in ("kind", "id", "working_directory", "title"):
        if not isinstance(content[key], str) or "\0" in content[key]:
            return f"{key} is not a text"
    if not isinstance(content["settings"], dict):
        return "settings is not a mapping"
    if _depth_exceeds(content, MAX_DEPTH):
        return f"it is nested more than {MAX_DEPTH} levels deep"
    parts, units = content["parts"], content["units"]
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return "parts is not a list of texts"
    if not isinstance(units, list) or not units:
        return "units is not a list of pairs"
    seen: set[str] = set()
    for unit in units:
        if not isinstance(unit, list) or len(unit) != 2:
            return "its units are not pairs"
        unit_id, part = unit
        if not isinstance(unit_id, str) or not UNIT_ID.fullmatch(unit_id):
            return f"the id of unit {len(seen)} is not letters, digits, '-' and '_'"
        if unit_id in seen:
            return f"unit {unit_id} is there twice"
        if type(part) is not int or not 0 <= part < len(parts):
            return f"unit {unit_id} is of no part in parts"
        seen.add(unit_id)
    return None


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [item for one in level if isinstance(one, (dict, list))
                 for item in (one.values() if isinstance(one, dict) else one) if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn what goes wrong with a value of a JSON file of the harness into an InputError of one line.

    what: the part of the file that is read, as the beginning of "... is not as harness wrote it".
    """
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: {what} is not as harness wrote it ({reason}); restore it or run the study anew"
                         ) from error


def in_order(folder: str | os.PathLike, rows: pandas.DataFrame, key: str) -> pandas.DataFrame:
    """Return the rows of a table in the run's order of units. The rows of one unit keep their order.

    key: the column that holds the ids of the units. Without a manifest the rows stay in the order in which they are.
    """
    if not (Path(folder) / MANIFEST).is_file():
        return rows
    place = {unit_id: i for i, (unit_id, _) in enumerate(read_manifest(folder).units)}
    places = rows[key].map(place).fillna(len(place))
    return rows.iloc[places.argsort(kind="stable")].reset_index(drop=True)


def read_in_order(folder: str | os.PathLike, tables: TableSet, name: str) -> pandas.DataFrame:
    """Return the rows of a table that belong to done units, in the order of the run.

    Rows of a unit that is not done, which a crash may leave in all tables but the first, are left out. Raises
    SchemaVersionError."""
    from harness.tables.store import read_table, unit_states

    rows = read_table(folder, tables, name)
    if name != tables.primary.name:
        rows = rows[rows[tables.key].isin(unit_states(folder, tables))].reset_index(drop=True)
    return in_order(folder, rows, tables.key)


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _first_difference(there: Any, here: Any) -> str:
    old, new = dict(_flat(there)), dict(_flat(json.loads(json.dumps(here, default=str))))
    for key in {**new, **old}:
        if old.get(key) != new.get(key) and not key.startswith(_NUMBERLESS):
            return f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"
    return "the model's weights or the data differ"
