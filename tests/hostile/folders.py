"""Folders of studies that nobody ran, whose parts and manifests are then spoiled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from harness.cli import main
from harness.engine.manifest import MANIFEST, MANIFEST_VERSION, checksum_of
from harness.engine.plan import run_id
from harness.measurements.ablation.tables import TABLES
from harness.tables.store import write_unit
from tests.tables.synthetic import error_row, example_columns, metric_row

UNITS = ("aaaa", "bbbb", "cccc", "dddd")
FAILED = "dddd"
TARGET = {"kind": "matrix", "label": "0.q_proj", "matrices": ["0.q_proj"], "first_block": 0, "block": 0,
          "layer_type": "q_proj"}


def manifest_of(units: Sequence[str] = UNITS) -> dict:
    """The manifest of a study of these units, as `harness plan --freeze` would write it."""
    manifest = {
        "manifest_version": MANIFEST_VERSION, "kind": "ablation", "id": run_id(units), "working_directory": "/",
        "title": "model tiny", "settings": {"model": {"name": "tiny"}, "runtime": {"batch_tokens": 64}},
        "parts": ["text"], "units": [[unit, 0] for unit in units],
        "tasks": {"text": {"digest": "0", "protocol": {}}}, "targets": [TARGET],
        "regions": [{"by": "fraction", "kind": "small", "start": 0.9, "stop": 1.0}],
        "cells": [[0, 0, 0] for _ in units],
    }  # fmt: skip
    return {**manifest, "checksum": checksum_of(manifest)}


def write_manifest(folder: Path, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(content if isinstance(content, str) else json.dumps(content))


def write_one(folder: Path, unit: str, run: str, **columns) -> None:
    rows = [error_row(unit, **columns)] if unit == FAILED else [metric_row(unit, **columns)]
    write_unit(folder, TABLES, unit, {"metrics": rows, "examples": example_columns(unit)}, run)


def make_study(folder: Path, units: Sequence[str] = UNITS, **columns) -> Path:
    """A study of these units with all of its parts; the unit `dddd` has failed."""
    write_manifest(folder, manifest_of(units))
    for unit in units:
        write_one(folder, unit, run_id(units), **columns)
    return folder


def complaint(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(list(arguments)) == 2, capsys.readouterr()
    printed = capsys.readouterr()
    assert printed.err.startswith("harness: ") and printed.err.count("\n") == 1, printed.err
    return printed.err
