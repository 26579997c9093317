"""One unit per matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.engine.plan import Plan, canonical, digest, folder_of, run_id
from harness.errors import InputError
from harness.models.description import ModelDescription
from harness.models.families import matrices_of, skeleton
from harness.models.loading import describe_model
from harness.models.matrices import Matrix
from harness.models.targets import choose_matrices
from spectral_extras.norms.settings import NormsSettings


@dataclass(frozen=True)
class MatrixUnit:
    """One matrix. part: its layer type, which `status` counts apart."""

    id: str
    matrix: Matrix
    part: str


@dataclass(frozen=True, kw_only=True)
class NormsPlan(Plan):
    """The matrices of one model."""

    settings: NormsSettings
    units: tuple[MatrixUnit, ...]
    description: ModelDescription


def plan(settings: NormsSettings) -> NormsPlan:
    """Raises InputError."""
    description = describe_model(settings.model)
    matrices = matrices_of(skeleton(description.config, description.family), description.family)
    known = {"measurement": "norms", "model": description.identity, "dtype": description.dtype}
    units = tuple(
        MatrixUnit(digest(canonical({**known, "matrix": matrix.name})), matrix, matrix.layer_type)
        for matrix in choose_matrices(matrices, settings.layer_types, None)
    )
    folder = folder_of(settings.output, f"norms-{run_id(unit.id for unit in units)[:8]}")
    return NormsPlan(folder=folder, settings=settings, units=units, description=description)


def restore(folder: Path, manifest: Mapping[str, Any], settings: NormsSettings) -> NormsPlan:
    """Raises InputError where the weights are no longer the same."""
    again = dataclasses.replace(plan(settings), folder=folder)
    if again.id != manifest["id"]:
        raise InputError(f"model.name: {settings.model.name!r} is no longer what {folder} was frozen for")
    return again


def describe(plan: NormsPlan) -> str:
    """The text of `harness plan norms`."""
    return f"norms {plan.id}  folder {plan.folder}\nmatrices {len(plan.units)}"
