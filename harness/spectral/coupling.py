"""Block coupling: how well the singular vectors of one block's residual Jacobian diagonalise that of another.

The residual Jacobian of a block that adds f to the residual stream is J = df/dx, float64 [d, d]; its rows are outputs.
With the K leading singular triples U, S, V of J_i and J_j, arXiv 2407.07810 measures

    m(J_i, J_j) = ||U_j^T J_i V_j - S_i||_F / ||S_i||_F,

which is 0 if the leading vectors of block j are those of block i. Its released code takes the absolute value of every
entry of U_j^T J_i V_j first, and has a second order with V_j^T J_i U_j. None of these values is comparable between
models, because unrelated vectors do not give 1: they give the null of this module, which depends on d, K and the
spectrum of J_i. `coupling = 1 - m / null` is 0 for unrelated vectors and 1 for a perfect match in every model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = ("ujv", "vju")
_LEAST_OF_GRAM = 1e-4  # below this share of the largest value, the Gram matrix no longer gives orthogonal left vectors


@dataclass(frozen=True)
class Triples:
    """The leading singular triples of one Jacobian [d, d].

    u, v: float64 [d, K], the left and the right singular vectors as columns. sigma: float64 [K], in descending order.
    frobenius: the Frobenius norm of the Jacobian. gap: sigma_K / sigma_{K+1}; nan if K = d. Near 1, the K-th vectors
    are not determined. residual: the largest norm of J^T u - sigma v, relative to sigma_1.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor
    frobenius: float
    gap: float
    residual: float


def leading_triples(jacobian: Tensor, k: int) -> tuple[Triples, Tensor]:
    """Return the k leading triples of a Jacobian [d, d], and all of its singular values, float64 [d], descending.

    They come from the eigenvectors of the float64 Gram matrix, or from LAPACK's singular value decomposition if the
    k-th value is less than 1e-4 of the first. The small ones of all values are accurate to 1e-8 of the largest.
    Raises ValueError for k outside of 1..d and for values that are not finite.
    """
    matrix = jacobian.detach().to(torch.float64)
    d = matrix.shape[1]
    if not 1 <= k <= d:
        raise ValueError(f"k = {k}: a Jacobian of {d} dimensions has 1 to {d} triples")
    if not torch.isfinite(matrix).all():
        raise ValueError("the Jacobian holds NaN or infinite values")
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    sigma, v = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)[:, :k]
    if sigma[k - 1] > _LEAST_OF_GRAM * sigma[0]:
        product = matrix @ v
        leading = torch.linalg.vector_norm(product, dim=0)
        u = product / leading
    else:
        left, sigma, right = torch.linalg.svd(matrix)
        u, leading, v = left[:, :k], sigma[:k], right[:k].T
    residual = float(torch.linalg.vector_norm(matrix.T @ u - v * leading, dim=0).max())
    return Triples(
        u, leading, v, float(torch.linalg.matrix_norm(matrix)), _ratio(sigma[k - 1], sigma[k]) if k < d else math.nan,
        _ratio(residual, sigma[0]),
    ), sigma


def _ratio(above: Tensor | float, below: Tensor | float) -> float:
    return float(above) / float(below) if float(below) else math.nan


@dataclass(frozen=True)
class Misfit:
    """The value of one Jacobian J_i with the vectors of each of n Jacobians J_j, and what unrelated vectors give.

    k: the number of triples. m: float64 [n], the paper's value. m_abs: float64 [n], that of the released code, which
    divides by the same norm. null, null_abs: the values of unrelated vectors.
    """

    k: int
    m: Tensor
    m_abs: Tensor
    null: float
    null_abs: float

    @property
    def coupling(self) -> Tensor:
        """1 - m / null, float64 [n]: 0 for unrelated vectors, 1 for a perfect match."""
        return 1 - self.m / self.null

    @property
    def coupling_abs(self) -> Tensor:
        """1 - m_abs / null_abs, float64 [n]."""
        return 1 - self.m_abs / self.null_abs


def overlaps(products: Tensor, frames: Sequence[Tensor]) -> Tensor:
    """Return F_j^T P_j for every j, float64 [n, K, K].

    products: float64 [d, n K], the product of a Jacobian with the stacked frames [G_1 ... G_n] of K columns each, which
    is one matrix product instead of n. frames: n of float64 [d, K].
    """
    n, (d, k) = len(frames), frames[0].shape
    return torch.stack(list(frames)).mT @ products.reshape(d, n, k).permute(1, 0, 2)


def misfits(overlap: Tensor, triples: Triples, ks: Sequence[int]) -> list[Misfit]:
    """Return the value of a Jacobian with all frames for each number of triples.

    overlap: float64 [n, K, K], as `overlaps` returns, for the Jacobian of `triples`. ks: numbers up to K.
    """
    found = []
    for k in ks:
        sigma = triples.sigma[:k]
        inner, norm = overlap[:, :k, :k], float(torch.linalg.vector_norm(sigma))
        m, m_abs = (torch.linalg.matrix_norm(one - torch.diag(sigma)) / norm for one in (inner, inner.abs()))
        found.append(Misfit(k, m, m_abs, *nulls(sigma, triples.frobenius, len(triples.v))))
    return found


def nulls(sigma: Tensor, frobenius: float, d: int) -> tuple[float, float]:
    """Return the root mean square of m and of m_abs for frames that have nothing to do with the Jacobian.

    sigma: [K], the leading singular values of the Jacobian. frobenius: its Frobenius norm. d: its dimension.

    For independent Haar frames E||U^T J V||_F^2 = K^2 ||J||_F^2 / d^2, so that with a = this / ||S||_F^2 the paper's m
    gives sqrt(1 + a). An entry of U^T J V is nearly N(0, ||J||_F^2 / d^2), whose mean absolute value is sqrt(2 / pi)
    of its standard deviation; the entries on the diagonal therefore lower the square of m_abs by
    2 sqrt(2 / pi) tr(S) ||J||_F / (d ||S||_F^2). The formula for m is exact for every d, that for m_abs for large d.
    """
    k, energy = len(sigma), float(sigma.square().sum())
    spread = (k * frobenius / d) ** 2 / energy
    overlap = 2 * math.sqrt(2 / math.pi) * float(sigma.sum()) * frobenius / (d * energy)
    return math.sqrt(1 + spread), math.sqrt(max(0.0, 1 + spread - overlap))
