"""The null model of a weight matrix: i.i.d. entries, whose singular values follow Marchenko and Pastur (1967).

Notation: a matrix [out, in] has k = min(out, in) singular values and n = max(out, in); aspect = k / n. `noise` is the
standard deviation of its entries. Functions with an `aspect` work in units of noise sqrt(n), where the bulk is
[1 - sqrt(aspect), 1 + sqrt(aspect)]; functions with a `shape` work in the units of the weights.
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
TRACY_WIDOM_LEVEL = 0.99  # an edge of pure noise is crossed by one matrix in a hundred


def aspect_of(shape: tuple[int, int]) -> float:
    return min(shape) / max(shape)


def mp_cdf(values: Tensor, aspect: float) -> Tensor:
    """Share of singular values (units of noise sqrt(n)) below each of `values`; float64, closed form.

    With x = y^2, a = y-^2, b = y+^2: [sqrt((x-a)(b-x)) + (1+aspect) theta - (1-aspect) phi] / (2 pi aspect),
    theta = 2 atan2(sqrt(x-a), sqrt(b-x)), phi = 2 atan2(sqrt(b(x-a)), sqrt(a(b-x))).
    """
    y, low, high = _unit_support(values, aspect)
    y = y.clamp(low, high)
    # Products of differences of y: differences of squares would lose the digits near the edges.
    above_low, below_high = (y - low) * (y + low), (high - y) * (high + y)
    theta = 2 * torch.atan2(above_low.sqrt(), below_high.sqrt())
    phi = 2 * torch.atan2(high * above_low.sqrt(), low * below_high.sqrt())
    share = (above_low * below_high).sqrt() + (1 + aspect) * theta - (1 - aspect) * phi
    return (share / (2 * math.pi * aspect)).clamp(0, 1)


def mp_quantile(shares: Tensor, aspect: float) -> Tensor:
    """Inverse of `mp_cdf`, by bisection to the last digit: float64, shape of `shares`, in units of noise sqrt(n)."""
    shares, low, high = _unit_support(shares, aspect)
    lower, upper = torch.full_like(shares, low), torch.full_like(shares, high)
    for _ in range(60):
        middle = (lower + upper) / 2
        below = mp_cdf(middle, aspect) < shares
        lower, upper = torch.where(below, middle, lower), torch.where(below, upper, middle)
    return (lower + upper) / 2


@lru_cache(maxsize=1024)
def mp_median(aspect: float) -> float:
    """Median singular value of pure noise in units of noise sqrt(n): sqrt(mu_beta) of Gavish and Donoho."""
    return float(mp_quantile(torch.tensor(0.5), aspect))


def mp_edges(noise: float, shape: tuple[int, int], tracy_widom: bool = False) -> tuple[float, float]:
    """Lower and upper edge of the bulk, noise (sqrt(n) -+ sqrt(k)).

    With tracy_widom the edges move outwards to the 99 % quantiles of the smallest and largest singular value of a
    finite Gaussian matrix, centred and scaled after Johnstone (2001) with the halves of Ma (2012). The lower edge of
    a square matrix stays 0 (a hard edge, where nothing can lie below).
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
    """A planted singular value leaves the bulk only above noise (k n)^(1/4) (Baik, Ben Arous and Peche 2005;
    Benaych-Georges and Nadakuditi 2012 for rectangular matrices)."""
    return noise * (shape[0] * shape[1]) ** 0.25


def hard_threshold(sigma: Tensor, shape: tuple[int, int], noise: float | None = None) -> float:
    """The optimal hard threshold of Gavish and Donoho (2014, IEEE Trans. Inf. Theory 60(8)).

    lambda(aspect) sqrt(n) noise where the noise is known, else lambda / sqrt(mu) times the median of sigma [k]
    (4 / sqrt(3) and 2.858 for square matrices).
    """
    noise = noise_gavish_donoho(sigma, shape) if noise is None else noise
    b = aspect_of(shape)
    factor = math.sqrt(2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b**2 + 14 * b + 1)))
    return factor * math.sqrt(max(shape)) * noise


def noise_gavish_donoho(sigma: Tensor, shape: tuple[int, int]) -> float:
    """median(sigma) / sqrt(n mu): the median of the values against that of the law (Gavish and Donoho 2014).

    5 % of outliers above raise it by 2 to 3 %, because the median of all values is then not that of the bulk.
    """
    ordered = sigma.detach().to("cpu", torch.float64).sort().values
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return float(middle) / (math.sqrt(max(shape)) * mp_median(aspect_of(shape)))


def noise_bulk_fit(sigma: Tensor, shape: tuple[int, int]) -> float:
    """The noise whose law fits best to the values between its own edges, at least half of all.

    Minimises the Kolmogorov-Smirnov distance between the values inside the edges and the law, over a grid refined
    three times around the median estimate (x 1/3 to x 3), so that outliers on either side do not count. If no noise
    leaves half of the values inside, the median estimate is returned. 5 % of outliers above lower it by 1 to 3 %:
    they repel the bulk, which narrows as that of a matrix with as many rows and columns fewer.
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
    return _distance(inside, noise, shape)


# For its variance the small-singular-values paper (2410.17770) cites Azadkia (arXiv 1801.10015, "via USVT"). The
# estimator there IS Gavish and Donoho's median: the paper bounds its error and then thresholds by USVT. Two names.
NOISE_ESTIMATORS: dict[str, Callable[[Tensor, tuple[int, int]], float]] = {
    "gavish_donoho": noise_gavish_donoho,
    "usvt": noise_gavish_donoho,
    "bulk_fit": noise_bulk_fit,
}


def estimate_noise(sigma: Tensor, shape: tuple[int, int], estimator: str = "gavish_donoho") -> float:
    """Standard deviation of the entries that explains the bulk of the singular values sigma [k].

    Raises ValueError for an unknown estimator or the wrong number of values.
    """
    if estimator not in NOISE_ESTIMATORS:
        raise ValueError(f"unknown noise estimator {estimator!r}: use {', '.join(NOISE_ESTIMATORS)}")
    if tuple(sigma.shape) != (min(shape),):
        raise ValueError(f"a {shape[0]}x{shape[1]} matrix has {min(shape)} singular values, got {tuple(sigma.shape)}")
    return NOISE_ESTIMATORS[estimator](sigma, shape)


def mp_region_bounds(
    sigma: Tensor, shape: tuple[int, int], estimator: str = "gavish_donoho", tracy_widom: bool = False
) -> tuple[int, int]:
    """Positions (start, stop) of the bulk in descending sigma [k]: above is [0, start), below is [stop, k).

    The counts right and left of the bulk are start and k - stop.
    """
    lower, upper = mp_edges(estimate_noise(sigma, shape, estimator), shape, tracy_widom)
    return int((sigma > upper).sum()), int((sigma >= lower).sum())


def mp_distance(sigma: Tensor, noise: float, shape: tuple[int, int], inside_only: bool = False) -> float:
    """Kolmogorov-Smirnov distance of singular values sigma [k] to the law; of those between the edges if inside_only.

    NaN if no value lies inside.
    """
    ordered = sigma.detach().to("cpu", torch.float64).sort().values
    ordered = _inside(ordered, noise, shape) if inside_only else ordered
    return _distance(ordered, noise, shape) if len(ordered) else math.nan


def _inside(ordered: Tensor, noise: float, shape: tuple[int, int]) -> Tensor:
    lower, upper = mp_edges(noise, shape)
    return ordered[(ordered >= lower) & (ordered <= upper)]


def _distance(ordered: Tensor, noise: float, shape: tuple[int, int]) -> float:
    unit = noise * math.sqrt(max(shape))
    expected = mp_cdf(ordered / unit, aspect_of(shape)) if unit else (ordered > 0).to(torch.float64)
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return float(torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def _unit_support(values: Tensor, aspect: float) -> tuple[Tensor, float, float]:
    if not 0 < aspect <= 1:
        raise ValueError(f"the aspect of a matrix is smaller side / larger side, in (0, 1], got {aspect}")
    return torch.as_tensor(values, dtype=torch.float64), 1 - math.sqrt(aspect), 1 + math.sqrt(aspect)
