"""The change of a matrix, D = W - B, beside the matrix B that was changed, and beside random changes of the same size.

Notation: B = sum of sigma_i u_i v_i^T is the reference [out, in], W the tuned matrix, r = min(out, in), and |.| the
Frobenius norm. All matrices are float64. Statistics that compare W with B also appear for a change in random
directions, so that each must be read beside its controls: `rotated`, which keeps the singular values of D and draws its
singular vectors from the Haar measure, and `noise`, which has independent Gaussian entries and the norm of D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.spectral import statistics
from harness.spectral.decomposition import Decomposition, decompose
from harness.spectral.random_matrix import mp_region_bounds
from harness.spectral.regions.fraction import boundary
from harness.spectral.seeding import generator_of
from harness.spectral.vectors import vector_chunks

CONTROLS = ("rotated", "noise")
TOP = 10  # singular vectors that are examined for intruders, and that span the subspaces of overlaps
COSINE = 0.5  # below which a vector is an intruder (arXiv 2410.21228)
ROTATED = 64  # singular vectors that `rotation_consistency` compares
DECILES = 10
# Type -> bits of its significand, from the coarsest.
_SIGNIFICAND = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
_LEAST_EXPONENT = {torch.bfloat16: -133, torch.float16: -24, torch.float32: -149}  # of the smallest positive number


@dataclass(frozen=True)
class Frame:
    """The singular values of a matrix, in descending order, with the vectors of both sides.

    sigma: [r]. output: [out, r]. input: [in, r]. A vector of the longer side whose singular value is rounding noise is
    zero, because the matrix does not determine it.
    """

    sigma: Tensor
    output: Tensor
    input: Tensor

    def side(self, name: str) -> Tensor:
        """Return the vectors of one side, "output" or "input"."""
        return self.output if name == "output" else self.input

    def determined(self) -> int:
        """Return the number of singular values above the rounding noise r eps sigma_max."""
        floor = len(self.sigma) * torch.finfo(torch.float64).eps * float(self.sigma[0])
        return int((self.sigma > floor).sum())


def frame(matrix: Tensor, decomposition: Decomposition | None = None) -> Frame:
    """Return the singular values and vectors of a matrix [out, in]. Raises ValueError as `decompose` does.

    decomposition: that of the matrix, if it is known.
    """
    decomposition = decomposition or decompose(matrix)
    _, outputs, inputs = zip(*vector_chunks(matrix, decomposition))
    output, entering = (torch.cat(rows).nan_to_num(0.0).T for rows in (outputs, inputs))
    return Frame(decomposition.sigma, output, entering)


@dataclass(frozen=True)
class Change:
    """A change of a matrix, or a control.

    control: "real", or a name in CONTROLS. seed: that of a control, else None. matrix: D [out, in]. frame: that of D.
    tuned: the frame of B + D.
    """

    control: str
    seed: int | None
    matrix: Tensor
    frame: Frame
    tuned: Frame


def changes_of(reference: Tensor, tuned: Tensor, controls: list[str], seeds: list[int], name: str) -> Iterator[Change]:
    """Yield the real change of a matrix, then each control with each seed.

    reference, tuned: B and W, float64 [out, in]. name: the name of the matrix; the draws depend on it, on the seed and
    on the shape. A matrix that did not change yields only the real change.
    """
    real = tuned - reference
    own = frame(real)
    yield Change("real", None, real, own, frame(tuned))
    if not float(own.sigma[0]):
        return
    for control in controls:
        for seed in seeds:
            if control == "rotated":
                found = rotated(own, seed, name)
                matrix = (found.output * found.sigma) @ found.input.T
            else:
                matrix = _gaussian(reference, seed, f"noise {name}")
                matrix *= torch.linalg.matrix_norm(real) / torch.linalg.matrix_norm(matrix)
                found = frame(matrix)
            yield Change(control, seed, matrix, found, frame(reference + matrix))


def rotated(change: Frame, seed: int, name: str) -> Frame:
    """Return the frame of a change with the same singular values and random singular vectors of both sides.

    They are drawn from the Haar measure. name: as in `changes_of`.
    """
    return Frame(change.sigma, *(haar(change.side(side), seed, f"{side} {name}") for side in ("output", "input")))


def haar(like: Tensor, seed: int, name: str) -> Tensor:
    """Return orthonormal columns from the Haar measure, in the shape and on the device of `like` [n, r], r <= n.

    The draw depends on the seed, the name and the shape.
    """
    basis, triangle = torch.linalg.qr(_gaussian(like, seed, name))
    return basis * triangle.diagonal().sign()  # else the distribution depends on the convention of QR


def spectrum_columns(change: Frame, shape: tuple[int, int], estimator: str, tracy_widom: bool) -> dict[str, Any]:
    """Return the statistics of the singular values of a change that is not zero.

    estimator, tracy_widom: as in `mp_region_bounds`.
    """
    sigma = change.sigma.cpu()
    energy = (sigma**2).cumsum(0)
    return {
        "change_sigma_max": float(sigma[0]),
        "change_stable_rank": statistics.stable_rank(sigma),
        "change_effective_rank": statistics.effective_rank(sigma),
        "change_entropy": statistics.spectral_entropy(sigma),
        "change_rank_90": int((energy < 0.9 * energy[-1]).sum()) + 1,
        "change_n_above": mp_region_bounds(sigma, shape, estimator, tracy_widom)[0],
    }


def relation_columns(base: Frame, reference: Tensor, change: Change) -> dict[str, Any]:
    """Return the statistics that compare the changed matrix with the reference. base: the frame of the reference."""
    sigma, tuned = base.sigma, change.tuned.sigma
    scaling = float(tuned @ sigma / (sigma @ sigma))
    n_rotated, top = min(ROTATED, len(sigma)), min(TOP, change.frame.determined())
    turned = [base.side(side)[:, :n_rotated].T @ change.tuned.side(side)[:, :n_rotated] for side in ("output", "input")]
    # Of each direction of the reference, the part of the change that only scales its singular value.
    along = ((change.matrix @ base.input) * base.output).sum(0)
    own = [change.frame.side(side)[:, :top] for side in ("output", "input")]
    seen = float(torch.linalg.matrix_norm(own[0].T @ reference @ own[1]))
    columns = {
        "scaling": scaling,
        "scaling_residual": float(torch.linalg.vector_norm(tuned - scaling * sigma) / torch.linalg.vector_norm(tuned)),
        "rotation_consistency": float(
            (turned[0] * turned[1]).sum() / (torch.linalg.matrix_norm(turned[0]) * torch.linalg.matrix_norm(turned[1]))
        ),
        "value_share": float((along**2).sum() / (change.matrix**2).sum()),
        "amplification": float(torch.linalg.vector_norm(change.frame.sigma[:top])) / seen if seen else None,
    }
    for side, vectors in zip(("output", "input"), own):
        best = _best_cosines(base.side(side), change.tuned.side(side)[:, :TOP])
        columns[f"intruders_{side}"] = int((best < COSINE).sum())
        overlap = torch.linalg.matrix_norm(vectors.T @ base.side(side)[:, :top]) ** 2 / top
        columns[f"overlap_top_k_{side}"] = float(overlap)
    return columns


def region_rows(base: Frame, change: Change) -> list[dict[str, Any]]:
    """Return one row for each side and each tenth of the reference's directions; tenth 1 has the largest values.

    energy is |U_d^T D|^2 / |D|^2 on the output side and |D V_d|^2 / |D|^2 on the input side, for the directions of the
    tenth. In random directions it is energy_expected, the share of dimensions. The directions of the reference span r
    of the out (or in) dimensions, so that the energies of a side need not add up to 1.
    """
    rank, total = len(base.sigma), float((change.matrix**2).sum())
    rows = []
    for side in ("output", "input"):
        directions = base.side(side)
        projected = directions.T @ change.matrix if side == "output" else (change.matrix @ directions).T
        energies = (projected**2).sum(1)
        best = _best_cosines(directions, change.tuned.side(side))
        for decile in range(1, DECILES + 1):
            chosen = slice(_boundary(decile - 1, rank), _boundary(decile, rank))
            n, before = len(energies[chosen]), float(base.sigma[chosen].sum())
            energy, expected = float(energies[chosen].sum()) / total, n / directions.shape[0]
            after = float(change.tuned.sigma[chosen].sum())
            rows.append({
                "side": side, "decile": decile, "n_directions": n, "energy": energy, "energy_expected": expected,
                "energy_ratio": energy / expected if n else None,
                "sigma_shift": after / before - 1 if before else None,
                "best_cosine": float(best[chosen].mean()) if n else None,
            })  # fmt: skip
    return rows


def overlap_columns(change: Frame, other: Frame) -> dict[str, Any]:
    """Return how much one change has to do with another one of the same matrix, by their largest TOP directions.

    energy_kept is the share of the change's squared norm within the directions of the other one. mode_overlap is
    |A^T B|^2 / k for the k directions A and B of both (arXiv 2505.14185). interference is that of task singular
    vectors, the sum of |(U^T U - I) S (V^T V - I)| for the stacked vectors of both (arXiv 2412.00081).
    """
    tops = [min(TOP, one.determined()) for one in (change, other)]
    total = float((change.sigma**2).sum())
    columns: dict[str, Any] = {}
    for side in ("output", "input"):
        both = [one.side(side)[:, :top] for one, top in zip((change, other), tops)]
        scaled = change.side(side) * change.sigma
        columns[f"energy_kept_{side}"] = float(((both[1].T @ scaled) ** 2).sum()) / total
        columns[f"mode_overlap_{side}"] = float(((both[0].T @ both[1]) ** 2).sum()) / min(tops)
    stacked = [torch.cat([one.side(side)[:, :top] for one, top in zip((change, other), tops)], 1)
               for side in ("output", "input")]
    grams = [one.T @ one - torch.eye(sum(tops)).to(one) for one in stacked]
    sigma = torch.cat([change.sigma[: tops[0]], other.sigma[: tops[1]]])
    columns["interference"] = float((grams[0] @ (sigma[:, None] * grams[1])).abs().sum())
    return columns


def rounding_floor(tuned: Tensor, reference: Tensor) -> float:
    """Return the relative change |D| / |B| that rounding the tuned weights to their type alone makes.

    The type is the coarsest of bfloat16, float16 and float32 that holds every weight, because a checkpoint in bfloat16
    may be read in float32. The error of rounding is taken as uniform within a unit in the last place, so that its mean
    square is the square of this unit over 12.
    """
    held = (dtype for dtype in _SIGNIFICAND if torch.equal(tuned.to(dtype).to(torch.float64), tuned))
    dtype = next(held, torch.float32)
    exponents = torch.frexp(tuned).exponent.to(torch.float64) - _SIGNIFICAND[dtype]
    units = torch.exp2(exponents.clamp(min=_LEAST_EXPONENT[dtype]))
    units[tuned == 0] = 0
    return float(torch.linalg.matrix_norm(units) / math.sqrt(12) / torch.linalg.matrix_norm(reference))


def _best_cosines(basis: Tensor, vectors: Tensor) -> Tensor:
    """Return max_i |u_i . y_j| over the columns u_i of the basis, for each column y_j of the vectors."""
    return (basis.T @ vectors).abs().amax(0)


def _boundary(decile: int, rank: int) -> int:
    """Return where a tenth of the rank ends, as the regions by decile have it."""
    return boundary(decile / DECILES, rank)


def _gaussian(like: Tensor, seed: int, name: str) -> Tensor:
    """Return a matrix of independent Gaussian entries in the shape and on the device of `like`.

    It is drawn on the CPU, so that it is the same on every device.
    """
    generator = generator_of(f"{seed}:{name}:{like.shape[0]}x{like.shape[1]}")
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
