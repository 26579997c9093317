"""The null model of a weight matrix: entries that are independent and identically distributed.

The singular values of such a matrix follow the law of Marchenko and Pastur (1967), here "the law". Notation: a matrix
[out, in] has k = min(out, in) singular values, n = max(out, in), and aspect = k / n. `noise` is the standard deviation
of its entries. Functions with an argument `aspect` work in units of noise sqrt(n), where the bulk of the singular
values is the interval [1 - sqrt(aspect), 1 + sqrt(aspect)]. Functions with an argument `shape` work in the units of the
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

# Quantiles of the Tracy-Widom law for real matrices (beta = 1); tests/spectral recompute them from its Fredholm
# determinant, F1(s) = det(1 - V_s), V_s(x, y) = Ai((x + y) / 2) / 2 on (s, inf) (Ferrari and Spohn 2005).
TRACY_WIDOM_1 = {0.90: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.2724}
TRACY_WIDOM_LEVEL = 0.99  # of a hundred matrices of pure noise, one has a singular value beyond this edge


def aspect_of(shape: tuple[int, int]) -> float:
    """Return the smaller side of a matrix over its larger side, in (0, 1]."""
    return min(shape) / max(shape)


def mp_cdf(values: Tensor, aspect: float) -> Tensor:
    """Return the share of singular values below each of `values` by the law: float64, of the shape of `values`.

    Values are in units of noise sqrt(n). For a value y inside the bulk [y-, y+], with x = y^2, a = y-^2 and b = y+^2,
    the share is [sqrt((x-a)(b-x)) + (1+aspect) theta - (1-aspect) phi] / (2 pi aspect), where
    theta = 2 atan2(sqrt(x-a), sqrt(b-x)) and phi = 2 atan2(sqrt(b(x-a)), sqrt(a(b-x))). Raises ValueError for an
    aspect outside (0, 1].
    """
    y, low, high = _unit_support(values, aspect)
    y = y.clamp(low, high)
    # x - a and b - x as products, because a difference of squares would lose digits near the edges.
    above_low, below_high = (y - low) * (y + low), (high - y) * (high + y)
    theta = 2 * torch.atan2(above_low.sqrt(), below_high.sqrt())
    phi = 2 * torch.atan2(high * above_low.sqrt(), low * below_high.sqrt())
    share = (above_low * below_high).sqrt() + (1 + aspect) * theta - (1 - aspect) * phi
    return (share / (2 * math.pi * aspect)).clamp(0, 1)


def mp_quantile(shares: Tensor, aspect: float) -> Tensor:
    """Return the inverse of `mp_cdf` at `shares`: float64, of the shape of `shares`, in units of noise sqrt(n).

    It is found by bisection to the last digit. Raises ValueError for an aspect outside (0, 1].
    """
    shares, low, high = _unit_support(shares, aspect)
    lower, upper = torch.full_like(shares, low), torch.full_like(shares, high)
    for _ in range(60):
        middle = (lower + upper) / 2
        below = mp_cdf(middle, aspect) < shares
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    return (lower + upper) / 2


@lru_cache(maxsize=1024)
def mp_median(aspect: float) -> float:
    """Return the median singular value of pure noise in units of noise sqrt(n): sqrt(mu_beta) of Gavish and Donoho."""
    return float(mp_quantile(torch.tensor(0.5), aspect))


def mp_edges(noise: float, shape: tuple[int, int], tracy_widom: bool = False) -> tuple[float, float]:
    """Return the lower and the upper edge of the bulk, noise (sqrt(n) - sqrt(k)) and noise (sqrt(n) + sqrt(k)).

    With tracy_widom the edges move outwards to the 99 % quantiles of the smallest and the largest singular value of a
    finite Gaussian matrix. Their centre and scale are those of Johnstone (2001), with n - 1/2 and k - 1/2 in place of
    n and k as in Ma (2012). The lower edge of a square matrix stays 0, because no singular value can be smaller.
    """
    n, k = max(shape), min(shape)
    if not tracy_widom:
        return noise * (math.sqrt(n) - math.sqrt(k)), noise * (math.sqrt(n) + math.sqrt(k))
    margin = TRACY_WIDOM_1[TRACY_WIDOM_LEVEL]
    root_n, root_k = math.sqrt(n - 0.5), math.sqrt(k - 0.5)
    upper = (root_n + root_k) ** 2 + margin * (root_n + root_k) * (1 / root_n + 1 / root_k) ** (1 / 3)
    lower = (root_n - root_k) ** 2 - margin * (root_n - root_k) * (1 / root_k - 1 / root_n) ** (1 / 3)
    return noise * math.sqrt(max(lower, 0.0)), noise * math.sqrt(upper)


def bbp_threshold(noise: float, shape: tuple[int, int]) -> float:
    """Return noise (k n)^(1/4): a singular value that is added to noise leaves the bulk only if it is larger than this.

    Baik, Ben Arous and Peche (2005); for rectangular matrices Benaych-Georges and Nadakuditi (2012).
    """
    return noise * (shape[0] * shape[1]) ** 0.25


def hard_threshold(sigma: Tensor, shape: tuple[int, int], noise: float | None = None) -> float:
    """Return the optimal hard threshold of Gavish and Donoho (2014, IEEE Trans. Inf. Theory 60(8)).

    With a known noise it is lambda(aspect) sqrt(n) noise, where lambda is 4 / sqrt(3) for a square matrix. Without it
    (None) it is lambda / sqrt(mu) times the median of sigma [k], where that factor is 2.858 for a square matrix.
    """
    noise = noise_gavish_donoho(sigma, shape) if noise is None else noise
    b = aspect_of(shape)
    factor = math.sqrt(2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b**2 + 14 * b + 1)))
    return factor * math.sqrt(max(shape)) * noise


def noise_gavish_donoho(sigma: Tensor, shape: tuple[int, int]) -> float:
    """Return median(sigma) / sqrt(n mu): the median of sigma [k] over the median of the law (Gavish and Donoho 2014).

    If 5 % of the values are outliers above the bulk, the estimate is 2 to 3 % too large, because the median of all
    values is then above the median of the bulk.
    """
    ordered = sigma.detach().to("cpu", torch.float64).sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return float(middle) / (math.sqrt(max(shape)) * mp_median(aspect_of(shape)))


def noise_bulk_fit(sigma: Tensor, shape: tuple[int, int]) -> float:
    """Return the noise whose law fits best to those of sigma [k] that lie between its own edges.

    It minimises the Kolmogorov-Smirnov distance between these values and the law, so that outliers on either side do
    not count. The search runs over a grid from 1/3 to 3 times the estimate by the median, which is refined three
    times. A noise is considered only if at least half of the values lie between its edges; if there is none, the
    estimate by the median is returned. If 5 % of the values are outliers above the bulk, the estimate is 1 to 3 % too
    small, because outliers repel the bulk: it narrows to the bulk of a matrix with as many rows and columns fewer.
    """
    ordered = sigma.detach().to("cpu", torch.float64).sort().values
    best = noise_gavish_donoho(sigma, shape)
    if best == 0:
        return 0.0
    spread = math.log(3.0)
    for _ in range(4):
        candidates = (best * torch.logspace(-spread, spread, 121, base=math.e, dtype=torch.float64)).tolist()
        distances = [_inside_distance(ordered, candidate, shape) for candidate in candidates]
        if min(distances) == math.inf:
            return best
        best = candidates[distances.index(min(distances))]
        spread /= 20
    return best


def _inside_distance(ordered: Tensor, noise: float, shape: tuple[int, int]) -> float:
    inside = _inside(ordered, noise, shape)
    if 2 * len(inside) < len(ordered) or len(inside) == 0:
        return math.inf
    return _distance(_shares(inside, noise, shape))


# The paper on small singular values (arXiv 2410.17770) takes its variance from Azadkia (arXiv 1801.10015, "via USVT").
# Azadkia's estimator is the median of Gavish and Donoho, so that both names stand for one function.
NOISE_ESTIMATORS: dict[str, Callable[[Tensor, tuple[int, int]], float]] = {
    "gavish_donoho": noise_gavish_donoho,
    "usvt": noise_gavish_donoho,
    "bulk_fit": noise_bulk_fit,
}


def estimate_noise(sigma: Tensor, shape: tuple[int, int], estimator: str = "gavish_donoho") -> float:
    """Return the standard deviation of i.i.d. entries that explains the bulk of the singular values sigma [k].

    estimator: a name in NOISE_ESTIMATORS. Raises ValueError for an unknown one, and for a wrong number of values.
    """
    if estimator not in NOISE_ESTIMATORS:
        raise ValueError(f"unknown noise estimator {estimator!r}: use {', '.join(NOISE_ESTIMATORS)}")
    if tuple(sigma.shape) != (min(shape),):
        raise ValueError(f"a {shape[0]}x{shape[1]} matrix has {min(shape)} singular values, got {tuple(sigma.shape)}")
    return NOISE_ESTIMATORS[estimator](sigma, shape)


def mp_region_bounds(
    sigma: Tensor, shape: tuple[int, int], estimator: str = "gavish_donoho", tracy_widom: bool = False
) -> tuple[int, int]:
    """Return where the bulk begins and ends in the descending singular values sigma [k], as (start, stop).

    The values above the bulk are those at [0, start), the values below it those at [stop, k). Raises ValueError as
    `estimate_noise` does.
    """
    lower, upper = mp_edges(estimate_noise(sigma, shape, estimator), shape, tracy_widom)
    return bounds_within(sigma, lower, upper)


def bounds_within(sigma: Tensor, lower: float, upper: float) -> tuple[int, int]:
    """Return what `mp_region_bounds` does, for a bulk with known edges."""
    return int((sigma > upper).sum()), int((sigma >= lower).sum())


def mp_distances(sigma: Tensor, noise: float, shape: tuple[int, int]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distances from the law of the singular values sigma [k], and of those inside.

    Those inside lie between the edges of the bulk; the second distance is NaN if there is none.
    """
    ordered = sigma.detach().to("cpu", torch.float64).sort().values
    expected = _shares(ordered, noise, shape)
    lower, upper = mp_edges(noise, shape)
    inside = slice(int((ordered < lower).sum()), int((ordered <= upper).sum()))
    return _distance(expected), _distance(expected[inside]) if inside.start < inside.stop else math.nan


def _inside(ordered: Tensor, noise: float, shape: tuple[int, int]) -> Tensor:
    lower, upper = mp_edges(noise, shape)
    return ordered[(ordered >= lower) & (ordered <= upper)]


def _shares(ordered: Tensor, noise: float, shape: tuple[int, int]) -> Tensor:
    """Return the share of singular values below each of `ordered` by the law."""
    unit = noise * math.sqrt(max(shape))
    return mp_cdf(ordered / unit, aspect_of(shape)) if unit else (ordered > 0).to(torch.float64)


def _distance(expected: Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance of values in ascending order from a law with these shares below them."""
    steps = torch.arange(len(expected) + 1, dtype=torch.float64) / len(expected)
    return float(torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def _unit_support(values: Tensor, aspect: float) -> tuple[Tensor, float, float]:
    if not 0 < aspect <= 1:
        raise ValueError(f"the aspect of a matrix is smaller side / larger side, in (0, 1], got {aspect}")
    return torch.as_tensor(values, dtype=torch.float64), 1 - math.sqrt(aspect), 1 + math.sqrt(aspect)
