"""Coverage of the always-valid intervals over simulated finite sets, looked at again and again; against scipy."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from harness.evaluation.requests import ExampleScores
from harness.evaluation.sequential import (
    TUNED_FOR,
    _t_boundary,
    bounded_mean_interval,
    mean_interval,
    zero_mean_evidence,
)
from harness.evaluation.statistics import paired

CONFIDENCE = 0.95
SIZE = 600
LOOKS = range(16, SIZE, 16)
ORDERS = 300


def _normal(rng):
    return rng.normal(0.3, 1, SIZE)


def _exponential(rng):
    return rng.exponential(1, SIZE)


def _skewed(rng):
    return rng.lognormal(0, 1, SIZE)


def _heavy_tails(rng):
    return rng.standard_t(3, SIZE)


def _mostly_zero(rng):
    return np.where(rng.random(SIZE) < 0.1, rng.normal(1, 1, SIZE), 0.0)


def _flips(rng, rate=0.06):
    return np.where(rng.random(SIZE) < rate, rng.choice([-1.0, 1.0], SIZE, p=[0.7, 0.3]), 0.0)


def _ever_missed(values, interval, looks=LOOKS, seed=1, orders=ORDERS):
    """In how many of the random orders the interval fails the mean of all values at some look: no choice of when to
    stop can do worse than that."""
    rng, mean, missed = np.random.default_rng(seed), values.mean(), 0
    for _ in range(orders):
        order = rng.permutation(len(values))
        missed += any(not found.low <= mean <= found.high for found in (interval(order[:n]) for n in looks))
    return missed


# a rate of 5 % gives more than 27 misses of 300 with probability 0.0015 only
MOST = int(stats.binom.ppf(0.9985, ORDERS, 1 - CONFIDENCE))


@pytest.mark.parametrize("make", [_normal, _exponential, _skewed, _heavy_tails, _mostly_zero])
def test_mean_interval_holds_at_every_look_at_once(make):
    values = make(np.random.default_rng(2))
    assert _ever_missed(values, lambda order: mean_interval(values[order], SIZE, CONFIDENCE)) <= MOST


def test_covariate_keeps_the_coverage_and_narrows():
    rng = np.random.default_rng(3)
    known = rng.normal(0, 1, SIZE)
    known -= known.mean()
    values = 0.4 + 0.8 * known + rng.normal(0, 0.4, SIZE) * (1 + np.abs(known))
    with_it = mean_interval(values[:200], SIZE, CONFIDENCE, known[:200, None])
    without = mean_interval(values[:200], SIZE, CONFIDENCE)
    explained = np.corrcoef(values[:200], known[:200])[0, 1] ** 2
    assert (with_it.high - with_it.low) / (without.high - without.low) == pytest.approx(
        math.sqrt(1 - explained), rel=0.02
    )
    slope, intercept = np.polyfit(known[:200], values[:200], 1)
    assert with_it.estimate == pytest.approx(intercept) and slope > 0
    # a covariate twice, or one that does not vary, changes nothing
    for more in (known[:200, None] * -3, np.full((200, 1), 0.0)):
        again = mean_interval(values[:200], SIZE, CONFIDENCE, np.hstack([known[:200, None], more]))
        assert (again.low, again.high) == pytest.approx((with_it.low, with_it.high), rel=1e-9)

    def adjusted(order):
        return mean_interval(values[order], SIZE, CONFIDENCE, known[order, None])

    assert _ever_missed(values, adjusted) <= MOST


@pytest.mark.parametrize("rate", [0.01, 0.06, 0.5])
def test_bounded_interval_holds_at_every_look_at_once(rate):
    values = _flips(np.random.default_rng(4), rate)
    looks = [*range(10, SIZE, 45), SIZE - 1]
    missed = _ever_missed(values, lambda order: bounded_mean_interval(values[order], SIZE, CONFIDENCE, -1, 1), looks,
                          orders=120)
    assert missed <= int(stats.binom.ppf(0.9985, 120, 1 - CONFIDENCE))


def test_a_fixed_size_interval_looked_at_as_often_does_not_hold():
    """The harm that is avoided: Student's intervals, corrected for the finite set, at the same looks."""
    values = _normal(np.random.default_rng(2))

    def student(order):
        n = len(order)
        half = stats.t.ppf(0.975, n - 1) * values[order].std(ddof=1) * math.sqrt((1 / n - 1 / SIZE))
        mean = values[order].mean()
        return type("Interval", (), {"low": mean - half, "high": mean + half})

    assert _ever_missed(values, student) > 2 * MOST


def _bayes_factor(t, n):
    """Of a t statistic under an effect with a normal prior, integrated by scipy."""
    prior = math.sqrt((-2 * math.log(0.05) + math.log(-2 * math.log(0.05)) + 1) / TUNED_FOR)
    marginal, _ = integrate.quad(
        lambda effect: stats.nct.pdf(t, n - 1, math.sqrt(n) * effect) * stats.norm.pdf(effect, 0, prior), -2, 2,
        epsabs=1e-14, limit=200,
    )
    return marginal / stats.t.pdf(t, n - 1)


def test_the_boundary_is_where_the_bayes_factor_reaches_one_over_alpha():
    draws = np.random.default_rng(5).normal(0.2, 1.3, 40)
    found = mean_interval(draws, 10**12, CONFIDENCE)
    for end in (found.low, found.high):
        t = (draws.mean() - end) / (draws.std(ddof=1) / math.sqrt(40))
        assert _bayes_factor(t, 40) == pytest.approx(20, rel=1e-4)


def test_evidence_is_that_bayes_factor_at_zero():
    draws = np.random.default_rng(6).normal(0.4, 1.0, 30)
    t = draws.mean() / (draws.std(ddof=1) / math.sqrt(30))
    assert zero_mean_evidence(draws, 0.95) == pytest.approx(_bayes_factor(t, 30), rel=1e-4)
    assert zero_mean_evidence(np.zeros(9), 0.95) == 1 and zero_mean_evidence(np.ones(9), 0.95) == 2**9 / 10


def test_p_value_is_valid_at_the_worst_time_to_stop():
    rng, rejected = np.random.default_rng(7), 0
    for _ in range(ORDERS):
        draws = rng.exponential(1, 400) - 1
        rejected += max(zero_mean_evidence(draws[:n], 0.95) for n in range(32, 401, 16)) >= 20
    assert rejected <= MOST


@pytest.mark.parametrize("interval", [
    lambda values, size: mean_interval(values, size, CONFIDENCE),
    lambda values, size: bounded_mean_interval(values, size, CONFIDENCE, -1, 1),
])
def test_nothing_left_to_draw_is_exact(interval):
    values = _flips(np.random.default_rng(8))
    found = interval(values, SIZE)
    assert found.low == found.high == found.estimate == values.mean()


def test_several_covariates_are_a_regression():
    rng = np.random.default_rng(10)
    known = rng.normal(0, 1, (80, 2))
    values = 1 + known @ [0.5, -2] + rng.normal(0, 0.3, 80)
    found = mean_interval(values, 10**12, CONFIDENCE, known)
    design = np.column_stack([np.ones(80), known])
    coefficients, (left_over,), *_ = np.linalg.lstsq(design, values, rcond=None)
    assert found.estimate == pytest.approx(coefficients[0], rel=1e-12)
    assert found.spread == pytest.approx(math.sqrt(left_over / 77), rel=1e-12)


def test_equal_or_few_values_say_nothing_of_the_rest():
    assert mean_interval(np.zeros(64), 100, CONFIDENCE).high == math.inf
    assert mean_interval(np.full(64, 0.1) + 0.2, 100, CONFIDENCE).high == math.inf
    assert mean_interval(np.array([1.0, 2.0]), 100, CONFIDENCE).high == math.inf
    # but a range does: at least the zeros drawn are zeros
    bounded = bounded_mean_interval(np.zeros(64), 100, CONFIDENCE, -1, 1)
    assert -0.36 <= bounded.low < 0 < bounded.high <= 0.36


def test_bounded_ends_are_possible_means():
    values = np.array([1.0] * 60)
    found = bounded_mean_interval(values, 80, CONFIDENCE, 0, 1)
    assert found.low >= 60 / 80 and found.high == pytest.approx(1)
    with pytest.raises(ValueError, match="outside the range"):
        bounded_mean_interval(np.array([0.0, 1.5]), 10, CONFIDENCE, 0, 1)


def test_fewer_draws_of_a_finite_set_are_worth_more():
    """At n of N draws the interval is that of n / (1 - n/N) independent ones with the same spread."""
    draws = np.random.default_rng(9).normal(0, 1, 5000)
    half = [mean_interval(draws[:2500], size, CONFIDENCE) for size in (5000, 10**12)]
    many = mean_interval(np.tile(draws[:2500], 2), 10**12, CONFIDENCE)
    width = [found.high - found.low for found in (*half, many)]
    assert width[0] < width[1] and width[0] == pytest.approx(width[2], rel=2e-3)


def test_values_that_vary_more_where_covariates_are_large_are_covered_too():
    """Sums over unequal numbers of tokens. A variance that is thought to be equal everywhere covers too seldom."""
    rng = np.random.default_rng(11)
    weight = rng.gamma(1.2, 1.0, 400)
    values = 0.1 * weight + weight * rng.standard_normal(400)
    known = (weight - weight.mean())[:, None]
    missed, narrower = 0, 0
    for _ in range(300):
        order = rng.permutation(400)
        for n in (40, 60, 90, 140, 220, 350):
            drawn = order[:n]
            found = mean_interval(values[drawn], 400, 0.9, known[drawn])
            if not found.low <= values.mean() <= found.high:
                missed += 1
                break
        drawn = order[:60]
        found = mean_interval(values[drawn], 400, 0.9, known[drawn])
        matrix = np.column_stack([np.ones(60), known[drawn]])
        inverse = np.linalg.inv(matrix.T @ matrix)
        residual = values[drawn] - matrix @ (inverse @ matrix.T @ values[drawn])
        own = np.einsum("ij,jk,ik->i", matrix, inverse, matrix)
        change = inverse @ (matrix.T * (residual / (1 - own)))  # of the coefficients if a draw is left out
        jackknife = math.sqrt(59 / 60 * np.square(change[0]).sum() / inverse[0, 0])
        equal = math.sqrt(residual @ residual / 58)
        ends = mean_interval(values[drawn], 400, 0.9)
        if math.isfinite(found.high) and math.isfinite(ends.high):
            information = 1 / (inverse[0, 0] - 1 / 400)
            half = max(equal, jackknife) * math.sqrt(58 / information) * _t_boundary(information, 58, 0.1)
            assert found.high - found.estimate == pytest.approx(half, rel=1e-9)
            narrower += jackknife > 1.05 * equal
    assert missed <= 30 + 2 * math.sqrt(27) and narrower > 50


@given(st.integers(0, 10**6), st.integers(3, 60), st.booleans(), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=60, deadline=None)
def test_p_at_one_look_is_not_smaller_than_that_of_a_t_test(seed, n, clustered, confidence):
    """Over the same clusters, of any size. What docs/precision.md says; the smallest p of several looks may be."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, max(2, n // 3), n) if clustered else None
    draws = rng.normal(rng.normal(0, 1), 1, n)
    p = min(1.0, 1 / zero_mean_evidence(draws, confidence, clusters))
    if clusters is None:
        assert p >= stats.ttest_1samp(draws, 0).pvalue
    elif len(np.unique(clusters)) > 2:
        none = ExampleScores(np.zeros(n), np.ones(n), clusters=clusters)
        expected = paired(replace(none, score=draws), none).p_value
        assert expected is not None and p >= expected * (1 - 1e-9)
