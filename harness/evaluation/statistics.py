"""Metrics with standard errors, paired differences, and the correction for having tried many cells.

A metric is g(R), where R = sum(s) / sum(w) over the examples with scores s and weights w, and g is the identity or exp.
Its standard error is that of the delta method. The influence of example i is psi_i = g'(R) (s_i - R w_i) n / sum(w).
The influences sum to zero, and the standard error is their sample standard deviation over sqrt(n). For a mean (w = 1)
this is the usual standard error of the mean, and `paired` is the paired t-test. For ratio estimators see Cochran,
Sampling Techniques, 3rd ed., chapter 6; the influences are those of the infinitesimal jackknife of Jaeckel (1972).

Examples of one cluster (the windows of a document, the questions to a passage) are not independent. The influences are
then summed within each of the G clusters. Each sum is divided by 1 - h, where h is the cluster's share of the weights,
which makes it the change of the metric if the cluster is left out. The variance of the metric is (G - 1) / G times the
sum of their squares over n^2, and Student's t has G - 1 degrees of freedom. This is the cluster jackknife (CR3), which
holds for few clusters of unequal size better than others (Cameron and Miller, A Practitioner's Guide to Cluster-Robust
Inference, Journal of Human Resources 50, 2015, section VI; MacKinnon, Nielsen and Webb, Journal of Applied Econometrics
38, 2023). If each example is its own cluster and the weights are equal, this is the same as above.

The p-value of the difference of a perplexity is computed for the difference of its logarithm, which is zero if that of
the perplexity is. The delta method is too coarse where an ablation destroys a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harness.evaluation.requests import ExampleScores


@dataclass(frozen=True)
class Estimate:
    """A metric: its value, its standard error in the same unit (None for a single cluster), and its n examples.

    n_clusters: the number of clusters of the examples, which is n if all examples are independent.
    """

    value: float
    stderr: float | None
    n: int
    n_clusters: int


@dataclass(frozen=True)
class Delta:
    """The difference of a metric between two models on the same examples.

    delta: ablated - baseline, in the metric's own unit. stderr: its standard error from the paired differences, in the
    same unit. p_value: two-sided, of Student's t with one degree of freedom less than there are clusters. stderr and
    p_value are None for a single cluster.
    """

    delta: float
    stderr: float | None
    p_value: float | None


def estimate(scores: ExampleScores) -> Estimate:
    """Return a metric and its standard error.

    Examples with zero weight and zero score do not belong to the metric and are not counted in n. Scores that are not
    finite give a value that is not finite. Raises ValueError for arrays of different lengths, weights whose sum is not
    positive, and an unknown transform.
    """
    score, weight = _arrays(scores)
    inside = (weight != 0) | (score != 0)
    score, weight, groups = score[inside], weight[inside], _groups(scores, inside)
    with np.errstate(invalid="ignore", over="ignore"):
        value, influence = _value_and_influence(score, weight, scores.transform)
        return Estimate(value, _stderr(influence, groups, weight), len(score), _count(groups))


def paired(ablated: ExampleScores, baseline: ExampleScores) -> Delta:
    """Return ablated - baseline over the same examples, with the standard error of the pairs and a p-value.

    If no example differs, p is 1. If every example differs by the same amount, so that the standard error is exactly
    zero, p is 0. Raises ValueError if the two have different examples (lengths or weights) or transforms, and as
    `estimate` does.
    """
    score_a, weight = _arrays(ablated)
    score_b, weight_b = _arrays(baseline)
    if len(weight) != len(weight_b):
        raise ValueError(f"not the same examples: {len(weight)} ablated, {len(weight_b)} in the baseline")
    if not np.array_equal(weight, weight_b):
        raise ValueError("not the same examples: the weights of ablated and baseline differ")
    if ablated.transform != baseline.transform:
        raise ValueError(f"not the same metric: transforms {ablated.transform!r} and {baseline.transform!r}")
    inside = (weight != 0) | (score_a != 0) | (score_b != 0)
    score_a, score_b, weight, groups = score_a[inside], score_b[inside], weight[inside], _groups(ablated, inside)
    with np.errstate(invalid="ignore", over="ignore"):
        value_a, influence_a = _value_and_influence(score_a, weight, ablated.transform)
        value_b, influence_b = _value_and_influence(score_b, weight, baseline.transform)
        delta = value_a - value_b
        stderr = _stderr(influence_a - influence_b, groups, weight)
        tested, of_tested = delta, stderr
        if ablated.transform == "exp" and math.isfinite(delta):
            of_log = [_value_and_influence(score, weight, "identity") for score in (score_a, score_b)]
            tested = of_log[0][0] - of_log[1][0]
            of_tested = _stderr(of_log[0][1] - of_log[1][1], groups, weight)
    return Delta(delta, stderr, _p_value(tested, of_tested, _count(groups) - 1))


def difference_of_deltas(
    ablated_a: ExampleScores, baseline_a: ExampleScores, ablated_b: ExampleScores, baseline_b: ExampleScores
) -> Delta:
    """Return (ablated_b - baseline_b) - (ablated_a - baseline_a) over the same examples of two models a and b.

    The four scores of an example are one observation, so that the standard error contains neither what both models nor
    what both states of a model have in common. The p-value of a perplexity is computed for the logarithm of
    (ablated_b + baseline_a) / (ablated_a + baseline_b), which is zero exactly if the difference is. Raises ValueError
    as `paired` does.
    """
    signs = {1: (ablated_b, baseline_a), -1: (ablated_a, baseline_b)}
    every = [scores for pair in signs.values() for scores in pair]
    score, weights = zip(*(_arrays(scores) for scores in every))
    weight, transform = weights[0], ablated_b.transform
    if not all(np.array_equal(weight, other) for other in weights):
        raise ValueError("not the same examples: the numbers or the weights of the examples differ")
    if {scores.transform for scores in every} != {transform}:
        raise ValueError("not the same metric: the transforms differ")
    inside = (weight != 0) | np.any([one != 0 for one in score], axis=0)
    weight, groups = weight[inside], _groups(ablated_b, inside)
    with np.errstate(invalid="ignore", over="ignore"):
        values, influences = zip(*(_value_and_influence(one[inside], weight, transform) for one in score))
        plus, minus = values[0] + values[1], values[2] + values[3]
        of_plus, of_minus = influences[0] + influences[1], influences[2] + influences[3]
        delta, stderr = plus - minus, _stderr(of_plus - of_minus, groups, weight)
        tested, of_tested = delta, stderr
        if transform == "exp" and math.isfinite(delta):
            tested = math.log(plus / minus)
            of_tested = _stderr(of_plus / plus - of_minus / minus, groups, weight)
    return Delta(float(delta), stderr, _p_value(tested, of_tested, _count(groups) - 1))


@dataclass(frozen=True)
class Advantage:
    """By how much a model is better or worse than what a random control gives.

    delta: its metric minus the mean of those of the draws, in the metric's own unit. p_value: two-sided, of the
    hypothesis that the model is one more draw; that of a perplexity is that of its logarithm. spread: the standard
    deviation of the metrics of the draws. p_value and spread are None for fewer than two draws, and p_value is None for
    a single cluster.
    """

    delta: float
    p_value: float | None
    spread: float | None


def mean_stderr(values: np.ndarray, clusters: np.ndarray | None) -> tuple[float | None, int]:
    """Return the standard error of the mean of values, float64 [n], and the number of their clusters.

    clusters: as in ExampleScores. The standard error is None for a single cluster.
    """
    groups = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    return _stderr(values - values.mean(), groups, np.ones(len(values))), _count(groups)


def over_new_draw(model: ExampleScores, draws: Sequence[ExampleScores]) -> Advantage:
    """Compare a model with draws of a random control on the same examples, such that the result holds for a new draw.

    There are two sources of chance, the draws and the examples (Clark, Journal of Verbal Learning and Verbal Behavior
    12, 1973), and both are random effects. The metric of draw j is mu + b_j + e_j, where b_j has the variance tau^2 and
    e_j, the error from the examples, the variance w apart from what all draws have in common. Under the hypothesis the
    model is draw m + 1. Its metric minus the mean of the m draws then has the variance (tau^2 + w) (1 + 1/m), which is
    that of the prediction of a new draw (Higgins, Thompson and Spiegelhalter, JRSS-A 172, 2009). The sample variance
    s^2 of the draws' metrics estimates tau^2 + w, so that delta / (s sqrt(1 + 1/m)) has Student's t with m - 1 degrees
    of freedom (Crawford and Howell, The Clinical Neuropsychologist 12, 1998).

    Like that of `paired`, the p-value of a perplexity is computed for its logarithm, because perplexities of draws that
    harm a model may differ by orders of magnitude. p is 1 if the logarithm and the perplexity disagree about which of
    the model and the draws is better.

    The examples also give estimates: of w from the differences between the draws, and of the variance v of delta over
    examples. s^2 is taken to be at least w, and the part of v that exceeds w (1 + 1/m), because the model differs from
    the draws on more examples than they do from each other, is added. The degrees of freedom are then those of
    Satterthwaite (Biometrics 2, 1946). Where the draws differ by no more than their examples explain, p is larger than
    necessary.

    Raises ValueError as `paired` does, and if there are no draws.
    """
    if not draws:
        raise ValueError("there are no draws to compare with")
    pairs = [paired(model, draw) for draw in draws]
    delta, m = float(np.mean([pair.delta for pair in pairs])), len(draws)
    if m < 2:
        return Advantage(delta, None, None)
    spread = float(np.std([pair.delta for pair in pairs], ddof=1))
    weight = _arrays(model)[1]
    inside = np.any([(weight != 0) | (scores.score != 0) for scores in (model, *draws)], axis=0)
    weight, groups = weight[inside], _groups(model, inside)
    found = [_value_and_influence(scores.score[inside], weight, "identity") for scores in (model, *draws)]
    (own, own_influence), influences = found[0], [influence for _, influence in found[1:]]
    changes, mean = [own - value for value, _ in found[1:]], np.mean(influences, axis=0)
    advantage, variance = float(np.mean(changes)), float(np.std(changes, ddof=1)) ** 2
    of_delta = _stderr(own_influence - mean, groups, weight)
    if of_delta is None or math.isnan(delta):
        return Advantage(delta, None if of_delta is None else math.nan, spread)
    if advantage * delta < 0:
        return Advantage(delta, 1.0, spread)
    of_draws = sum((_stderr(psi - mean, groups, weight) or 0.0) ** 2 for psi in influences) / (m - 1)
    freedom = _count(groups) - 1
    between = max(variance, of_draws) * (1 + 1 / m)
    excess = max(of_delta**2 - of_draws * (1 + 1 / m), 0.0)
    parts = between**2 / (m - 1 if variance >= of_draws else freedom) + excess**2 / freedom
    satterthwaite = (between + excess) ** 2 / parts if parts else freedom
    return Advantage(delta, _p_value(advantage, math.sqrt(between + excess), satterthwaite), spread)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values that are adjusted for the family-wise error rate (Holm 1979), float64 [m], in the order given.

    A NaN stays NaN and does not count as a test. Raises ValueError for a p-value outside 0..1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(p))
    if p.ndim != 1 or np.any((p[tested] < 0) | (p[tested] > 1)):
        raise ValueError("p-values must be a vector of numbers in 0..1")
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def _arrays(scores: ExampleScores) -> tuple[np.ndarray, np.ndarray]:
    score = np.asarray(scores.score, dtype=np.float64)
    weight = np.asarray(scores.weight, dtype=np.float64)
    if score.ndim != 1 or score.shape != weight.shape:
        raise ValueError(f"score and weight must be vectors of one length, not {score.shape} and {weight.shape}")
    if not weight.sum() > 0:
        raise ValueError("the weights sum to nothing")
    return score, weight


def _value_and_influence(score: np.ndarray, weight: np.ndarray, transform: str) -> tuple[float, np.ndarray]:
    total = weight.sum()
    ratio = score.sum() / total
    if transform == "identity":
        value, slope = ratio, 1.0
    elif transform == "exp":
        value = slope = np.exp(ratio)
    else:
        raise ValueError(f"unknown transform {transform!r}: identity or exp")
    return float(value), slope * (score - ratio * weight) * (len(score) / total)


def _groups(scores: ExampleScores, inside: np.ndarray) -> np.ndarray:
    """Return the clusters of the examples that belong to a metric, numbered from 0 without gaps: int64 [n]."""
    if scores.clusters is None:
        return np.arange(int(inside.sum()))
    return np.unique(scores.clusters[inside], return_inverse=True)[1]


def _count(groups: np.ndarray) -> int:
    return int(groups.max()) + 1 if len(groups) else 0


def _stderr(influence: np.ndarray, groups: np.ndarray, weight: np.ndarray) -> float | None:
    n, count = len(influence), _count(groups)
    if count < 2:
        return None
    if count == n:
        return float(np.sqrt(np.square(influence).sum() / (n - 1) / n))
    left = 1 - np.bincount(groups, weight) / weight.sum()
    totals = np.bincount(groups, influence) / left
    return float(np.sqrt(np.square(totals).sum() * (count - 1) / count) / n)


def _p_value(delta: float, stderr: float | None, freedom: float) -> float | None:
    if stderr is None:
        return None
    if math.isnan(delta) or math.isnan(stderr):
        return math.nan
    if stderr == 0:
        return 1.0 if delta == 0 else 0.0
    from scipy.special import stdtr  # what scipy.stats.t.sf calls, without its seconds of import

    return float(2 * stdtr(freedom, -abs(delta / stderr)))
