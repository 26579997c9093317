"""The manifest: a study frozen as JSON. Whoever works on a study later reads it, and no YAML."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.config import Config, validate
from harness.errors import InputError
from harness.execution.json_file import write_json
from harness.execution.study import Ablation, Cell, Study, Target
from harness.spectral.regions import Region

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
KEYS = ("manifest_version", "study_id", "working_directory", "config", "tasks", "targets", "regions", "cells")


def manifest_of(study: Study) -> dict[str, Any]:
    """The manifest as JSON: settings, tasks, and the cells by index into targets and regions."""
    targets = list(dict.fromkeys(cell.ablation.target for cell in study.cells))
    regions = list(dict.fromkeys(cell.ablation.region for cell in study.cells))
    tasks = list(study.tasks)
    target_index = {target: i for i, target in enumerate(targets)}
    region_index = {region: i for i, region in enumerate(regions)}
    task_index = {name: i for i, name in enumerate(tasks)}
    return {
        "manifest_version": MANIFEST_VERSION,
        "study_id": study.study_id,
        "working_directory": os.getcwd(),
        "config": dataclasses.asdict(study.config),
        "tasks": study.tasks,
        "targets": [dataclasses.asdict(target) for target in targets],
        "regions": [dataclasses.asdict(region) for region in regions],
        "cells": [
            [c.cell_id, target_index[c.ablation.target], region_index[c.ablation.region], task_index[c.task]]
            for c in study.cells
        ],
    }


def freeze(folder: Path, study: Study) -> None:
    """Write the manifest atomically, or check that the folder already holds this very study.

    Raises InputError when it holds another, naming the first setting that differs, and where it cannot be written.
    """
    path = folder / MANIFEST
    if path.is_file():
        there = read_manifest(folder)
        if there["study_id"] != study.study_id:
            raise InputError(
                f"output: {folder} holds another study ({there['study_id']}, not {study.study_id};"
                f" {_first_difference(there['config'], dataclasses.asdict(study.config))});"
                " leave output unset or name another folder"
            )
        return
    try:
        write_json(path, manifest_of(study))
    except OSError as error:
        raise InputError(f"output: cannot write to {folder}: {error.strerror}; name another folder") from error


def study_of(manifest: dict[str, Any]) -> Study:
    """The study that was frozen. Raises InputError for a manifest of another version of the harness."""
    if manifest.get("manifest_version") != MANIFEST_VERSION:
        raise InputError(
            f"{MANIFEST}: version {manifest.get('manifest_version')!r}, this harness reads version {MANIFEST_VERSION};"
            " use the harness version that froze the study"
        )
    targets = [Target(**{**one, "matrices": tuple(one["matrices"])}) for one in manifest["targets"]]
    regions = [_region(one) for one in manifest["regions"]]
    tasks = list(manifest["tasks"])
    ablations: dict[tuple[int, int], Ablation] = {}
    cells = []
    for cell_id, target, region, task in manifest["cells"]:
        if (target, region) not in ablations:
            ablations[target, region] = Ablation(targets[target], regions[region])
        cells.append(Cell(cell_id, ablations[target, region], tasks[task]))
    config = validate(_from_dict(Config, manifest["config"], ""))
    return Study(manifest["study_id"], config, manifest["tasks"], tuple(cells))


def _region(values: dict[str, Any]) -> Region:
    reference = values["reference"]
    return Region(**{**values, "reference": None if reference is None else _region(reference)})


def _from_dict(kind: type, values: dict[str, Any], where: str) -> Any:
    """A config dataclass from plain values; what is not there keeps its default."""
    default = kind()
    known = {field.name for field in dataclasses.fields(kind)}
    for key in values.keys() - known:
        raise InputError(f"{MANIFEST}: config.{where}{key} is unknown; use the harness version that froze the study")
    return kind(**{
        key: _from_dict(type(getattr(default, key)), value, f"{where}{key}.")
        if dataclasses.is_dataclass(getattr(default, key)) else value
        for key, value in values.items()
    })


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _first_difference(there: Any, here: Any) -> str:
    old, new = dict(_flat(there)), dict(_flat(json.loads(json.dumps(here, default=str))))
    numberless = ("output", "cluster.", "runtime.threads", "runtime.cache")
    for key in {**new, **old}:
        if old.get(key) != new.get(key) and not key.startswith(numberless):
            return f"{key} is {old.get(key)!r} there, {new.get(key)!r} here"
    return "the model's weights or the data differ"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a study folder. Raises InputError where there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        parts = [str(part.parent) for part in sorted(Path(folder).glob(f"*/{MANIFEST}"))]
        if parts:
            raise InputError(f"{folder}: not a study folder itself, but holds some; give {' or '.join(parts[:4])}")
        raise InputError(f"{folder}: not a study folder (no {MANIFEST}); give the folder that harness run wrote")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); restore it or run the study anew") from error
    lacking = [key for key in KEYS if not isinstance(manifest, dict) or key not in manifest]
    if lacking:
        raise InputError(f"{path}: not a manifest, without {', '.join(lacking)}; restore it or run the study anew")
    return manifest
