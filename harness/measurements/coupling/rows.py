"""Make the rows of one prompt: its Jacobians, their pairs, and the trajectories of its tokens."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.evaluation.jacobians import RowMap, block_calls, one_token_maps, whole_sequence_maps
from harness.measurements.coupling.settings import CouplingSettings
from harness.measurements.coupling.units import Prompt, Way
from harness.models.loading import LoadedModel
from harness.spectral.coupling import Triples, leading_triples, misfits, overlaps
from harness.spectral.krylov import krylov_triples
from harness.spectral.residual_stream import accumulated, departure_from_normality, plane, symmetry, trajectory
from harness.spectral.statistics import effective_rank

MOST_POINTS = 16  # tokens of a prompt in the table of points
# What a block adds on the one-token path may differ from the whole sequence by rounding, relative to its norm.
_ROUNDING = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}


@dataclass(frozen=True)
class Jacobian:
    """One Jacobian. matrix: [d, d] in the model's dtype; None if it is known by products alone. triples: the leading
    K. row: the map whose derivative it is."""

    block: int
    token_in: int
    token_out: int
    row: RowMap
    triples: Triples
    matrix: Tensor | None

    def products(self, frames: Tensor) -> Tensor:
        """Return J X for frames X, float64 [d, n]."""
        frames = frames.to(self.triples.v.device)
        if self.matrix is not None:
            return self.matrix.to(torch.float64) @ frames
        return self.row.forward(frames.T).T.to(torch.float64)


@dataclass(frozen=True)
class PromptRows:
    """The rows of one prompt by table, without the columns that identify it."""

    jacobians: list[dict[str, Any]]
    couplings: dict[str, list[Any]]
    trajectories: list[dict[str, Any]]
    points: dict[str, list[Any]]


def rows_of(loaded: LoadedModel, settings: CouplingSettings, prompt: Prompt, way: Way) -> PromptRows:
    """Measure one prompt under the model's present weights. Raises RuntimeError and ValueError."""
    tokens = torch.tensor([prompt.tokens])
    states = residual_stream(loaded, tokens)
    found: dict[tuple[int, int, int], Jacobian] = {}
    rows = []
    for token_in, token_out in _pairs_of_tokens(settings.kinds, prompt.positions):
        own = way if token_in == token_out else Way("dense", "whole")
        for jacobian, row in _jacobians(loaded, settings, tokens, (token_in, token_out), own, states):
            found[jacobian.block, token_in, token_out] = jacobian
            rows.append(row)
    couplings: dict[str, list[Any]] = {}
    for kind, members in _groups(settings.kinds, len(loaded.blocks), prompt.positions):
        for order in settings.orders:
            _add(couplings, pair_columns([found[one] for one in members], settings.k, order), kind, order)
    trajectories = [{"token": t, **dataclasses.asdict(trajectory(states[:, t]))} for t in prompt.positions]
    return PromptRows(rows, couplings, trajectories, _points(states))


def residual_stream(loaded: LoadedModel, tokens: Tensor) -> Tensor:
    """Return the residual stream at all block boundaries, float64 [L + 1, T, d] on the CPU. tokens: int64 [1, T]."""
    calls = block_calls(loaded, tokens)
    states = [call.entering[0].double().cpu() for call in calls]
    return torch.stack([*states, calls[-1].leaving[0].double().cpu()])


def _pairs_of_tokens(kinds: Sequence[str], positions: Sequence[int]) -> list[tuple[int, int]]:
    pairs = [(t, t) for t in positions]
    if "context_in" in kinds:
        pairs += [(t, positions[-1]) for t in positions]
    if "context_out" in kinds:
        pairs += [(positions[0], t) for t in positions]
    return list(dict.fromkeys(pairs))


def _groups(
    kinds: Sequence[str], n_blocks: int, positions: Sequence[int]
) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Yield the Jacobians (block, input token, output token) that are compared with each other, and their kind."""
    if "depth" in kinds:
        for t in positions:
            yield "depth", [(block, t, t) for block in range(n_blocks)]
    for block in range(n_blocks):
        if "self" in kinds:
            yield "self", [(block, t, t) for t in positions]
        if "context_in" in kinds:
            yield "context_in", [(block, t, positions[-1]) for t in positions]
        if "context_out" in kinds:
            yield "context_out", [(block, positions[0], t) for t in positions]


def _jacobians(
    loaded: LoadedModel, settings: CouplingSettings, tokens: Tensor, pair: tuple[int, int], way: Way, states: Tensor
) -> Iterator[tuple[Jacobian, dict[str, Any]]]:
    """Yield the Jacobian of every block from one token to another, and its row."""
    token_in, token_out = pair
    until = tokens[:, : token_out + 1]
    if way.path == "one_token":
        maps = one_token_maps(loaded, until)
    else:
        maps = whole_sequence_maps(loaded, until, token_in)
    product = None
    for block, row in enumerate(maps):
        started = time.perf_counter()
        path_error = _path_error(row, states[block : block + 2, token_out])
        if path_error > _ROUNDING.get(loaded.description.dtype, 1e-3):
            raise RuntimeError(
                f"block {block} adds something else to one row with a cache than to the whole sequence (relative"
                f" difference {path_error:.2g}); use jacobian=whole"
            )
        jacobian, columns = _jacobian(row, settings, way, (block, token_in, token_out))
        if jacobian.matrix is not None and token_in == token_out:
            product, columns["product_effective_rank"] = accumulated(product, jacobian.matrix)
        triples = jacobian.triples
        yield jacobian, {
            "block": block, "token_in": token_in, "token_out": token_out, "sigma_max": float(triples.sigma[0]),
            "frobenius_norm": triples.frobenius, "gap_k": triples.gap, "residual_error": triples.residual,
            "path_error": path_error, "method": way.method, "path": way.path, **columns,
            "seconds": time.perf_counter() - started,
        }


def _path_error(row: RowMap, whole: Tensor) -> float:
    """Return the relative difference of what a block adds at the output token.

    whole: float64 [2, d], the stream before and after the block in a pass over the whole sequence.
    """
    added = (row.call.leaving - row.call.entering)[0, -1].double().cpu()
    expected = whole[1] - whole[0]
    norm = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(added - expected)) / norm if norm else math.nan


def _jacobian(
    row: RowMap, settings: CouplingSettings, way: Way, place: tuple[int, int, int]
) -> tuple[Jacobian, dict[str, Any]]:
    k = max(settings.k)
    if way.method == "krylov":
        generator = torch.Generator(row.row.device).manual_seed(settings.seed)
        found = krylov_triples(
            lambda x: row.forward(x.T).T.double(), lambda x: row.adjoint(x.T).T.double(), len(row.row), k, generator
        )
        return Jacobian(*place, row, found.triples, None), {"n_products": found.n_products}
    matrix = row.dense()
    triples, sigma = leading_triples(matrix, k)
    columns = {
        "n_products": len(matrix), "effective_rank": effective_rank(sigma.cpu()), "symmetry": symmetry(matrix),
        "departure_normality": departure_from_normality(matrix) if settings.normality else None,
    }
    return Jacobian(*place, row, triples, matrix), columns


def pair_columns(jacobians: Sequence[Jacobian], ks: Sequence[int], order: str) -> dict[str, list[Any]]:
    """Return the columns of all ordered pairs of some Jacobians, with themselves too, for each number of triples.

    order: "ujv" or "vju". One product of each Jacobian with the stacked vectors of all serves all pairs.
    """
    columns: dict[str, list[Any]] = {}
    lefts = [one.triples.u if order == "ujv" else one.triples.v for one in jacobians]
    rights = [one.triples.v if order == "ujv" else one.triples.u for one in jacobians]
    for one in jacobians:
        device = one.triples.v.device
        products = one.products(torch.cat([right.to(device) for right in rights], 1))
        for found in misfits(overlaps(products, [left.to(device) for left in lefts]), one.triples, ks):
            n = len(jacobians)
            new = {
                "k": [found.k] * n,
                **{f"{name}_i": [getattr(one, name)] * n for name in ("block", "token_in", "token_out")},
                **{f"{name}_j": [getattr(j, name) for j in jacobians] for name in ("block", "token_in", "token_out")},
                "m": found.m.tolist(), "m_abs": found.m_abs.tolist(), "m_null": [found.null] * n,
                "m_abs_null": [found.null_abs] * n, "coupling": found.coupling.tolist(),
                "coupling_abs": found.coupling_abs.tolist(),
            }
            for name, values in new.items():
                columns.setdefault(name, []).extend(values)
    return columns


def _add(couplings: dict[str, list[Any]], columns: dict[str, list[Any]], kind: str, order: str) -> None:
    n = len(columns["k"])
    for name, values in {"kind": [kind] * n, "order": [order] * n, **columns}.items():
        couplings.setdefault(name, []).extend(values)


def _points(states: Tensor) -> dict[str, list[Any]]:
    n = states.shape[1]
    count = min(MOST_POINTS, n)
    chosen = sorted({n - 1 - i * n // count for i in range(count)})
    coordinates, norms = plane(states)[:, chosen], torch.linalg.vector_norm(states, dim=-1)[:, chosen]
    boundaries = range(len(states))
    return {
        "token": [t for _ in boundaries for t in chosen], "boundary": [b for b in boundaries for _ in chosen],
        "norm": norms.flatten().tolist(), "pc1": coordinates[..., 0].flatten().tolist(),
        "pc2": coordinates[..., 1].flatten().tolist(),
    }
