"""Singular values alone, in float64, in less than half the time of a decomposition with vectors.

Accuracy contract: a value differs from that of LAPACK's gesdd in float64 by at most 1e-11 of itself where the method is
"gram". Where it is another method, the error is gesdd's own, a few eps sigma_max.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.decomposition import DEFLATION_CUT, decompose, prepare

# The smallest value over the largest of a trained matrix of k x long entries is hardly ever above DEFLATION_CUT where
# k is above this share of long, and the Gram matrix would be made in vain.
NEARLY_SQUARE = 0.8
GRAM_STRIPS = 6


@dataclass(frozen=True, eq=False)
class SingularValues:
    """The singular values of one matrix [out, in]; r = min(out, in).

    sigma: float64 [r], in descending order, never negative. shape: (out, in). method: "gram", or the method that was
    used because the Gram matrix is not exact enough: "gesdd" on the CPU, as in Decomposition on a GPU.
    reconstruction_error, orthogonality_error: None, because they are those of vectors.
    """

    sigma: Tensor
    shape: tuple[int, int]
    method: str
    reconstruction_error: None = None
    orthogonality_error: None = None


def singular_values(weights: Sequence[Tensor]) -> list[SingularValues]:
    """Return the singular values of weights [out, in] of any floating dtype, which share one smaller and larger side.

    They are the roots of the eigenvalues of the float64 Gram matrix if the smallest value is at least DEFLATION_CUT
    times the largest. This is where the decomposition with vectors refines nothing either: the relative error of an
    eigenvalue is a few eps (sigma_max / sigma)^2. Other matrices are left to gesdd, and on a GPU to `decompose`. The
    results are on the devices of the weights, and on a CPU do not depend on the other weights. Raises ValueError for a
    matrix that is not 2-D, is empty or holds values that are not finite, and for matrices of several shapes.
    """
    for weight in weights:
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(f"expected a non-empty matrix [out, in], got shape {tuple(weight.shape)}")
    if len({(min(weight.shape), max(weight.shape)) for weight in weights}) > 1:
        raise ValueError("the matrices must have the same sides to be decomposed together")
    prepared = [prepare(weight) for weight in weights]
    if not all(math.isfinite(scale) for _, scale in prepared):
        raise ValueError("the weight holds NaN or infinite values and has no singular values")
    eigenvalues = _gram_eigenvalues([wide for wide, _ in prepared])
    found = []
    for i, (weight, (wide, scale)) in enumerate(zip(weights, prepared)):
        own = None if eigenvalues is None else eigenvalues[i]
        if own is not None and own[0] >= DEFLATION_CUT**2 * own[-1] > 0:
            sigma, method = own.flip(0).sqrt() / scale, "gram"
        elif wide.is_cuda:
            whole = decompose(weight)
            sigma, method = whole.sigma, whole.method
        else:
            sigma, method = _gesdd_values(wide) / scale, "gesdd"
        found.append(SingularValues(sigma, (weight.shape[0], weight.shape[1]), method))
    return found


def _gram_eigenvalues(wide: list[Tensor]) -> Tensor | None:
    """Return the eigenvalues of each Gram matrix in ascending order, [n, k]; None where they are not to be used."""
    k, long = wide[0].shape
    if k > NEARLY_SQUARE * long:
        return None
    gram = wide[0].new_zeros(len(wide), k, k)
    step = max(1, -(-k // GRAM_STRIPS))
    for own, one in zip(gram, wide):  # the last bits of a batched product would depend on the other matrices
        for start in range(0, k, step):  # the lower triangle in strips, because nothing else is read
            stop = start + step
            own[start:stop, :stop] = one[start:stop] @ one[:stop].T
    try:
        return torch.linalg.eigvalsh(gram, UPLO="L")
    except torch.linalg.LinAlgError:
        return None


def _gesdd_values(wide: Tensor) -> Tensor:
    # The triangular factor has the same values, but no long side.
    core = torch.linalg.qr(wide.T, mode="r").R if wide.shape[1] > 2 * wide.shape[0] else wide
    return torch.linalg.svdvals(core)
