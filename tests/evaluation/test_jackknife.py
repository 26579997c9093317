"""The jackknife against its textbook formula, against the standard error of a mean, and against sampling itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from harness.evaluation import jackknife
from harness.evaluation.jackknife import jackknife_scores
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import estimate, paired


def scores_of(values: np.ndarray) -> ExampleScores:
    return ExampleScores(values, np.ones(len(values)))


def test_of_a_mean_it_is_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=30)
    found = jackknife_scores(lambda kept: float(values[kept].mean()), np.arange(30))
    assert np.allclose(found, values, rtol=0, atol=1e-12)


def test_grouped_of_a_mean_is_near_the_mean() -> None:
    """1,003 examples in 200 groups of 5 and 6: the same value; a standard error with the spread of 200 groups."""
    values = np.random.default_rng(1).normal(size=1003)
    found = estimate(scores_of(jackknife_scores(lambda kept: float(values[kept].mean()), np.arange(1003))))
    exact = estimate(scores_of(values))
    assert found.value == pytest.approx(exact.value, abs=1e-12)
    # the relative spread of a standard deviation over 200 groups is 1 / sqrt(400) = 5 %
    assert found.stderr == pytest.approx(exact.stderr, rel=0.15)


def pairs(seed: int, n: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    references = rng.integers(0, 3, n)
    predictions = np.where(rng.random(n) < right, references, rng.integers(0, 3, n))
    return predictions, references


def test_value_and_standard_error_are_the_textbooks() -> None:
    """Efron and Tibshirani, equation 11.5, example by example, though alike examples are computed once."""
    predictions, references = pairs(2, 60, 0.6)
    calls = []

    def f1(kept: np.ndarray) -> float:
        calls.append(len(kept))
        return float(f1_score(references[kept], predictions[kept], average="macro"))

    found = estimate(scores_of(jackknife_scores(f1, 3 * predictions + references)))
    assert len(calls) <= 1 + 9 and calls[0] == 60 and set(calls[1:]) == {59}
    without = np.array([f1(np.delete(np.arange(60), i)) for i in range(60)])
    expected = np.sqrt(59 / 60 * np.square(without - without.mean()).sum())
    assert found.value == pytest.approx(f1(np.arange(60)), abs=1e-12)
    assert found.stderr == pytest.approx(expected, rel=1e-12)


def matthews(answers: np.ndarray, references: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda kept: float(np.corrcoef(references[kept], answers[kept])[0, 1])


def test_standard_errors_are_those_of_fresh_samples() -> None:
    """The spread of Matthews correlation (Pearson's of two binary variables) over 400 samples, and of the
    difference of two models on the same examples."""
    values, errors, deltas, delta_errors = [], [], [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        references = rng.integers(0, 2, 150)
        one = np.where(rng.random(150) < 0.8, references, 1 - references)
        other = np.where(rng.random(150) < 0.1, 1 - one, one)  # most answers of the two models agree
        found = [
            scores_of(jackknife_scores(matthews(answers, references), 2 * answers + references))
            for answers in (one, other)
        ]
        values.append(estimate(found[0]).value)
        errors.append(estimate(found[0]).stderr)
        pair = paired(found[1], found[0])
        deltas.append(pair.delta)
        delta_errors.append(pair.stderr)
    # a standard deviation over 400 samples has a relative standard error of 1 / sqrt(800) = 3.5 %
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.11)
    assert np.mean(delta_errors) == pytest.approx(np.std(deltas, ddof=1), rel=0.11)
    assert np.mean(delta_errors) < 0.8 * np.sqrt(2) * np.mean(errors)  # pairing pays


def test_groups_give_the_standard_error_of_all_examples(monkeypatch) -> None:
    """In groups, and one at a time, of the same answers: both estimate one standard error."""
    predictions, references = pairs(3, 700, 0.7)

    def f1(kept: np.ndarray) -> float:
        return float(f1_score(references[kept], predictions[kept], average="macro"))

    one_by_one = estimate(scores_of(jackknife_scores(f1, 3 * predictions + references)))
    grouped = estimate(scores_of(jackknife_scores(f1, np.arange(700))))
    assert grouped.value == pytest.approx(one_by_one.value, abs=1e-12)
    assert grouped.stderr == pytest.approx(one_by_one.stderr, rel=0.15)
    monkeypatch.setattr(jackknife, "MOST_GROUPS", 701)
    singly = estimate(scores_of(jackknife_scores(f1, np.arange(700))))
    assert singly.stderr == pytest.approx(one_by_one.stderr, rel=1e-9)


def mean_of(score: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda kept: float(score[kept].mean())


@pytest.mark.parametrize(("n_clusters", "tolerance"), [(30, 1e-9), (500, 0.1)])
def test_whole_clusters_are_left_out_where_examples_are_left_out_in_groups(n_clusters, tolerance) -> None:
    """The standard error of a mean over clusters that are scattered over the examples, and of its paired difference."""
    rng = np.random.default_rng(n_clusters)
    clusters = rng.permutation(np.arange(3000) * n_clusters // 3000)
    scores = [rng.standard_normal(n_clusters)[clusters] + rng.standard_normal(3000) for _ in range(2)]
    direct = [ExampleScores(score, np.ones(3000), clusters=clusters) for score in scores]
    grouped, scattered = (
        [ExampleScores(jackknife_scores(mean_of(score), np.arange(3000), given), np.ones(3000), clusters=clusters)
         for score in scores]
        for given in (clusters, None)
    )
    assert estimate(grouped[0]).value == pytest.approx(scores[0].mean(), rel=1e-9)
    assert estimate(grouped[0]).stderr == pytest.approx(estimate(direct[0]).stderr, rel=tolerance)
    assert paired(*grouped).stderr == pytest.approx(paired(*direct).stderr, rel=tolerance)
    if n_clusters == 30:  # groups of examples of different clusters
        assert estimate(scattered[0]).stderr < 0.5 * estimate(direct[0]).stderr


def test_of_a_single_cluster_there_is_a_value() -> None:
    scores = jackknife_scores(lambda kept: float(kept.mean()), np.arange(300), np.zeros(300, dtype=np.int64))
    assert scores.mean() == pytest.approx(149.5)


def binary_f1(answers: np.ndarray, references: np.ndarray) -> Callable[[np.ndarray], float]:
    right = answers & references
    return lambda kept: float(2 * right[kept].sum() / (answers[kept].sum() + references[kept].sum()))


def test_a_true_null_is_rejected_as_often_as_it_should() -> None:
    """Two models of equal quality: p-values of the paired difference are uniform."""
    p_values = []
    for seed in range(300):
        rng = np.random.default_rng([seed, 9])
        references = rng.integers(0, 2, 200)
        one, other = (np.where(rng.random(200) < 0.75, references, 1 - references) for _ in range(2))
        found = [
            scores_of(jackknife_scores(binary_f1(answers, references), 2 * answers + references))
            for answers in (one, other)
        ]
        p_values.append(paired(*found).p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_edges() -> None:
    assert jackknife_scores(lambda kept: 0.25, np.zeros(1, dtype=np.int64)).tolist() == [0.25]
    undefined = jackknife_scores(lambda kept: float("nan") if len(kept) < 3 else 1.0, np.arange(3))
    assert np.isnan(undefined).all()
