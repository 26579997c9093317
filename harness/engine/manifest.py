"""The manifest: a run frozen as JSON. Every later command on the run reads the manifest and no YAML file.

    {"manifest_version": 2, "kind": "ablation", "id": "0123456789ab", "working_directory": "/home/me",
     "title": "model gpt2", "settings": {...}, "parts": ["ioi", "wikitext"], "units": [["<unit id>", 0], ...], ...}

`kind` names the measurement. `parts` are the parts of the run that `harness status` counts separately; a unit names its
part by its index there. A measurement adds keys of its own for whatever else it needs to restore the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.measurement import Measurement
from harness.engine.plan import Plan
from harness.errors import InputError
from harness.files import write_json
from harness.settings.validation import plain

if TYPE_CHECKING:
    import pandas

MANIFEST = "manifest.json"
MANIFEST_VERSION = 2
KEYS = ("manifest_version", "kind", "id", "working_directory", "title", "settings", "parts", "units")
# Settings that no number depends on: two runs that differ in them alone differ in nothing that a message should name.
_NUMBERLESS = ("output", "cluster.", "runtime.threads", "runtime.cache")


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
        """The settings as plain values."""
        return self.content["settings"]

    def enter(self) -> None:
        """Change into the working directory in which it was frozen, so that relative paths mean what they meant."""
        if Path(self.content["working_directory"]).is_dir():
            os.chdir(self.content["working_directory"])


def manifest_of(measurement: Measurement, plan: Plan) -> dict[str, Any]:
    """The manifest of a plan as JSON."""
    parts = list(dict.fromkeys(unit.part for unit in plan.units))
    index = {part: i for i, part in enumerate(parts)}
    return {
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


def freeze(measurement: Measurement, plan: Plan) -> None:
    """Write the manifest atomically, or check that the folder already holds this very run.

    Raises InputError when it holds another, naming the first setting that differs, and where it cannot be written.
    """
    folder = plan.folder
    there = manifest_there(measurement.name, folder)
    if there is not None:
        if there.id != plan.id:
            raise InputError(
                f"output: {folder} holds another {measurement.name} ({there.id}, not {plan.id};"
                f" {_first_difference(there.settings, plain(plan.settings))}); leave output unset or name another"
                " folder"
            )
        return
    try:
        write_json(folder / MANIFEST, manifest_of(measurement, plan))
    except OSError as error:
        raise InputError(f"output: cannot write to {folder}: {error.strerror}; name another folder") from error


def manifest_there(kind: str, folder: Path) -> Manifest | None:
    """The manifest of the run of this kind that a folder holds already; None for no run. Raises InputError where it
    holds a run of another kind."""
    if not (folder / MANIFEST).is_file():
        return None
    there = read_manifest(folder)
    if there.kind != kind:
        raise InputError(f"output: {folder} holds a run of another kind ({there.kind}); name another folder")
    return there


def read_manifest(folder: str | os.PathLike) -> Manifest:
    """The manifest of a folder that the harness wrote. Raises InputError where there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: holds nothing that harness can read (no {MANIFEST}); give the folder that harness"
                         " run, spectra or search wrote")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore it or run the study anew") from error
    version = content.get("manifest_version") if isinstance(content, dict) else None
    if version is not None and version != MANIFEST_VERSION:
        raise InputError(
            f"{path}: version {version!r}, this harness reads version {MANIFEST_VERSION};"
            " use the harness version that froze the study"
        )
    lacking = [key for key in KEYS if not isinstance(content, dict) or key not in content]
    if lacking:
        raise InputError(f"{path}: not a manifest, without {', '.join(lacking)}; restore it or run the study anew")
    try:
        units = tuple((str(unit_id), content["parts"][part]) for unit_id, part in content["units"])
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a manifest, its units are not pairs; restore it or run it anew") from error
    return Manifest(content["kind"], content["id"], content["title"], units, content)


def in_order(folder: str | os.PathLike, rows: pandas.DataFrame, key: str) -> pandas.DataFrame:
    """The rows of a table, sorted by the run's order of units; the rows of one unit keep their order. key: the column
    that holds the ids of the units. Where the folder has no manifest, the rows stay in the order in which they are."""
    if not (Path(folder) / MANIFEST).is_file():
        return rows
    place = {unit_id: i for i, (unit_id, _) in enumerate(read_manifest(folder).units)}
    places = rows[key].map(place).fillna(len(place))
    return rows.iloc[places.argsort(kind="stable")].reset_index(drop=True)


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
