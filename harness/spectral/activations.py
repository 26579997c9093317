"""The spectrum of a matrix in the metric of its inputs: the singular values of W C^(1/2).

C is the second moment <x x^T> of the inputs x of W [out, in] over a text, or their covariance. This is the metric of
SVD-LLM (arXiv 2403.07378) and ASVD (arXiv 2312.05821): if U_r holds left singular vectors of W C^(1/2), then
W - U_r U_r^T W changes the outputs by sum of the removed sigma^2 in the mean square, and no other change of the same
rank changes them less than the removal of the smallest ones. The left vectors are the eigenvectors of W C W^T, the
second moment of the outputs.

How it is computed. C enters as a factor F [in, q] with F F^T = C, never as a square root or an inverse, so that a
singular C needs no jitter. F has one column for every eigenvector of the covariance whose eigenvalue is not rounding
noise, and the mean as one more column for the second moment: the two are never added, so that a large mean does not
swallow small variances. The left vectors and values come from the singular value decomposition of W F. An
eigendecomposition of W C W^T would square W once more, and would lose what is smaller than 1e-8 of the largest value.

Where W C^(1/2) has fewer than min(out, in) values that are not zero, the removal still needs an order for the other
directions, because together they must make up all of W. They are those of the limit of C + t I as t > 0 goes to 0: the
left singular vectors, in descending order, of what is left of W outside of the others. This limit is computed exactly
and no t is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.decomposition import Decomposition, decompose

# Increase this number when a change of the code changes what `decompose_in_metric` returns.
METRIC_VERSION = 1
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class InputCovariance:
    """The statistics of the activations that enter one matrix [out, in].

    mean: float64 [in]. covariance: float64 [in, in], the sum over the tokens divided by their number n_tokens.
    """

    mean: Tensor
    covariance: Tensor
    n_tokens: int

    def directions(self) -> Tensor:
        """Return the eigenvectors of the covariance as columns, by descending eigenvalue: float64 [in, m].

        Eigenvectors are left out if their eigenvalue is rounding noise, which is at most in eps times the largest
        eigenvalue. With fewer tokens than inputs there are such directions, and they are arbitrary.
        """
        return self._spectrum()[1]

    def factor(self, centred: bool = False) -> Tensor:
        """Return F, float64 [in, q], with F F^T = C: the second moment, or the covariance if `centred`.

        Eigenvalues of the covariance that are rounding noise, as in `directions`, count as zero. q is at most in, and
        may be 0.
        """
        values, vectors = self._spectrum()
        factor = vectors * values.sqrt()
        if centred:
            return factor
        factor = torch.cat([factor, self.mean[:, None]], dim=1)
        if factor.shape[1] <= len(self.mean):
            return factor
        return torch.linalg.qr(factor.T, mode="r").R.T.contiguous()  # F F^T = R^T R, in one column fewer

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        noise_level = len(values) * EPS * max(float(values[-1]), 0.0)
        first = int((values <= noise_level).sum())
        return values[first:].flip(0), vectors[:, first:].flip(1)


def decompose_in_metric(weight: Tensor, factor: Tensor) -> Decomposition:
    """Return the spectrum of weight [out, in] in the metric of its inputs, with its left singular vectors.

    factor: float64 [in, q] on the weight's device, as `InputCovariance.factor` returns. With r = min(out, in), sigma
    [r] are the singular values of W F, of which those that are rounding noise are exactly zero, and vectors [out, r]
    are orthonormal, with U U^T W = W. `side` is always "left". The errors are those of `Decomposition`, for W F. Raises
    ValueError as `decompose` does.
    """
    if weight.ndim == 2 and factor.shape[:1] != weight.shape[1:]:
        raise ValueError(f"a factor for {tuple(weight.shape)} has {weight.shape[1]} rows, not {factor.shape[0]}")
    matrix = weight.detach().to(torch.float64)
    out, rank = matrix.shape[0], min(matrix.shape)
    product = matrix @ factor
    method, error, n = "gram", 0.0, 0
    left, sigma = matrix.new_zeros(out, 0), matrix.new_zeros(0)
    if product.numel():
        # A tall product is first reduced by QR, so that no vector is found by dividing by a small singular value.
        basis, core = torch.linalg.qr(product) if out > product.shape[1] else (None, product)
        found = decompose(core)
        left = found.vectors if basis is None else basis @ found.vectors
        sigma, method, error = found.sigma, found.method, found.reconstruction_error
        n = min(rank, int((sigma > max(product.shape) * EPS * sigma.max()).sum()))
    left, sigma = left[:, :n], sigma[:n]
    if n < rank:
        complement = torch.linalg.qr(left, mode="complete").Q[:, n:] if n else torch.eye(out).to(matrix)
        rest = torch.linalg.svd(complement.T @ matrix, full_matrices=False).U[:, : rank - n]
        left = torch.cat([left, complement @ rest], dim=1)
        sigma = torch.cat([sigma, sigma.new_zeros(rank - n)])
    return Decomposition(
        sigma=sigma, vectors=left.contiguous(), side="left", shape=(out, matrix.shape[1]), method=method,
        reconstruction_error=error,
        orthogonality_error=float((left.T @ left).sub_(torch.eye(rank).to(left)).abs().max()),
    )


def metric_flops(out: int, width: int) -> float:
    """Return about how many floating-point operations `factor` and `decompose_in_metric` take together."""
    small, large = sorted((out, width))
    reduction = 4.0 * width * width * (out - width) if out > width else 0.0
    return 9.0 * width**3 + 2.0 * out * width * width + reduction + 4.0 * small * small * large + 9.0 * small**3
