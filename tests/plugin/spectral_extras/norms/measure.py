"""Norms of one matrix after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.engine.measurement import Context, Measured
from harness.engine.ranks import Ranks
from harness.engine.run import error_row
from harness.models.sources import MatrixSource, open_source
from spectral_extras.norms.units import MatrixUnit, NormsPlan


def open_session(plan: NormsPlan, ranks: Ranks, progress: bool) -> MatrixSource:
    """The matrices, streamed from the checkpoint."""
    return open_source(plan.settings.model, plan.description)


def measure(plan: NormsPlan, units: Sequence[MatrixUnit], context: Context) -> Iterator[Measured]:
    """Two norms of every matrix."""
    for unit in units:
        context.describe(unit.matrix.name)
        described = {"unit_id": unit.id, "model": plan.settings.model.name, "matrix": unit.matrix.name,
                     "layer_type": unit.matrix.layer_type}
        try:
            weight = context.session.read(unit.matrix).double()
            row = {**described, "status": "ok", "frobenius": float(weight.norm()),
                   "largest_row": float(weight.norm(dim=1).max())}
        except Exception as error:
            row = error_row(described, error)
        yield Measured(unit, {"norms": [row]}, described)
