"""Exact singular values of a weight matrix and the singular vectors of its smaller side, in float64.

Accuracy contract: take any set of singular values that is separated from the others by a gap. The part U_r (U_r^T W)
that is removed with them agrees with the one from LAPACK's gesdd in float64 to a relative error of 1e-5, or to gesdd's
own backward error (a few eps |W|) where that is larger. The singular vectors of the longer side are never formed,
because that would divide by small singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Increase this number when a change of the code changes what `decompose` returns: stored decompositions are then
# computed anew.
DECOMPOSITION_VERSION = 2
# The error of an eigenvector of the Gram matrix is eps (sigma_max / sigma)^2 / (relative gap), that of a singular
# vector of the matrix itself eps (sigma_max / sigma) / (relative gap). With a cut at 1e-2 the first stays below
# 1e-12 / (relative gap) in every round of deflation.
DEFLATION_CUT = 1e-2
# Measured on graded spectra of 64 to 400 values, as the difference from gesdd in the smallest decile of the deflated
# Gram method: 6e-8 at sigma_min / sigma_max = 1e-8, 4e-6 at 1e-10, 2e-4 at 1e-12. The contract allows 1e-5, so the
# guard leaves two orders of magnitude.
GUARD = 1e-8
# The values that rounding makes of a null space are up to 25 eps sigma_max in matrices of 4 to 40 rows.
SMALLEST_NOISE = 100


# Left singular vectors U [k, k], singular values [k] (in descending order up to rounding) and U^T W [k, long].
Solution = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Decomposition:
    """The spectrum of one matrix W [out, in] with the singular vectors of its smaller side; r = min(out, in).

    sigma: float64 [r], in descending order, never negative.
    vectors: float64 [r, r] with orthonormal columns: the left singular vectors if `side` is "left" (out <= in), else
        the right ones. In the metric of the inputs (activations.py) they are float64 [out, r], always the left ones.
    shape: (out, in).
    method: the method that was used, a name in METHODS. For "auto" it is the method that was chosen.
    reconstruction_error: the largest |cosine| between two of the vectors of the longer side, W^T u / sigma, that the
        decomposition implies. W = sum of sigma u (W^T u / sigma)^T holds identically, so vectors that are not
        orthogonal are the only way in which this can fail to be a singular value decomposition. Singular values below
        r eps sigma_max are rounding noise and are left out.
    orthogonality_error: the largest entry of |U^T U - I|.
    """

    sigma: Tensor
    vectors: Tensor
    side: str
    shape: tuple[int, int]
    method: str
    reconstruction_error: float
    orthogonality_error: float


def decomposition_flops(out: int, width: int) -> float:
    """Return about how many floating-point operations the decomposition of a matrix [out, width] takes.

    With the smaller side k these are the Gram matrix, the projection, and 9 k^3 for the symmetric eigendecomposition.
    """
    small, large = sorted((out, width))
    return 4.0 * small * small * large + 9.0 * small**3


def _deflate(wide: Tensor, vectors: Tensor, floor: float = 0.0) -> Solution:
    """Refine the eigenvectors [k, m] of the Gram matrix of `wide` [k, long] that belong to small singular values.

    These eigenvectors span an accurate subspace, but within it they are mixtures of each other. The projection of the
    matrix on that subspace has a small norm, and its own Gram matrix resolves the values relative to the largest of
    them. This is repeated until no value is small beside the others, or all are below `floor`, which is rounding noise.
    """
    projected = vectors.T @ wide
    sigma = torch.linalg.vector_norm(projected, dim=1)
    largest = sigma.max()
    n_large = int((sigma >= DEFLATION_CUT * largest).sum())
    if n_large == len(sigma) or (floor and float(largest) <= floor):
        return vectors, sigma, projected
    order = sigma.argsort(descending=True)
    large, small = order[:n_large], order[n_large:]
    rest = projected[small]
    rotation, sigma_small, projected_small = _deflate(rest, _gram_vectors(rest), floor)
    return (
        torch.cat([vectors[:, large], vectors[:, small] @ rotation], dim=1),
        torch.cat([sigma[large], sigma_small]),
        torch.cat([projected[large], projected_small]),
    )


def _gram_vectors(wide: Tensor) -> Tensor:
    """Return the eigenvectors of the Gram matrix wide wide^T by descending eigenvalue."""
    return _eigenvectors(wide @ wide.mT)


def _eigenvectors(gram: Tensor) -> Tensor:
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)


def _gram(wide: Tensor) -> Solution:
    return _deflate(wide, _gram_vectors(wide))


def _deflated(wide: Tensor) -> Solution:
    """Return the solution of a matrix that may have singular values of zero. Raises LinAlgError if it does not hold.

    A row of zeros is taken out, which is exact: its vector is the unit vector of this row. What is left may still have
    a null space, as a repeated row does. Rounding makes values of at most max(k, SMALLEST_NOISE) eps sigma_max of it,
    which `_deflate` separates from the others as it separates all small values, and which are returned as zero: the
    parts that are removed with them are rounding noise. Only values between that and GUARD sigma_max are not resolved.
    """
    k = len(wide)
    alive = wide.abs().amax(dim=1) > 0
    rows, dead = alive.nonzero().flatten(), (~alive).nonzero().flatten()
    vectors, sigma = torch.zeros_like(wide[:, :1]).expand(k, k).contiguous(), torch.zeros_like(wide[:, 0])
    projected = torch.zeros_like(wide)
    n = len(rows)
    if n:
        full = wide[rows]
        first = _gram_vectors(full)
        noise = max(k, SMALLEST_NOISE) * torch.finfo(torch.float64).eps
        largest = float(torch.linalg.vector_norm(first[:, 0] @ full))
        own, sigma[:n], projected[:n] = _deflate(full, first, noise * largest)
        vectors[rows, :n] = own
        unresolved = (sigma[:n] > noise * largest) & (sigma[:n] < GUARD * largest)
        if bool(unresolved.any()):
            raise torch.linalg.LinAlgError("singular values between rounding noise and what the Gram method resolves")
        sigma.masked_fill_(sigma <= noise * largest, 0.0)
    vectors[dead, torch.arange(n, k, device=wide.device)] = 1.0
    return vectors, sigma, projected


def _lapack(wide: Tensor, driver: str | None = None) -> Solution:
    # The triangular factor has the same left singular vectors and values, but no long side.
    core = torch.linalg.qr(wide.T, mode="r").R.T if wide.shape[1] > 2 * wide.shape[0] else wide
    left, sigma, _ = torch.linalg.svd(core, full_matrices=False, driver=driver)
    return left, sigma, left.T @ wide


def _gesdd(wide: Tensor) -> Solution:
    # On the CPU, because cuSOLVER has no gesdd and the accuracy contract refers to LAPACK's.
    vectors, sigma, projected = _lapack(wide.cpu())
    return vectors.to(wide.device), sigma.to(wide.device), projected.to(wide.device)


def _gesvd(wide: Tensor) -> Solution:
    if not wide.is_cuda:
        raise ValueError("method 'gesvd' is a cuSOLVER driver and needs a CUDA tensor; on CPU use auto, gram or gesdd")
    return _lapack(wide, "gesvd")


# Each method takes a float64 matrix [k, long] with k <= long.
METHODS: dict[str, Callable[[Tensor], Solution]] = {
    "gram": _gram, "deflated": _deflated, "gesdd": _gesdd, "gesvd": _gesvd,
}  # fmt: skip


def decompose(weight: Tensor, method: str = "auto") -> Decomposition:
    """Decompose weight [out, in], of any floating dtype on any device. One decomposition serves every region.

    method: a name in METHODS, or "auto". That takes gram, and gesdd where gram cannot hold the accuracy contract:
        sigma_min < 1e-8 sigma_max (a rank-deficient or zero matrix, too), or no convergence. On a CUDA device deflated
        comes before gesdd, which runs on the CPU: it also takes a matrix whose other values are exactly zero, up to
        rounding.
    The result is on the weight's device. Raises ValueError for a matrix that is not 2-D, is empty or holds values that
    are not finite, and for an unknown method.
    """
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"expected a non-empty matrix [out, in], got shape {tuple(weight.shape)}")
    if method != "auto" and method not in METHODS:
        raise ValueError(f"unknown decomposition method {method!r}: use auto, {', '.join(METHODS)}")
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinite values and has no singular value decomposition")
    wide, scale = prepare(weight)
    return _finish(weight, scale, *_solve(wide, method))


def decompose_many(weights: Tensor, method: str = "auto") -> list[Decomposition]:
    """Decompose each of weights [n, out, in] (experts, heads) as `decompose` does, by one batched eigendecomposition.

    On a CPU the results are those of `decompose` to the last bit. Raises ValueError as `decompose` does.
    """
    if weights.ndim != 3 or weights.numel() == 0:
        raise ValueError(f"expected non-empty matrices [n, out, in], got shape {tuple(weights.shape)}")
    if method not in ("auto", "gram"):
        return [decompose(weight, method) for weight in weights]
    if not torch.isfinite(weights).all():
        raise ValueError("a weight holds NaN or infinite values and has no singular value decomposition")
    prepared = [prepare(weight) for weight in weights]
    try:
        # The last bits of a batched product depend on the layout of the batch, and those of its own do not.
        batch = _eigenvectors(torch.stack([wide @ wide.mT for wide, _ in prepared]))
    except torch.linalg.LinAlgError:
        return [decompose(weight, method) for weight in weights]
    return [
        _finish(weight, scale, *_solve(wide, method, vectors))
        for weight, (wide, scale), vectors in zip(weights, prepared, batch)
    ]


def prepare(weight: Tensor) -> tuple[Tensor, float]:
    """Return the matrix in float64 with its smaller side first, multiplied by a power of two, and that power.

    The power brings the largest entry into [1, 2), so that squares neither overflow nor vanish; it rounds nothing. It
    is NaN for a matrix with values that are not finite.
    """
    wide = weight.detach().to(torch.float64, copy=True)
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.T
    smallest, greatest = (float(value) for value in weight.detach().aminmax())
    largest = max(-smallest, greatest)
    if not math.isfinite(smallest + greatest):
        return wide, math.nan
    scale = 2.0 ** (1 - math.frexp(largest)[1]) if largest else 1.0
    return wide.mul_(scale), scale


def _solve(wide: Tensor, method: str, first_guess: Tensor | None = None) -> tuple[Solution, str]:
    """Return the solution and the name of the method that gave it.

    first_guess: the eigenvectors of the Gram matrix if they are known.
    """
    if method not in ("auto", "gram"):
        return METHODS[method](wide), method
    try:
        solution = _gram(wide) if first_guess is None else _deflate(wide, first_guess)
    except torch.linalg.LinAlgError:
        if method == "gram":
            raise
    else:
        smallest, largest = solution[1].aminmax()
        if method == "gram" or smallest >= GUARD * largest > 0:
            return solution, "gram"
    if wide.is_cuda:
        try:
            return _deflated(wide), "deflated"
        except torch.linalg.LinAlgError:
            pass
    return _gesdd(wide), "gesdd"


def _finish(weight: Tensor, scale: float, solution: Solution, method: str) -> Decomposition:
    vectors, sigma, projected = solution
    norms = torch.linalg.vector_norm(projected, dim=1)
    signal = norms > len(sigma) * torch.finfo(torch.float64).eps * norms.max()
    # The product is normalised and not its factors: a normalised copy of the long side would double the peak memory.
    cosines = ((projected @ projected.T) / (norms * norms[:, None])).fill_diagonal_(0)[signal][:, signal]
    sigma, order = sigma.sort(descending=True)  # rounding may have swapped two values at a deflation cut
    vectors = vectors[:, order]
    return Decomposition(
        sigma=sigma / scale,
        vectors=vectors.contiguous(),
        side="left" if weight.shape[0] <= weight.shape[1] else "right",
        shape=(weight.shape[0], weight.shape[1]),
        method=method,
        reconstruction_error=float(cosines.abs().max()) if cosines.numel() else 0.0,
        orthogonality_error=float((vectors.T @ vectors).sub_(torch.eye(len(sigma)).to(vectors)).abs().max()),
    )
