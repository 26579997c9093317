"""The measuring of spectra: every matrix of a model, of its checkpoints and of its random control, one by one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from harness.engine.measurement import Context, Measured
from harness.engine.ranks import Ranks
from harness.engine.run import error_row
from harness.errors import InputError
from harness.evaluation.covariance import CovarianceStream
from harness.measurements.spectra.pair import Pair
from harness.measurements.spectra.rows import Inputs, spectrum_of, vectors_of
from harness.measurements.spectra.tables import TABLES
from harness.measurements.spectra.units import SpectraPlan, Spectrum, Weights
from harness.models.loading import LoadedModel, load
from harness.models.matrices import Matrix
from harness.models.sources import MatrixSource, from_model, initialised, open_source
from harness.spectral.decomposition import decompose
from harness.tables.writer import Rows


def open_session(plan: SpectraPlan, ranks: Ranks, progress: bool) -> None:
    """Set the number of CPU threads. No session is opened, because each set of weights is opened by itself."""
    if plan.settings.threads is not None:
        torch.set_num_threads(plan.settings.threads)


def measure(plan: SpectraPlan, units: Sequence[Spectrum], context: Context) -> Iterator[Measured]:
    """Measure one set of weights after the other, so that only one is in memory at a time."""
    for index, weights in enumerate(plan.weights):
        of_weights = [unit for unit in units if unit.weights_index == index]
        if of_weights:
            yield from _measure_weights(plan, weights, of_weights, context)


def _measure_weights(
    plan: SpectraPlan, weights: Weights, units: Sequence[Spectrum], context: Context
) -> Iterator[Measured]:
    source, loaded = _open(plan, weights, context.progress)
    pair = Pair(plan, weights) if weights.reference is not None else None
    stream = None
    if plan.task is not None and loaded is not None:
        windows = plan.task.protocol.get("window") is not None
        stream = CovarianceStream(loaded, plan.task.requests, windows, plan.settings.batch_tokens)
    common = _common(plan, weights, source)
    by_block: dict[int, list[Spectrum]] = {}
    for unit in units:
        by_block.setdefault(unit.matrix.block, []).append(unit)
    for block, members in sorted(by_block.items()):
        inputs = _inputs(stream, block, [unit.matrix for unit in members]) if stream is not None else {}
        for unit in members:
            context.describe(f"{weights.label} {unit.matrix.name}")
            yield _measure_matrix(plan, unit, source, inputs.get(unit.matrix.name), common, pair)


def _open(plan: SpectraPlan, weights: Weights, progress: bool) -> tuple[MatrixSource, LoadedModel | None]:
    """Return the source of the matrices, and the whole model if it had to be loaded, else None."""
    if weights.init == "random":
        loaded = initialised(weights.model, weights.description, plan.settings.seed)
        return from_model(loaded, "initialised"), loaded
    if plan.task is None:
        return open_source(weights.model, weights.description), None
    loaded = load(weights.model, weights.description, progress=progress)
    return from_model(loaded), loaded


def _inputs(stream: CovarianceStream, block: int, matrices: Sequence[Matrix]) -> dict[str, Inputs]:
    while stream.block < block:
        stream.next_block([])
    covariances = stream.next_block(matrices)
    # Matrices that read the same activations share one covariance object. Its eigenvectors are computed only once.
    found: dict[int, Inputs] = {}
    for covariance in covariances.values():
        if id(covariance) not in found:
            found[id(covariance)] = Inputs(covariance.directions(), covariance.n_tokens)
    return {name: found[id(covariance)] for name, covariance in covariances.items()}


def _common(plan: SpectraPlan, weights: Weights, source: MatrixSource) -> dict[str, Any]:
    settings, description, task = plan.settings, weights.description, plan.task
    return {
        "model": settings.model.label,
        "checkpoint": weights.checkpoint,
        "checkpoint_index": weights.index,
        "init": weights.init,
        "seed": weights.seed,
        "estimator": settings.estimator,
        "tracy_widom": settings.tracy_widom,
        "covariance": task and json.dumps({"task": task.name, **task.protocol}, sort_keys=True, default=str),
        "weights": source.how,
        "gguf_file": settings.model.gguf_file,
        "model_digest": description.identity.get("digest") or description.identity.get("revision"),
        "model_type": description.config.model_type,
        "dtype": description.dtype,
    }


def _measure_matrix(
    plan: SpectraPlan, unit: Spectrum, source: MatrixSource, inputs: Inputs | None, common: Mapping[str, Any],
    pair: Pair | None = None,
) -> Measured:
    matrix, settings = unit.matrix, plan.settings
    out, width = matrix.shape
    described = {
        **common, "spectrum_id": unit.id, "matrix": matrix.name, "block": matrix.block,
        "layer_type": matrix.layer_type, "expert": matrix.expert, "n_out": out, "n_in": width, "rank": min(out, width),
    }  # fmt: skip
    try:
        weight = source.read(matrix)
        device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
        started = time.perf_counter()
        decomposition = decompose(weight)
        decomposed = time.perf_counter()
        row, values = spectrum_of(weight, decomposition, settings.estimator, settings.tracy_widom)
        rows: dict[str, Rows] = {"singular_values": TABLES["singular_values"].keyed(described, values)}
        if settings.vectors:
            summary, columns = vectors_of(weight, decomposition, inputs, row["n_above"], row["n_below"])
            row |= summary
            rows["vectors"] = TABLES["vectors"].keyed(described, columns)
        statistics = time.perf_counter() - decomposed
        if pair is not None:
            for name, of_pair in pair.rows(matrix, weight).items():
                rows[name] = [TABLES[name].keyed(described, row) for row in of_pair]
        row |= {
            "status": "ok", "device": device, "seconds_decomposition": decomposed - started,
            "seconds_statistics": statistics,
        }
        return Measured(unit, {"matrices": [{**described, **row}], **rows}, described)
    except InputError:
        raise
    except Exception as error:  # an error of one matrix must neither stop the others nor leave it without a row
        return Measured(unit, {"matrices": [error_row(described, error)]}, described)
