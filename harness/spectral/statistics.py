"""Statistics of the singular values of one matrix: ranks, entropies, and the tail as a power law.

Every function takes sigma [r], the r = min(out, in) singular values in any order. No result but the `xmin` of
`power_law` changes when the matrix is multiplied by a number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALL_SAMPLE = 20  # positive values; of fewer, the tail and its exponent are chosen with more care, see `power_law`
LEAST_TAIL = 8  # values of the tail of such a small sample
# `_best_tail` compares candidates with values in tables of so many float64 entries, which fit into a cache.
_CHUNK_ELEMENTS = 1 << 14
# It compares them first with the largest values and, of the others, with one of so many, and with so many at least.
_LARGEST, _ONE_OF, _OTHERS = 32, 16, 32


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
    and Newman 2009, eq. 3.9), and alpha is 1 + n / S of the n values of the tail, where S is the sum of log(x / xmin)
    (their eq. 3.1). The package `powerlaw` finds the same, but takes seconds to minutes.

    Of fewer than SMALL_SAMPLE positive values the least distance would often choose a tail of two or three, whose alpha
    is far too large. There the tail has at least LEAST_TAIL values, all if there are not so many, and alpha is
    1 + (n - 2) / S, which has no bias for a tail that begins at one of its values (Rytgaard 1990, ASTIN Bulletin 20(2),
    the estimator of the exponent of a Pareto law with unknown scale). With fewer than three distinct positive values
    the result is (NaN, NaN, NaN, 0).
    """
    x = (sigma.detach().to("cpu", torch.float64) ** 2).sort().values
    x = x[x > 0]
    if len(x) < 3:
        return math.nan, math.nan, math.nan, 0
    first = torch.cat([torch.tensor([0]), (x[1:] > x[:-1]).nonzero()[:, 0] + 1])
    if len(first) < 3:
        return math.nan, math.nan, math.nan, 0
    small = len(x) < SMALL_SAMPLE
    starts = first[:-1][first[:-1] <= max(0, len(x) - LEAST_TAIL)] if small else first[:-1]
    distance, exponent, start = _best_tail(x, first, starts, lost=2 if small else 0)
    return 1 + exponent, distance, float(x[start]), len(x) - start


def _best_tail(x: Tensor, first: Tensor, starts: Tensor, lost: int) -> tuple[float, float, int]:
    """Return the least Kolmogorov-Smirnov distance of the tails at `starts`, its alpha - 1, and where its tail begins.

    x: positive values [n] in ascending order. first: the position of the first of each group of equal values.
    lost: what is subtracted from the number of values for alpha - 1. The empirical share of a tail of m values at its
    j-th value or above, with j counted from 0, is (m - j) / m, as in the code of Clauset and in powerlaw.

    The distance at some of the values is never more than that at all. Tails for which it is already more than the
    distance of another tail are therefore left out, which are nearly all.
    """
    n, logs = len(x), x.log()
    # Equal values have the same share, that of the first of them.
    left = torch.zeros(n, dtype=torch.float64)
    left[first] = first.to(torch.float64)
    left = n - left.cummax(0).values
    sizes = (n - starts).to(torch.float64)
    exponents = (sizes - lost) / (logs.flip(0).cumsum(0).flip(0)[starts] - sizes * logs[starts])

    def distances(chosen: Tensor, positions: Tensor) -> Tensor:
        """Return the distances of the tails `chosen` of `starts` at the values at these positions."""
        logs_there, left_there = logs[positions], left[positions]
        found = []
        for chunk in chosen.split(max(1, _CHUNK_ELEMENTS // len(positions))):
            begin = starts[chunk][:, None]
            fitted = (logs_there - logs[begin]).mul_(-exponents[chunk, None]).exp_()
            fitted.sub_(left_there / sizes[chunk, None]).abs_()
            found.append(fitted.masked_fill_(positions < begin, 0).amax(1))
        return torch.cat(found)

    chosen, everywhere = torch.arange(len(starts)), torch.arange(n)
    if n >= _LARGEST + _OTHERS:
        others = n - _LARGEST
        some = torch.cat([everywhere[: others : min(_ONE_OF, others // _OTHERS)], everywhere[others:]])
        at_least = distances(chosen, some)
        chosen = chosen[~(at_least > distances(at_least.argmin()[None], everywhere))]  # "not more": NaN stays
    exact = distances(chosen, everywhere)
    best = int(exact.argmin())
    return float(exact[best]), float(exponents[chosen[best]]), int(starts[chosen[best]])


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
