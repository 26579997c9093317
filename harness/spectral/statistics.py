"""Statistics of the singular values of one matrix: ranks, entropies, and the tail as a power law.

Every function takes sigma [r], the r = min(out, in) singular values in any order. No result but the `xmin` of
`power_law` changes when the matrix is multiplied by a number.
"""

from __future__ import annotations

import inspect
import math
import warnings

import torch
from torch import Tensor

# `_power_law_cut_off` compares every candidate with every value, in tables of so many float64 entries (8 MiB).
_CHUNK_ELEMENTS = 1 << 20


def stable_rank(sigma: Tensor) -> float:
    """Return the squared Frobenius norm over the squared spectral norm, sum sigma^2 / max sigma^2.

    It lies between 1 and r; NaN for a zero matrix.
    """
    energy = _energies(sigma)
    return float(energy.sum() / energy.max())


def participation_ratio(sigma: Tensor) -> float:
    """Return (sum sigma^2)^2 / sum sigma^4: how many singular values share the squared Frobenius norm.

    It lies between 1 and r; NaN for a zero matrix.
    """
    energy = _energies(sigma)
    return float(energy.sum() ** 2 / (energy**2).sum())


def spectral_entropy(sigma: Tensor) -> float:
    """Return the entropy -sum p ln p of p = sigma^2 / sum sigma^2 in nats, from 0 to ln r; NaN for a zero matrix."""
    return _entropy(_energies(sigma))


def effective_rank(sigma: Tensor) -> float:
    """Return exp(-sum p ln p) of p = sigma / sum sigma (Roy and Vetterli 2007, EUSIPCO).

    It lies between 1 and r; NaN for a zero matrix.
    """
    return math.exp(_entropy(_scaled(sigma)))


def condition(sigma: Tensor) -> float:
    """Return max sigma / min sigma; infinite if a singular value is zero, NaN for a zero matrix."""
    scaled = _scaled(sigma)
    return float(scaled.max() / scaled.min())


def power_law(sigma: Tensor) -> tuple[float, float, float, int]:
    """Fit a power law p(x) ~ x^-alpha to the tail x >= xmin of the eigenvalues x = sigma^2.

    Returns alpha, the Kolmogorov-Smirnov distance of the fit, xmin in the units of sigma^2, and the number of values
    in the tail. The cut-off xmin is the value, the largest excluded, that gives the least distance (Clauset, Shalizi
    and Newman 2009, eq. 3.9). It is searched here, for all values at once; the fit above it is that of the package
    `powerlaw`, whose own search gives the same and takes seconds to minutes. With fewer than three distinct positive
    values the result is (NaN, NaN, NaN, 0).
    """
    x = (sigma.detach().to("cpu", torch.float64) ** 2).sort().values
    x = x[x > 0]
    if len(x.unique()) < 3:
        return math.nan, math.nan, math.nan, 0
    xmin = _power_law_cut_off(x)
    import powerlaw

    # Version 2 of powerlaw looks for alpha below 3 only, unless it is told otherwise; version 1 has no limit.
    new = "parameter_ranges" in inspect.signature(powerlaw.Fit).parameters
    wide = {"parameter_ranges": {"alpha": [1.0, 1e4]}} if new else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = powerlaw.Fit(x.numpy(), xmin=xmin, verbose=0, **wide).power_law
    return float(fitted.alpha), float(fitted.D), xmin, int((x >= xmin).sum())


def _power_law_cut_off(x: Tensor) -> float:
    """Return the xmin of the least Kolmogorov-Smirnov distance for positive x in ascending order.

    The empirical share of a tail of n values below its j-th value, counted from 0, is j / n, as in the code of Clauset
    and in powerlaw.
    """
    n, logs = len(x), x.log()
    first = torch.cat([torch.tensor([True]), x[1:] > x[:-1]]).nonzero()[:, 0]
    # Equal values have the same share below them, that of the first of them.
    below = torch.zeros(n, dtype=torch.float64)
    below[first] = first.to(torch.float64)
    below = below.cummax(0).values
    tail_logs = logs.flip(0).cumsum(0).flip(0)
    starts = first[:-1]
    best, best_distance = int(starts[0]), math.inf
    for chunk in starts.split(max(1, _CHUNK_ELEMENTS // n)):
        begin, begin_logs = int(chunk[0]), logs[chunk][:, None]
        size = (n - chunk).to(torch.float64)[:, None]
        exponent = size / (tail_logs[chunk][:, None] - size * begin_logs)  # alpha - 1
        fitted = 1 - torch.exp(-exponent * (logs[None, begin:] - begin_logs))
        observed = (below[None, begin:] - chunk[:, None]) / size
        inside = torch.arange(begin, n)[None] >= chunk[:, None]
        distances = (fitted - observed).abs().masked_fill_(~inside, 0).amax(1)
        at = int(distances.argmin())
        if float(distances[at]) < best_distance:
            best, best_distance = int(chunk[at]), float(distances[at])
    return float(x[best])


def _scaled(sigma: Tensor) -> Tensor:
    """Return the values as float64 on the CPU, divided by the largest; NaN for a zero matrix.

    Squares of the result neither overflow nor vanish.
    """
    values = sigma.detach().to("cpu", torch.float64)
    return values / values.max()


def _energies(sigma: Tensor) -> Tensor:
    return _scaled(sigma) ** 2


def _entropy(weights: Tensor) -> float:
    p = weights / weights.sum()
    return float(-torch.special.xlogy(p, p).sum())
