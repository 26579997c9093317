"""The plan of the components of a model, whose units are its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.engine.plan import Plan, ShardCost, SumOfCosts
from harness.evaluation.calibration import CalibrationText
from harness.evaluation.requests import ScoredTask
from harness.measurements.components.settings import ComponentsSettings
from harness.models.description import ModelDescription
from harness.models.loading import train_embedded
from harness.models.matrices import Matrix
from harness.models.reference import Reference
from harness.spectral.decomposition import decomposition_flops


@dataclass(frozen=True)
class Unit:
    """One matrix. part: its layer type, because `harness status` counts the matrices of each."""

    id: str
    matrix: Matrix
    part: str


@dataclass(frozen=True, kw_only=True)
class ComponentsPlan(Plan):
    """The plan of the components of a model.

    text: the calibration text, or None. tasks: those whose metrics are derived. reference: with what the components are
    compared, or None.
    """

    settings: ComponentsSettings
    units: tuple[Unit, ...]
    description: ModelDescription
    tokenizer: Any
    text: CalibrationText | None
    tasks: dict[str, ScoredTask]
    reference: Reference | None

    def shard_cost(self) -> ShardCost:
        """Return the cost of an empty shard: of its decompositions, in floating-point operations."""
        return SumOfCosts(lambda unit: decomposition_flops(*unit.matrix.shape))

    def before_jobs(self) -> None:
        """Train the embedded model once, so that not every job trains it."""
        train_embedded([self.settings.model])
