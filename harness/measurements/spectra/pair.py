"""The rows of changes: each matrix of a tuned model beside that of its reference and of the other tuned models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.measurements.spectra.units import SpectraPlan, Weights
from harness.models.matrices import Matrix
from harness.models.sources import MatrixSource, open_source
from harness.spectral.changes import (
    Change,
    Frame,
    changes_of,
    frame,
    overlap_columns,
    region_rows,
    relation_columns,
    rotated,
    rounding_floor,
    spectrum_columns,
)

Rows = list[dict[str, Any]]


class Pair:
    """A tuned model and its reference, with the tuned models before it in the run.

    One matrix of each is in memory at a time if their checkpoints can be streamed. weights: the tuned model, which has
    a reference.
    """

    def __init__(self, plan: SpectraPlan, weights: Weights) -> None:
        assert weights.reference is not None
        self.settings, self.weights = plan.settings, weights
        self.label = weights.reference.settings.label
        self.reference = open_source(weights.reference.settings, weights.reference.description)
        before = plan.weights[: plan.weights.index(weights)]
        self.before: list[tuple[str, MatrixSource]] = [
            (one.label, open_source(one.model, one.description)) for one in before
        ]

    def rows(self, matrix: Matrix, weight: Tensor) -> dict[str, Rows]:
        """Return the rows of the three tables of changes without the columns that identify the matrix.

        weight: that of the tuned model, [out, in].
        """
        tuned, reference = (one.to(torch.float64) for one in (weight, self.reference.read(matrix)))
        base, options = frame(reference), self.settings.changes
        found: dict[str, Rows] = {"changes": [], "change_regions": []}
        real: Frame | None = None
        started = time.perf_counter()
        for change in changes_of(reference, tuned, list(options.controls), options.seeds, matrix.name):
            real = real or change.frame
            key = {"reference": self.label, "control": change.control, "control_seed": change.seed}
            found["changes"].append({**key, **self._row(base, reference, tuned, change),
                                     "seconds_change": time.perf_counter() - started})
            if float(change.frame.sigma[0]):
                found["change_regions"] += [{**key, **row} for row in region_rows(base, change)]
            started = time.perf_counter()
        assert real is not None
        if overlaps := self._overlaps(matrix, reference, real):
            found["change_overlaps"] = overlaps
        return found

    def _row(self, base: Frame, reference: Tensor, tuned: Tensor, change: Change) -> dict[str, Any]:
        of_reference = float(torch.linalg.matrix_norm(reference))
        row = {
            "share_unchanged": float((change.matrix == 0).to(torch.float64).mean()),
            "relative_change": float(torch.linalg.matrix_norm(change.matrix)) / of_reference,
            "reference_sigma_max": float(base.sigma[0]),
        }
        if change.control == "real":
            row["rounding_floor"] = rounding_floor(tuned, reference)
        if not float(change.frame.sigma[0]):
            return row
        shape, settings = (reference.shape[0], reference.shape[1]), self.settings
        return {
            **row, **spectrum_columns(change.frame, shape, settings.estimator, settings.tracy_widom),
            **relation_columns(base, reference, change),
        }  # fmt: skip

    def _overlaps(self, matrix: Matrix, reference: Tensor, own: Frame) -> Rows:
        rows: Rows = []
        for label, source in self.before:
            other = frame(source.read(matrix).to(torch.float64) - reference)
            if not (float(own.sigma[0]) and float(other.sigma[0])):
                continue
            rows += self._both_orders("real", None, [(self.weights.label, own), (label, other)])
            for seed in self.settings.changes.seeds if "rotated" in self.settings.changes.controls else ():
                turned = [(one, rotated(change, seed, f"{one} {matrix.name}"))
                          for one, change in ((self.weights.label, own), (label, other))]
                rows += self._both_orders("rotated", seed, turned)
        return rows

    def _both_orders(self, control: str, seed: int | None, two: Sequence[tuple[str, Frame]]) -> Rows:
        key = {"reference": self.label, "control": control, "control_seed": seed}
        return [{**key, "checkpoint": one, "other": other, **overlap_columns(change, beside)}
                for (one, change), (other, beside) in (two, two[::-1])]
