"""Metrics with standard errors, paired differences, and the correction for having tried many cells.

A metric is g(R), where R = sum(s) / sum(w) over the examples with scores s and weights w, and g is the identity or exp.
Its standard error is that of the delta method. The influence of example i is psi_i = g'(R) (s_i - R w_i) n / sum(w).
The influences sum to zero, and the standard error is their sample standard deviation over sqrt(n). For a mean (w = 1)
this is the usual standard error of the mean, and `paired` is the paired t-test. For ratio estimators see Cochran,
Sampling Techniques, 3rd ed., chapter 6; the influences are those of the infinitesimal jackknife of Jaeckel (1972).

Standard errors and p-values are over clusters of examples that depend on each other (see `clustering`).

The p-value of the difference of a perplexity is computed for the difference of its logarithm, which is zero if that of
the perplexity is. The delta method is too coarse where an ablation destroys a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from harness.evaluation.clustering import Clusters, changes_are_equal, t_test
from harness.evaluation.counts import are_counts, mcnemar_interval
from harness.evaluation.requests import ExampleScores

# The cells of a task have the same clusters, which take longer to find than everything else of a row. Those of so many
# metrics are kept, if they are not larger than this.
KEPT_CLUSTERS = 16
LARGEST_KEPT = 100_000  # examples
_DIRECTIONS = np.linspace(0, 2 * np.pi, 1441)  # steps of a quarter of a degree, which miss an extremum by 5e-6 at most


@dataclass(frozen=True)
class Estimate:
    """A metric: its value, its standard error in the same unit (None for a single cluster), and its n examples.

    n_clusters: the number of clusters of the examples, which is n if all examples are independent. freedom: the degrees
    of freedom of the standard error, None for fewer than three clusters.
    """

    value: float
    stderr: float | None
    n: int
    n_clusters: int
    freedom: float | None


@dataclass(frozen=True)
class Delta:
    """The difference of a metric between two models on the same examples.

    delta: ablated - baseline, in the metric's own unit. stderr: its standard error from the paired differences, in the
    same unit, with so many degrees of freedom. p_value: two-sided, of Student's t, or exact for a count; never 0. The
    standard error is None for a single cluster, the other two are None for fewer than three.
    """

    delta: float
    stderr: float | None
    p_value: float | None
    freedom: float | None


def estimate(scores: ExampleScores) -> Estimate:
    """Return a metric and its standard error.

    Examples with zero weight and zero score do not belong to the metric and are not counted in n. Scores that are not
    finite give a value that is not finite. Raises ValueError for arrays of different lengths, weights whose sum is not
    positive, and an unknown transform.
    """
    score, weight = _arrays(scores)
    inside = (weight != 0) | (score != 0)
    score, weight = score[inside], weight[inside]
    clusters = _clusters(scores, inside)
    with np.errstate(invalid="ignore", over="ignore"):
        value, influence = _value_and_influence(score, weight, scores.transform)
        return Estimate(value, clusters.stderr(influence), len(score), clusters.count, clusters.freedom)


def paired(ablated: ExampleScores, baseline: ExampleScores) -> Delta:
    """Return ablated - baseline over the same examples, with the standard error of the pairs and a p-value.

    If no example differs, p is 1. Raises ValueError if the two have different examples (lengths or weights) or
    transforms, and as `estimate` does.
    """
    score_a, score_b, weight, clusters = _pairs(ablated, baseline)
    with np.errstate(invalid="ignore", over="ignore"):
        value_a, influence_a = _value_and_influence(score_a, weight, ablated.transform)
        value_b, influence_b = _value_and_influence(score_b, weight, baseline.transform)
        delta = value_a - value_b
        stderr = clusters.stderr(influence_a - influence_b)
        if ablated.transform == "exp" and math.isfinite(delta):
            of_log = [_value_and_influence(score, weight, "identity") for score in (score_a, score_b)]
            p_value = clusters.p_value(of_log[0][0] - of_log[1][0], clusters.stderr(of_log[0][1] - of_log[1][1]))
        else:
            p_value = clusters.p_value(delta, stderr, score_a - score_b)
    return Delta(delta, stderr, p_value, clusters.freedom)


def paired_interval(
    ablated: ExampleScores, baseline: ExampleScores, confidence: float, found: Delta | None = None
) -> tuple[float, float]:
    """Return the ends of the confidence interval of ablated - baseline, in the metric's own unit.

    found: what `paired` returns for these scores, if the caller has it.

    It is exact for an accuracy over independent questions, that is if every score is 0 or 1, every weight is 1, and
    every example is its own cluster; it then contains zero exactly if the p-value of `paired` is not below
    1 - confidence. So does that of a perplexity, see `_perplexity_interval`. Otherwise it is the delta and t times its
    standard error. For other counts, whose changes are whole numbers, it is wider where few clusters change: as in the
    score interval of Wilson (Journal of the American Statistical Association 22, 1927), the variance is that of t^2
    more clusters with a change of the usual size (of one answer if none changed). The ends are NaN for fewer than three
    clusters. Raises ValueError as `paired` does.
    """
    score_a, score_b, weight, clusters = _pairs(ablated, baseline)
    n, changes = len(weight), score_a - score_b
    right_or_wrong = all(np.isin(array, (0.0, 1.0)).all() for array in (score_a, score_b))
    if clusters.count == n > 1 and right_or_wrong and (weight == 1).all() and ablated.transform == "identity":
        return mcnemar_interval(int((changes > 0).sum()), int((changes < 0).sum()), n, confidence)
    found = paired(ablated, baseline) if found is None else found
    if found.stderr is None or found.freedom is None:
        return math.nan, math.nan
    from scipy.special import stdtrit  # what scipy.stats.t.ppf calls, without its seconds of import

    t, variance = float(stdtrit(found.freedom, (1 + confidence) / 2)), found.stderr**2
    if ablated.transform == "exp":
        return _perplexity_interval(score_a, score_b, weight, clusters, t)
    if are_counts(changes):
        totals = np.bincount(clusters.groups, changes)
        size = float(np.mean(np.square(totals[totals != 0]))) if totals.any() else 1.0
        variance += t**2 * size / float(weight.sum()) ** 2
    half = t * math.sqrt(variance)
    return found.delta - half, found.delta + half


def _perplexity_interval(
    score_a: np.ndarray, score_b: np.ndarray, weight: np.ndarray, clusters: Clusters, t: float
) -> tuple[float, float]:
    """Return the ends of the interval of exp(a) - exp(b), where a and b are the means of two scores.

    The delta method takes this difference for a straight line. Where examples are few and their log-probabilities
    differ much, as those of LAMBADA's last words do, perplexities are far from normal, while the means a and b are
    nearly so. The difference is exp(b) (exp(a - b) - 1), and the interval is its range over the ellipse of all b and
    a - b that are at most t standard errors from those measured, in any direction. For a straight line this is the
    interval of the delta method. The sign of the difference is that of a - b, which ranges over its own interval of
    Student's t. So one contains zero exactly if the other does.
    """
    b, influence_b = _value_and_influence(score_b, weight, "identity")
    a, influence_a = _value_and_influence(score_a, weight, "identity")
    errors = (clusters.stderr(psi) or 0.0 for psi in (influence_a, influence_b, influence_a - influence_b))
    of_a, of_b, of_change = errors
    product = of_b * of_change
    correlation = float(np.clip((of_a**2 - of_b**2 - of_change**2) / (2 * product), -1, 1)) if product > 0 else 0.0
    change, other = np.cos(_DIRECTIONS), np.sin(_DIRECTIONS)
    level = b + t * of_b * (correlation * change + math.sqrt(1 - correlation**2) * other)
    with np.errstate(over="ignore", invalid="ignore"):
        differences = np.exp(level) * np.expm1(a - b + t * of_change * change)
    return float(differences.min()), float(differences.max())


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
    weight, clusters = weight[inside], _clusters(ablated_b, inside)
    with np.errstate(invalid="ignore", over="ignore"):
        values, influences = zip(*(_value_and_influence(one[inside], weight, transform) for one in score))
        plus, minus = values[0] + values[1], values[2] + values[3]
        of_plus, of_minus = influences[0] + influences[1], influences[2] + influences[3]
        delta, stderr = float(plus - minus), clusters.stderr(of_plus - of_minus)
        if transform == "exp" and math.isfinite(delta):
            p_value = clusters.p_value(math.log(plus / minus), clusters.stderr(of_plus / plus - of_minus / minus))
        else:
            changes = score[0][inside] + score[1][inside] - score[2][inside] - score[3][inside]
            p_value = clusters.p_value(delta, stderr, changes)
    return Delta(delta, stderr, p_value, clusters.freedom)


@dataclass(frozen=True)
class Advantage:
    """By how much a model is better or worse than what a random control gives.

    delta: its metric minus the mean of those of the draws, in the metric's own unit. p_value: two-sided, of the
    hypothesis that the model is one more draw; that of a perplexity is that of its logarithm. spread: the standard
    deviation of the metrics of the draws. p_value and spread are None for fewer than two draws, and p_value is None for
    fewer than three clusters.
    """

    delta: float
    p_value: float | None
    spread: float | None


def mean_stderr(values: np.ndarray, clusters: np.ndarray | None) -> tuple[float | None, int, float | None]:
    """Return the standard error of the mean of values, float64 [n], the number of clusters, and degrees of freedom.

    clusters: as in ExampleScores. The standard error is None for a single cluster, its degrees of freedom for
    fewer than three.
    """
    groups = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    of = Clusters(groups, np.ones(len(values)))
    return of.stderr(values - values.mean()), of.count, of.freedom


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
    Satterthwaite (Biometrics 2, 1946), with m - 1 for the draws also where w is taken: it is taken just where s^2 came
    out too small, and that does not make tau^2 better known. (With the degrees of freedom of the examples instead,
    three draws had p < 0.01 in 3 % of the cases, see experiments/calibration.) Where the draws differ by no more than
    their examples explain, p is larger than necessary. If neither draws nor examples differ, but the model does, p is
    2 / (m + 1), that of its rank.

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
    weight, clusters = weight[inside], _clusters(model, inside)
    found = [_value_and_influence(scores.score[inside], weight, "identity") for scores in (model, *draws)]
    (own, own_influence), influences = found[0], [influence for _, influence in found[1:]]
    changes, mean = [own - value for value, _ in found[1:]], np.mean(influences, axis=0)
    advantage, variance = float(np.mean(changes)), float(np.std(changes, ddof=1)) ** 2
    of_delta, freedom = clusters.stderr(own_influence - mean), clusters.freedom
    if of_delta is None or freedom is None or math.isnan(delta):
        return Advantage(delta, None if freedom is None else math.nan, spread)
    if advantage * delta < 0:
        return Advantage(delta, 1.0, spread)
    of_draws = sum((clusters.stderr(psi - mean) or 0.0) ** 2 for psi in influences) / (m - 1)
    between = max(variance, of_draws) * (1 + 1 / m)
    excess = max(of_delta**2 - of_draws * (1 + 1 / m), 0.0)
    if changes_are_equal(advantage, math.sqrt(between + excess)):
        return Advantage(delta, 2 / (m + 1), spread)
    parts = between**2 / (m - 1) + excess**2 / freedom
    satterthwaite = (between + excess) ** 2 / parts if parts else freedom
    return Advantage(delta, t_test(advantage, math.sqrt(between + excess), satterthwaite), spread)


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


def _pairs(
    ablated: ExampleScores, baseline: ExampleScores
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Clusters]:
    """Return the scores of both, the weights and the clusters of the examples that belong to the metric."""
    score_a, weight = _arrays(ablated)
    score_b, weight_b = _arrays(baseline)
    if len(weight) != len(weight_b):
        raise ValueError(f"not the same examples: {len(weight)} ablated, {len(weight_b)} in the baseline")
    if not np.array_equal(weight, weight_b):
        raise ValueError("not the same examples: the weights of ablated and baseline differ")
    if ablated.transform != baseline.transform:
        raise ValueError(f"not the same metric: transforms {ablated.transform!r} and {baseline.transform!r}")
    inside = (weight != 0) | (score_a != 0) | (score_b != 0)
    return score_a[inside], score_b[inside], weight[inside], _clusters(ablated, inside)


def _clusters(scores: ExampleScores, inside: np.ndarray) -> Clusters:
    """Return the clusters of the examples that belong to a metric. inside: bool [n], which these are."""
    weight = np.asarray(scores.weight, dtype=np.float64)[inside]
    clusters = None if scores.clusters is None else np.asarray(scores.clusters, dtype=np.int64)[inside]
    if len(weight) > LARGEST_KEPT:
        return _clusters_of(clusters, weight)
    return _kept_clusters(None if clusters is None else clusters.tobytes(), weight.tobytes())


@lru_cache(KEPT_CLUSTERS)
def _kept_clusters(clusters: bytes | None, weight: bytes) -> Clusters:
    """Return the clusters whose numbers, int64 [n], and weights, float64 [n], have these bytes."""
    return _clusters_of(None if clusters is None else np.frombuffer(clusters, np.int64), np.frombuffer(weight))


def _clusters_of(clusters: np.ndarray | None, weight: np.ndarray) -> Clusters:
    groups = np.arange(len(weight)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    return Clusters(groups, weight)
