"""Remove singular values from a matrix, and measure what was really removed.

The removal is W - U_r (U_r^T W) with the removed singular vectors U_r. It is computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.decomposition import Decomposition


@dataclass(frozen=True)
class Removal:
    """What one edit took away from a matrix.

    n_removed, n_values: the number of removed singular values, and of all singular values of the matrix.
    energy_removed: the removed share of the squared Frobenius norm, which is the sum of the removed sigma^2 over the
        sum of all sigma^2; 0 for a zero matrix.
    sigma_max_removed, sigma_min_removed: the largest and the smallest removed singular value; None if none was removed.
    realised_removal: 1 - |U_r^T W'|_F / |U_r^T W|_F, where W' is the new weight after rounding to its dtype and U_r
        holds the removed vectors. It is 1 if the removed part is gone, and 0 if rounding has put as much back as was
        taken. None if there was nothing to take: no indices, or only singular values of zero.
    """

    n_removed: int
    n_values: int
    energy_removed: float
    sigma_max_removed: float | None
    sigma_min_removed: float | None
    realised_removal: float | None


def ablate(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    """Return weight [out, in] without the singular values at `indices` (int64 [n]), as float64 [out, in].

    decomposition: that of this weight. The result is on the weight's device. Without indices it is exactly the weight;
    with all indices it is exactly zero. Raises ValueError if the weight has another shape than its decomposition, and
    if an index is out of range or appears twice.
    """
    _check(weight, decomposition, indices)
    matrix = weight.detach().to(torch.float64)
    n_values = len(decomposition.sigma)
    if len(indices) == 0:
        return matrix.clone()
    if len(indices) == n_values:
        return torch.zeros_like(matrix)
    if 2 * len(indices) <= n_values:
        return matrix - _project(matrix, decomposition, indices)
    return _project(matrix, decomposition, _others(indices, n_values))


def edit(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> tuple[Tensor, Removal]:
    """Return the ablated weight [out, in], rounded once to the dtype of `weight`, and what was really removed.

    Arguments and errors are those of `ablate`.
    """
    edited = ablate(weight, decomposition, indices).to(weight.dtype)
    return edited, removal(edited, decomposition, indices)


def removal(after: Tensor, decomposition: Decomposition, indices: Tensor) -> Removal:
    """Describe what an edit took away from the decomposed weight.

    after: the weight after the edit, [out, in], of any dtype. indices: int64 [n], the removed singular values.
    """
    sigma = decomposition.sigma
    removed = sigma[indices.to(sigma.device)]
    total = float((sigma**2).sum())
    return Removal(
        n_removed=len(indices),
        n_values=len(sigma),
        energy_removed=float((removed**2).sum()) / total if total else 0.0,
        sigma_max_removed=float(removed.max()) if len(indices) else None,
        sigma_min_removed=float(removed.min()) if len(indices) else None,
        realised_removal=realised_removal(after, decomposition, indices),
    )


def realised_removal(after: Tensor, decomposition: Decomposition, indices: Tensor) -> float | None:
    """Return 1 - |U_r^T W'|_F / |U_r^T W|_F, where W is the decomposed weight and W' is `after` [out, in].

    None if there was nothing to remove (see `Removal`).
    """
    if len(indices) == 0:
        return None
    # The rows of U_r^T W have the removed singular values as their norms, so W itself is not needed.
    there = float(torch.linalg.vector_norm(decomposition.sigma[indices.to(decomposition.sigma.device)]))
    left = float(torch.linalg.vector_norm(_coordinates(after.to(torch.float64), decomposition, indices)))
    return 1 - left / there if there else None


def low_rank_factors(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the removed part as two factors: float64 A [out, n] and B [n, in] with A @ B = weight - ablate(weight).

    Arguments and errors are those of `ablate`.
    """
    _check(weight, decomposition, indices)
    matrix = weight.detach().to(torch.float64)
    vectors = _vectors(decomposition, indices, matrix)
    if decomposition.side == "left":
        return vectors, vectors.T @ matrix
    return matrix @ vectors, vectors.T.contiguous()


def _check(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> None:
    if tuple(weight.shape) != decomposition.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, its decomposition {decomposition.shape}")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(decomposition.sigma)):
        raise ValueError(f"indices must lie in 0..{len(decomposition.sigma) - 1}")
    if len(indices.unique()) != len(indices):
        raise ValueError("indices name a singular value twice")


def _others(indices: Tensor, n_values: int) -> Tensor:
    kept = torch.ones(n_values, dtype=torch.bool)
    kept[indices.cpu()] = False
    return kept.nonzero().flatten()


def _vectors(decomposition: Decomposition, indices: Tensor, like: Tensor) -> Tensor:
    vectors = decomposition.vectors
    return vectors[:, indices.to(vectors.device)].to(like.device)


def _coordinates(matrix: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    vectors = _vectors(decomposition, indices, matrix)
    return vectors.T @ matrix if decomposition.side == "left" else matrix @ vectors


def _project(matrix: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    vectors = _vectors(decomposition, indices, matrix)
    if decomposition.side == "left":
        return vectors @ (vectors.T @ matrix)
    return (matrix @ vectors) @ vectors.T
