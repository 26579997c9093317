"""Leading singular triples of a matrix that is only known by its products, by a block Krylov method.

It is the block Golub-Kahan bidiagonalisation with full reorthogonalisation and a Rayleigh-Ritz step: the bases
V, J^T J V, (J^T J)^2 V, ... are kept orthonormal, and the triples are those of J restricted to them. The spectra of
residual Jacobians fall slowly, so that subspace iteration, which keeps only the last of these blocks, needs several
times as many products for the same accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.coupling import Triples

BLOCK = 8  # columns of one product
TOLERANCE = 3e-4  # of the residuals, relative to the k-th singular value
PROBES = 16  # random vectors that estimate the Frobenius norm outside of the basis
_NOTHING_LEFT = 1e-10  # relative norm below which a new direction is rounding noise

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Found:
    """What the method found. n_products: how many products with J or with its transpose it took. converged: whether
    the residuals are below the tolerance."""

    triples: Triples
    n_products: int
    converged: bool


def krylov_triples(
    forward: Product, adjoint: Product, d: int, k: int, generator: torch.Generator, block: int = BLOCK,
    tolerance: float = TOLERANCE,
) -> Found:
    """Return the k leading triples of a matrix J [d, d] that is known by products alone.

    forward: a function from X [d, n] to J X. adjoint: a function from X to J^T X. Both take and return float64 on the
    generator's device. generator: draws the first block and the probes. The method stops when every residual
    |J^T u - sigma v| is below tolerance * sigma_k, or when the basis spans the whole space and the triples are exact.
    The Frobenius norm is exact within the basis, and is estimated without bias by random probes outside of it.
    Raises ValueError for k outside of 1..d, for products that are not finite, and if fewer than k values are not 0.
    """
    if not 1 <= k <= d:
        raise ValueError(f"k = {k}: a Jacobian of {d} dimensions has 1 to {d} triples")
    empty = torch.empty(d, 0, dtype=torch.float64, device=generator.device)
    right, left, images, coimages = empty, empty, empty, empty  # bases V and U, J V and J^T U
    fresh = _orthonormal(_random(d, min(block, d), generator), empty)
    n_products, converged = 0, False
    while True:
        right = torch.cat([right, fresh], 1)
        images = torch.cat([images, forward(fresh)], 1)
        new_left = _orthonormal(images[:, -fresh.shape[1]:], left)
        left, coimages = torch.cat([left, new_left], 1), torch.cat([coimages, adjoint(new_left)], 1)
        n_products += fresh.shape[1] + new_left.shape[1]
        if not torch.isfinite(images).all():
            raise ValueError("the Jacobian has products that are not finite")
        # J V lies in the span of U, so that J v = sigma u holds exactly and J^T u is known without another product.
        inner, sigma, outer = torch.linalg.svd(left.T @ images, full_matrices=False)
        n = min(k, len(sigma))
        v, residuals = right @ outer[:n].T, coimages @ inner[:, :n]
        residuals = torch.linalg.vector_norm(residuals - v * sigma[:n], dim=0)
        if len(sigma) > k or right.shape[1] == d:
            converged = bool((residuals <= tolerance * sigma[n - 1]).all())
        fresh = _orthonormal(coimages[:, coimages.shape[1] - new_left.shape[1]:], right)[:, : d - right.shape[1]]
        if converged or not fresh.shape[1]:
            break
    if len(sigma) < k:
        raise ValueError(f"the Jacobian has {len(sigma)} singular values that are not 0, fewer than k = {k}")
    outside = _random(d, PROBES, generator)
    outside -= right @ (right.T @ outside)
    energy = float(images.square().sum())
    if right.shape[1] < d:
        energy += float(forward(outside).square().sum()) / PROBES
        n_products += PROBES
    gap = float(sigma[k - 1] / sigma[k]) if len(sigma) > k and sigma[k] > 0 else math.nan
    triples = Triples(left @ inner[:, :k], sigma[:k], v, math.sqrt(energy), gap, float(residuals.max() / sigma[0]))
    return Found(triples, n_products, converged or right.shape[1] == d)


def _random(d: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(d, n, dtype=torch.float64, device=generator.device, generator=generator)


def _orthonormal(columns: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis [d, m] of what the columns [d, n] add to an orthonormal basis [d, p]; m <= n."""
    if not columns.shape[1]:
        return columns
    scale = float(torch.linalg.vector_norm(columns, dim=0).max())
    for _ in range(2):  # once is not enough where most of a column lies in the basis
        columns = columns - basis @ (basis.T @ columns)
        left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
        columns, scale = left[:, sizes > _NOTHING_LEFT * scale], 1.0
    return columns
