"""The measuring of spectra: every matrix of a model, of its checkpoints and of its random control, one by one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from harness.spectral.decomposition import Decomposition, decompose
from harness.spectral.singular_values import SingularValues, singular_values
from harness.tables.writer import Rows

BATCH_BYTES = 2**26  # of float64 matrices whose singular values are computed together; more is not faster


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
        for found in _decomposed(members, source, plan.settings.vectors):
            matrix = found.unit.matrix
            context.describe(f"{weights.label} {matrix.name}")
            yield _measure_matrix(plan, found, inputs.get(matrix.name), common, pair)


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


@dataclass(frozen=True)
class _Decomposed:
    """One matrix with its spectrum, or the error instead of it. seconds: the wall time of the decomposition."""

    unit: Spectrum
    weight: Tensor | None = None
    spectrum: Decomposition | SingularValues | None = None
    seconds: float = 0.0
    error: Exception | None = None


def _decomposed(units: Sequence[Spectrum], source: MatrixSource, vectors: bool) -> Iterator[_Decomposed]:
    """Yield the units with their spectra. Where only values are wanted, neighbours of one shape are taken together."""
    batches = [[unit] for unit in units] if vectors else _batches(units)
    for batch in batches:
        try:
            yield from _together(batch, source, vectors)
        except InputError:
            raise
        except Exception as error:  # an error of one matrix must not touch the others
            if len(batch) == 1:
                yield _Decomposed(batch[0], error=error)
            else:
                for unit in batch:
                    yield from _decomposed([unit], source, vectors)


def _batches(units: Sequence[Spectrum]) -> Iterator[list[Spectrum]]:
    """Yield neighbouring units whose matrices have the same sides, up to BATCH_BYTES of them in float64."""
    batch: list[Spectrum] = []
    for unit in units:
        small, large = sorted(unit.matrix.shape)
        if batch and (sorted(batch[0].matrix.shape) != [small, large] or 8 * small * large * len(batch) > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _together(batch: Sequence[Spectrum], source: MatrixSource, vectors: bool) -> list[_Decomposed]:
    weights = [source.read(unit.matrix) for unit in batch]
    started = time.perf_counter()
    spectra: Sequence[Decomposition | SingularValues]
    spectra = [decompose(weight) for weight in weights] if vectors else singular_values(weights)
    seconds = (time.perf_counter() - started) / len(batch)
    return [_Decomposed(unit, weight, spectrum, seconds) for unit, weight, spectrum in zip(batch, weights, spectra)]


def _measure_matrix(
    plan: SpectraPlan, found: _Decomposed, inputs: Inputs | None, common: Mapping[str, Any], pair: Pair | None
) -> Measured:
    unit, settings = found.unit, plan.settings
    matrix = unit.matrix
    out, width = matrix.shape
    described = {
        **common, "spectrum_id": unit.id, "matrix": matrix.name, "block": matrix.block,
        "layer_type": matrix.layer_type, "expert": matrix.expert, "n_out": out, "n_in": width, "rank": min(out, width),
    }  # fmt: skip
    try:
        if found.error is not None:
            raise found.error
        weight, spectrum = found.weight, found.spectrum
        assert weight is not None and spectrum is not None
        device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
        started = time.perf_counter()
        row, values = spectrum_of(weight, spectrum, settings.estimator, settings.tracy_widom)
        rows: dict[str, Rows] = {"singular_values": TABLES["singular_values"].keyed(described, values)}
        if isinstance(spectrum, Decomposition):
            summary, columns = vectors_of(weight, spectrum, inputs, row["n_above"], row["n_below"])
            row |= summary
            rows["vectors"] = TABLES["vectors"].keyed(described, columns)
        statistics = time.perf_counter() - started
        if pair is not None:
            for name, of_pair in pair.rows(matrix, weight).items():
                rows[name] = [TABLES[name].keyed(described, row) for row in of_pair]
        row |= {
            "status": "ok", "device": device, "seconds_decomposition": found.seconds,
            "seconds_statistics": statistics,
        }
        return Measured(unit, {"matrices": [{**described, **row}], **rows}, described)
    except InputError:
        raise
    except Exception as error:  # an error of one matrix must neither stop the others nor leave it without a row
        return Measured(unit, {"matrices": [error_row(described, error)]}, described)
