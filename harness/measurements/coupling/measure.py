"""Measure coupling: one set of weights after the other, one ablation after the other, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from harness.engine.measurement import Context, Measured, require_same_weights
from harness.engine.ranks import Ranks
from harness.engine.run import error_row
from harness.errors import InputError
from harness.measurements.coupling.rows import rows_of
from harness.measurements.coupling.tables import TABLES
from harness.measurements.coupling.units import CouplingPlan, Unit, Weights
from harness.models.decompositions import DecompositionCache
from harness.models.editing import ablated
from harness.models.identity import parameters_digest
from harness.models.loading import LoadedModel, load
from harness.models.sources import initialised

DECOMPOSITION_BYTES = 2**30  # of decompositions that several ablations share


def open_session(plan: CouplingPlan, ranks: Ranks, progress: bool) -> None:
    """Set the number of CPU threads. No session is opened, because each set of weights is opened by itself."""
    if plan.settings.threads is not None:
        torch.set_num_threads(plan.settings.threads)


def measure(plan: CouplingPlan, units: Sequence[Unit], context: Context) -> Iterator[Measured]:
    """Measure one set of weights after the other, so that only one is in memory at a time.

    Raises SpoiledRun if the weights in memory are not the same after the ablations as before.
    """
    by_weights: dict[int, list[Unit]] = {}
    for unit in units:
        by_weights.setdefault(unit.weights_index, []).append(unit)
    loaded, last, before = None, None, ""
    for index, members in sorted(by_weights.items()):
        weights = plan.weights[index]
        if loaded is None or last is None or not last.same_model(weights):
            if loaded is not None:
                require_same_weights(loaded.model, before)
            loaded = None  # so that there are never two models in memory
            loaded = _open(plan, weights, context.progress)
            before = parameters_digest(loaded.model)
            decompose = DecompositionCache(loaded, DECOMPOSITION_BYTES)
        last = weights
        yield from _measure_weights(plan, members, context, loaded, decompose)
    if loaded is not None:
        require_same_weights(loaded.model, before)


def _open(plan: CouplingPlan, weights: Weights, progress: bool) -> LoadedModel:
    if weights.init == "random":
        return initialised(weights.model, weights.description, plan.settings.seed)
    return load(weights.model, weights.description, progress=progress)


def _measure_weights(
    plan: CouplingPlan, units: Sequence[Unit], context: Context, loaded: LoadedModel, decompose: DecompositionCache
) -> Iterator[Measured]:
    """Measure units that have the same weights."""
    weights = plan.weights[units[0].weights_index]
    common = _common(plan, weights, loaded)
    with ExitStack() as undo:
        problem = None
        if weights.ablation is not None:
            try:
                realised = undo.enter_context(ablated(loaded, weights.ablation, decompose))
                common |= {"energy_removed": realised.energy_removed, "realised_removal": realised.realised_removal}
            except InputError:
                raise
            except Exception as error:  # an ablation that fails must neither stop the others nor leave no row
                problem = error
        for unit in units:
            context.describe(f"{weights.label} prompt {unit.prompt.name}")
            described = {**common, "coupling_id": unit.id, "prompt_id": unit.prompt.name,
                         "n_tokens": len(unit.prompt.tokens)}
            if problem is not None:
                yield Measured(unit, {"jacobians": [error_row(described, problem)]}, described)
            else:
                yield _measure_prompt(plan, unit, loaded, described)


def _common(plan: CouplingPlan, weights: Weights, loaded: LoadedModel) -> dict[str, Any]:
    settings, description, task, ablation = plan.settings, weights.description, plan.task, weights.ablation
    device = loaded.device
    return {
        "model": weights.model.label,
        "checkpoint": weights.checkpoint,
        "checkpoint_index": weights.index,
        "init": weights.init,
        "target": ablation and ablation.target.label,
        "region": ablation and ablation.label,
        "seed": weights.seed,
        "n_blocks": plan.n_blocks,
        "width": plan.width,
        "protocol": json.dumps({"task": task.name, **task.protocol}, sort_keys=True, default=str),
        "gguf_file": settings.model.gguf_file,
        "model_digest": description.identity.get("digest") or description.identity.get("revision"),
        "model_type": description.config.model_type,
        "dtype": description.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _measure_prompt(
    plan: CouplingPlan, unit: Unit, loaded: LoadedModel, described: Mapping[str, Any]
) -> Measured:
    try:
        found = rows_of(loaded, plan.settings, unit.prompt, plan.way)
        return Measured(unit, {
            "jacobians": [{**described, **row, "status": "ok"} for row in found.jacobians],
            "couplings": TABLES["couplings"].keyed(described, found.couplings),
            "trajectories": [TABLES["trajectories"].keyed(described, row) for row in found.trajectories],
            "points": TABLES["points"].keyed(described, found.points),
        }, described)
    except InputError:
        raise
    except Exception as error:  # an error of one prompt must neither stop the others nor leave it without a row
        return Measured(unit, {"jacobians": [error_row(described, error)]}, described)
