"""Exact tests and intervals of counts against enumeration, scipy and the exact coverage."""

from itertools import product

import numpy as np
import pytest
import scipy.stats

from harness.evaluation import counts
from harness.evaluation.counts import mcnemar_interval, sign_flip_p


def test_p_is_the_share_of_all_choices_of_signs():
    rng = np.random.default_rng(0)
    signs = np.array(list(product([-1, 1], repeat=9)))
    for changes in rng.integers(-4, 5, (20, 9)):
        expected = np.mean(np.abs(signs @ changes) >= abs(changes.sum()))
        assert sign_flip_p(changes.astype(float)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 6), (7, 7), (40, 71), (300, 0)])
def test_single_answers_are_mcnemars_exact_test(gained, lost):
    changes = np.concatenate([np.ones(gained), -np.ones(lost), np.zeros(50)])
    expected = scipy.stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert sign_flip_p(changes) == pytest.approx(expected, rel=1e-9)


def test_a_count_that_would_take_too_long_is_left_to_the_t_test(monkeypatch):
    assert sign_flip_p(np.full(100, 2.0)) is not None
    monkeypatch.setattr(counts, "MOST_STEPS", 19_999)
    assert sign_flip_p(np.full(100, 2.0)) is None


def test_the_interval_contains_zero_exactly_if_the_test_does_not_refuse():
    for gained in range(13):
        for lost in range(gained + 1):
            p = sign_flip_p(np.concatenate([np.ones(gained), -np.ones(lost)]))
            for confidence in (0.9, 0.95, 0.99):
                low, high = mcnemar_interval(gained, lost, 60, confidence)
                assert (low > 0) == (p < 1 - confidence) and high > 0
                assert mcnemar_interval(lost, gained, 60, confidence) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.0), (0.02, 0.0), (0.05, 0.01), (0.02, 0.02), (0.3, 0.1)])
def test_the_interval_covers_at_least_as_often_as_it_says(gain, loss):
    """The exact coverage over all outcomes of 40 questions, for true shares of gained and lost answers."""
    n, held = 40, dict.fromkeys((0.9, 0.99), 0.0)
    for gained, lost in product(range(n + 1), repeat=2):
        if gained + lost > n:
            continue
        chance = scipy.stats.multinomial.pmf([gained, lost, n - gained - lost], n, [gain, loss, 1 - gain - loss])
        if chance < 1e-7:
            continue
        for confidence in held:
            low, high = mcnemar_interval(gained, lost, n, confidence)
            held[confidence] += chance * (low <= gain - loss <= high)
    assert all(share > confidence - 1e-4 for confidence, share in held.items()), held
