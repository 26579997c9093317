"""Intervals for the mean of a finite set of examples that are valid at every number of draws.

Examples are drawn without replacement in random order, and the mean over the whole set is wanted. Both intervals are
confidence sequences: with a probability of at least `confidence` they contain that mean at all numbers of draws
together. One may therefore look at them after every draw and stop as soon as they are narrow enough.

`bounded_mean_interval` assumes only that the values lie in a known range (accuracies). It is the hedged betting
confidence sequence for sampling without replacement of Waudby-Smith and Ramdas, Estimating means of bounded random
variables by betting, JRSS-B 86 (2024).

`mean_interval` is for values without a known range (log-likelihoods), for which no interval can be valid for every set.
It is the normal mixture of Robbins (1970; Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics 49, 2021) with
unknown variance: the Bayes factor of a t statistic under a normal prior of the effect (Lai 1976; Wang and Ramdas,
Anytime-valid t-tests and confidence sequences for Gaussian means with unknown variance, 2023). It is exact for
independent normal values. For other values it becomes valid as the number of draws grows, like the asymptotic
confidence sequences of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Annals of Statistics 52, 2024).

How many draws are enough depends on the skewness of the values, as far as the draws have shown it. The interval is the
whole line as long as fewer than 50 skewness^2 values are drawn, or fewer than that are left to draw. This is twice the
number in the rule of Cochran (Sampling Techniques, 3rd ed., section 2.15), because one looks often and because the
skewness is itself an estimate.

Drawing n of N values without replacement counts as n / (1 - n/N) independent draws, for the sum S_n of the draws and
the mean mu: (S_n - n mu) / (N - n) is a martingale, and up to the scale (N - n)^2 its variance is that of a sum of so
many independent draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from harness.evaluation.statistics import mean_stderr

TUNED_FOR = 100  # effective draws at which the interval of the mixture is narrowest; fixed before any data are seen
DRAWS_PER_SQUARED_SKEWNESS = 50
TRUNCATION = 0.75  # of the bets, c in the paper; large, because ablations change few answers, which favours large bets


@dataclass(frozen=True)
class Interval:
    """An interval low <= estimate <= high, in the unit of the values.

    spread: the standard deviation of the values, or of what the covariates do not explain of them, with the degrees of
    freedom in the denominator.
    """

    estimate: float
    low: float
    high: float
    spread: float


def mean_interval(
    draws: np.ndarray, population: int, confidence: float, covariates: np.ndarray | None = None
) -> Interval:
    """Estimate the mean over `population` values from the first n of them in random order.

    draws: float64 [n]. confidence: above 0 and below 1. covariates: float64 [n, k], for each draw k numbers whose means
    over the population are exactly zero. The regression estimator (Cochran, Sampling Techniques, 3rd ed., section 7.1)
    then removes from the values what the covariates explain. Its variance is the larger one of two estimates: that for
    residuals of equal variance, and that of the jackknife (HC3 of MacKinnon and White, Journal of Econometrics 29,
    1985), which also holds if residuals vary more where covariates are large, as those of sums over many tokens do. The
    interval is infinite if there are too few draws for their skewness, and if all draws are equal, because equal draws
    say nothing about the values that were not drawn.
    """
    draws = np.asarray(draws, dtype=np.float64)
    n = len(draws)
    centre, residual, freedom, leverage = float(draws.mean()), draws - draws.mean(), n - 1, 0.0
    jackknife = 0.0  # the variance of one value that gives the estimate the variance of the jackknife
    if covariates is not None:
        means = covariates.mean(axis=0)
        # orthonormal directions in which the covariates vary
        left, singular, right = np.linalg.svd(covariates - means, full_matrices=False)
        rank = int((singular > 1e-9 * np.abs(covariates).max(initial=0.0) * math.sqrt(n)).sum())
        if 0 < rank < n - 2:
            left, at_zero = left[:, :rank], (right[:rank] @ means) / singular[:rank]
            slopes = left.T @ residual
            centre, residual = centre - float(slopes @ at_zero), residual - left @ slopes
            freedom, leverage = n - 1 - rank, float(at_zero @ at_zero)
            shares = 1 / n - left @ at_zero  # the estimate is the sum of the draws times these
            own = np.minimum(1 / n + np.square(left).sum(axis=1), 0.999)  # the influence of each draw on its own fit
            change = float(np.square(shares * residual / (1 - own)).sum())
            jackknife = (n - 1) / n * change / (1 / n + leverage)
    spread = math.sqrt(float(residual @ residual) / freedom) if freedom > 0 else 0.0
    if n == population:
        mean = float(draws.mean())
        return Interval(mean, mean, mean, spread)
    # the residuals of equal values are rounding errors
    if spread <= 1e-12 * float(np.abs(draws).max(initial=0.0)):
        return Interval(centre, -math.inf, math.inf, 0.0)
    skewness = float((residual**3).mean()) / float((residual**2).mean()) ** 1.5
    # few values that are left to draw are as bad as few draws, because the errors of both sums are the same
    if min(n, population - n) < DRAWS_PER_SQUARED_SKEWNESS * skewness**2:
        return Interval(centre, -math.inf, math.inf, spread)
    information = 1 / (1 / n + leverage - 1 / population)
    deviation = max(spread, math.sqrt(jackknife))
    half = deviation * math.sqrt(freedom / information) * _t_boundary(information, freedom, 1 - confidence)
    return Interval(centre, centre - half, centre + half, spread)


def _prior(alpha: float) -> float:
    """Return the prior variance of the effect, in units of the values' variance.

    It nearly gives the narrowest interval at TUNED_FOR draws (Waudby-Smith et al. 2024).
    """
    return (-2 * math.log(alpha) + math.log(-2 * math.log(alpha)) + 1) / TUNED_FOR


def _t_boundary(information: float, freedom: int, alpha: float) -> float:
    """Return the largest |t| / sqrt(freedom) at which the Bayes factor is still below 1 / alpha."""
    ratio = 1 + information * _prior(alpha)
    needed = (math.sqrt(ratio) / alpha) ** (2 / (freedom + 1))
    return math.sqrt((needed - 1) / (1 - needed / ratio)) if needed < ratio else math.inf


def zero_mean_evidence(draws: np.ndarray, confidence: float, clusters: np.ndarray | None = None) -> float:
    """Return the Bayes factor against the hypothesis that the draws, float64 [n], come from a law of mean zero.

    The inverse of the largest Bayes factor so far is a p-value that is valid whenever one stops (Johari, Pekelis and
    Walsh 2015). The factor is 1 if all draws are zero or if there are fewer than two. If all are the same and not zero,
    it is that of the sign test for G clusters with a uniform prior, 2^G / (G + 1).

    clusters: int64 [n], the cluster of each draw. The t statistic then has the standard error over the G clusters and
    the degrees of freedom of `statistics`. The draws count as so many independent ones as have that standard error.
    """
    draws = np.asarray(draws, dtype=np.float64)
    n = len(draws)
    if n < 2 or not draws.any():
        return 1.0
    variance = float(draws.var(ddof=1))
    stderr, groups, freedom = mean_stderr(draws, clusters)
    if stderr is None or freedom is None:
        return 1.0
    if variance == 0:
        return 2.0 ** min(groups, 1000) / (groups + 1)
    information = min(float(n), variance / stderr**2) if stderr > 0 else float(n)
    square = information * float(draws.mean()) ** 2 / variance / freedom
    ratio = 1 + information * _prior(1 - confidence)
    log = 0.5 * (freedom + 1) * (math.log1p(square) - math.log1p(square / ratio)) - 0.5 * math.log(ratio)
    return math.exp(min(log, 700.0))


def bounded_mean_interval(
    draws: np.ndarray, population: int, confidence: float, low: float, high: float
) -> Interval:
    """Estimate the mean over `population` values within low..high from the first n of them in random order.

    draws: float64 [n]. confidence: above 0 and below 1. The interval is valid for every set of values in the range and
    every n. Raises ValueError for a value outside the range.
    """
    draws = np.asarray(draws, dtype=np.float64)
    n, slack = len(draws), 1e-6 * (high - low)
    if n and not (draws.min() >= low - slack and draws.max() <= high + slack):
        raise ValueError(f"values {draws.min()}..{draws.max()} are outside the range {low}..{high}")
    spread = float(draws.std(ddof=1)) if n > 1 else 0.0
    if n == population:
        mean = float(draws.mean())
        return Interval(mean, mean, mean, spread)
    unit = np.clip((draws - low) / (high - low), 0.0, 1.0)
    bets = _bets(unit, 1 - confidence)
    lower = _lower_end(unit, bets, population, 1 - confidence)
    upper = 1 - _lower_end(1 - unit, bets, population, 1 - confidence)
    lower, upper = low + (high - low) * lower, low + (high - low) * upper
    return Interval(float(np.clip(draws.mean(), lower, upper)), lower, upper, spread)


def _bets(unit: np.ndarray, alpha: float) -> np.ndarray:
    """Return the predictable plug-in bets, float64 [n]: bet i depends on draws 0..i-1 only."""
    i = np.arange(1, len(unit) + 1)
    mean = (0.5 + np.cumsum(unit)) / (i + 1)
    variance = (0.25 + np.cumsum((unit - mean) ** 2)) / (i + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.sqrt(2 * math.log(2 / alpha) / (before * i * np.log1p(i)))


def _lower_end(unit: np.ndarray, bets: np.ndarray, population: int, alpha: float) -> float:
    """Return the largest mean that is refuted by bets that the true mean is larger.

    It is found by bisection, because the wealth from these bets falls as the supposed mean rises.
    """
    n = len(unit)
    before = np.concatenate([[0.0], np.cumsum(unit)[:-1]])
    left = population - np.arange(n)

    def refuted(mean: float) -> bool:
        supposed = (population * mean - before) / left
        if n and supposed.min() <= 0:
            return True  # the values that are left to draw would have to be zero or negative
        wealth = np.log1p(np.minimum(bets, TRUNCATION / supposed) * (unit - supposed)).sum()
        return wealth >= math.log(2 / alpha)

    below, above = float(unit.sum()) / population, 1.0
    if not refuted(below + 1e-15):
        return below
    while above - below > 1e-9:
        middle = 0.5 * (below + above)
        below, above = (middle, above) if refuted(middle) else (below, middle)
    return below
