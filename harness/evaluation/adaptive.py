"""Adaptive precision: measure a cell on as many examples as its precision needs.

The baseline is measured once on every example, so that its metrics are known exactly for this set of examples. An
ablated model is then scored on one group of examples after the other, in a fixed random order. After each group its
delta over the whole set is estimated from the differences of the examples that were drawn so far (see `sequential`).
Examples are drawn one by one and not by clusters: the interval is that of the delta over this set of examples, and its
chance is only that of the order, so that it does not matter whether neighbouring examples are alike. The p-value and
the standard errors are for other examples than these. They are over clusters.

Let s be the scores of the N examples and w their weights, which do not depend on the model, with the sum W. A metric is
R = sum(s) / W, and its delta is the mean over the set of N (s_ablated - s_baseline) / W. A perplexity is exp(R): its
delta is exp(R_baseline) (exp(delta of R) - 1). This function is monotone, so that it maps the ends of the interval of
the one delta to those of the other, with the same confidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from harness.evaluation.draws import Draws, draw
from harness.evaluation.requests import ExampleScores, ScoredTask, Scores
from harness.evaluation.sequential import Interval, bounded_mean_interval, mean_interval, zero_mean_evidence
from harness.evaluation.settings import AdaptiveSettings
from harness.evaluation.statistics import estimate, mean_stderr, paired


@dataclass(frozen=True)
class SampledMetric:
    """A metric over the whole set of examples, estimated from n of its n_available examples.

    value, baseline, delta: in the metric's own unit. stderr, delta_stderr: standard errors in the same unit, for the
        set as a sample of a larger population, as in `statistics`; they are larger the more examples were not drawn.
        None for a single cluster.
    low, high: the interval of the delta of the whole set, which is valid whenever one stops; infinite if nothing can
        be said yet. p_value: for the hypothesis delta = 0, also valid whenever one stops.
    n_clusters: the number of clusters of the n examples, as in Estimate.
    """

    value: float
    stderr: float | None
    baseline: float
    delta: float
    delta_stderr: float | None
    low: float
    high: float
    p_value: float
    n: int
    n_clusters: int
    n_available: int


@dataclass(frozen=True)
class Sampled:
    """The result of an adaptive cell.

    used: int64 [n], the indices of the examples that were scored, in ascending order. scores: metric -> the scores of
    these examples. metrics: metric -> its estimate; a metric is absent if none of its examples was drawn, which happens
    in a small part of a task that is made of parts.
    """

    used: np.ndarray
    scores: dict[str, ExampleScores]
    metrics: dict[str, SampledMetric]


def score_all(draws: Draws, score: Callable[[str], Scores]) -> Scores:
    """Score every request of the task, group by group.

    score: a function from the name of a group's task to its Scores.
    """
    filled = _empty(draws.task)
    for members, group in zip(draws.requests, draws.tasks):
        _fill(filled, members, score(group.name))
    return filled


def measure_sampled(
    draws: Draws, score: Callable[[str], Scores], baseline: Scores, settings: AdaptiveSettings
) -> Sampled:
    """Score one group after the other until the delta of the first metric is decided, or no group is left.

    score: as in `score_all`. baseline: the result of `score_all` for the unedited model. Examples that have not been
    scored keep the scores of the baseline, so that the task's `measure` has a number for each; their results are not
    read.
    """
    task = draws.task
    reference = task.measure(baseline)
    primary = next(iter(reference))
    value = estimate(reference[primary]).value
    drawn, evidence = np.empty(0, dtype=np.int64), dict.fromkeys(reference, 1.0)
    rank = None if baseline.rank is None else baseline.rank.copy()
    filled = Scores(baseline.logprob.copy(), baseline.greedy.copy(), rank, baseline.offsets)
    for number, (examples, members, group) in enumerate(zip(draws.examples, draws.requests, draws.tasks)):
        _fill(filled, members, score(group.name))
        drawn = np.concatenate([drawn, examples])
        last = number == len(draws.tasks) - 1
        if not last and len(drawn) < settings.min_examples:
            continue
        found = task.measure(filled)
        for name, found_now in _evidence(found, reference, drawn, settings.confidence).items():
            evidence[name] = max(evidence[name], found_now)
        if last or decided(
            delta_interval(found[primary], reference[primary], drawn, settings.confidence), value, settings
        ):
            break
    used = np.sort(drawn)
    metrics = {
        name: sampled_metric(found[name], reference[name], drawn, settings.confidence, 1 / evidence[name])
        for name in reference
        if _inside(reference[name])[drawn].any()
    }
    scores = {name: scores.at(used) for name, scores in found.items()}
    return Sampled(used, scores, metrics)


def _evidence(
    ablated: Mapping[str, ExampleScores], baseline: Mapping[str, ExampleScores], drawn: np.ndarray, confidence: float
) -> dict[str, float]:
    """Return for each metric the evidence against a delta of zero from the examples that were drawn.

    Metrics that share their arrays, such as the perplexities per token, word and byte, are tested once.
    """
    tested: dict[tuple[int, ...], float] = {}
    evidence = {}
    for name, scores in ablated.items():
        reference = baseline[name]
        key = id(scores.score), id(reference.score), id(reference.clusters)
        if key not in tested:
            clusters = None if reference.clusters is None else reference.clusters[drawn]
            tested[key] = zero_mean_evidence(scores.score[drawn] - reference.score[drawn], confidence, clusters)
        evidence[name] = tested[key]
    return evidence


class Sampler:
    """The draws of the tasks of a study and, once they are measured, the baselines of these tasks."""

    def __init__(
        self, tasks: Mapping[str, ScoredTask], settings: AdaptiveSettings, batch_tokens: int, seed: int
    ) -> None:
        self._settings, self._tasks = settings, dict(tasks)
        self._draws = {name: draw(task, batch_tokens, seed) for name, task in tasks.items() if not task.whole}
        self._baselines: dict[str, Scores] = {}

    def draws(self, task: str) -> bool:
        """Return whether a task may be measured on a part of its examples. A task that is `whole` may not."""
        return task in self._draws

    def groups(self, tasks: Iterable[str]) -> dict[str, ScoredTask]:
        """Return the tasks that the scorer needs for some tasks: their groups, or the task itself if it is `whole`."""
        known = (self._draws[name].tasks if self.draws(name) else (self._tasks[name],) for name in tasks)
        return {task.name: task for of_task in known for task in of_task}

    def measure_baseline(self, task: str, score: Callable[[str], Scores]) -> dict[str, ExampleScores]:
        """Score every example of a task, and keep the scores as its baseline. score: as in `score_all`."""
        self._baselines[task] = score_all(self._draws[task], score)
        return self._draws[task].task.measure(self._baselines[task])

    def measure(self, task: str, score: Callable[[str], Scores]) -> Sampled:
        """Measure a task on as many examples as it takes, after `measure_baseline`. score: as in `score_all`."""
        return measure_sampled(self._draws[task], score, self._baselines[task], self._settings)


def decided(interval: Interval, baseline: float, settings: AdaptiveSettings) -> bool:
    """Return whether the interval of a delta is narrow enough to stop, or is on one side of zero if `sign` is set.

    baseline: the value of the metric under the unedited model. interval, baseline: in the metric's own unit.
    """
    if settings.sign and (interval.low > 0 or interval.high < 0):
        return True
    allowed = max(
        settings.absolute or 0.0,
        (settings.relative or 0.0) * abs(interval.estimate),
        (settings.of_baseline or 0.0) * abs(baseline),
    )
    # if nothing is allowed nothing is decided, even for an interval of width zero
    return (interval.high - interval.low) / 2 <= allowed if allowed > 0 else False


def delta_interval(ablated: ExampleScores, baseline: ExampleScores, drawn: np.ndarray, confidence: float) -> Interval:
    """Estimate the delta over the whole set, in the metric's own unit.

    drawn: int64 [n], the indices of the examples in the order of drawing. `ablated` is read at these indices only,
    `baseline` everywhere.
    """
    inside = _inside(baseline)
    drawn = drawn[inside[drawn]]
    population, total = int(inside.sum()), float(baseline.weight.sum())
    ratio = float(baseline.score.sum()) / total
    scale = population / total
    change = (ablated.score[drawn] - baseline.score[drawn]) * scale
    if baseline.bounds is not None:
        reach = (baseline.bounds[1] - baseline.bounds[0]) * scale * float(baseline.weight.max())
        found = bounded_mean_interval(change, population, confidence, -reach, reach)
    else:
        weight = baseline.weight[drawn]
        known = np.stack([(baseline.score[drawn] - ratio * weight) * scale, weight * scale - 1], axis=1)
        found = mean_interval(change, population, confidence, known)
    if baseline.transform == "identity":
        return found
    # a perplexity that is too large for float64 is infinite, as in `statistics`; its row is then an error row
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.exp(ratio)
        delta, low, high = (float(value * np.expm1(x)) for x in (found.estimate, found.low, found.high))
        return Interval(delta, low, high, float(value * np.exp(found.estimate) * found.spread))


def sampled_metric(
    ablated: ExampleScores, baseline: ExampleScores, drawn: np.ndarray, confidence: float, p_value: float
) -> SampledMetric:
    """Return the metric of an adaptive cell. If every example was drawn, these are the numbers of `statistics`.

    drawn: as in `delta_interval`. The standard errors are those of double sampling with a difference estimator
    (Cochran, Sampling Techniques, 3rd ed., section 12.6). They have two parts: the spread over the examples of the
    whole set, and the uncertainty from the examples that were not drawn.
    """
    inside = _inside(baseline)
    population, reference = int(inside.sum()), estimate(baseline).value
    drawn = drawn[inside[drawn]]
    n = len(drawn)
    if n == population:
        whole, pair = estimate(ablated), paired(ablated, baseline)
        return SampledMetric(
            whole.value, whole.stderr, reference, pair.delta, pair.stderr, pair.delta, pair.delta, p_value, n,
            whole.n_clusters, n,
        )
    interval = delta_interval(ablated, baseline, drawn, confidence)
    value = reference + interval.estimate
    total = float(baseline.weight.sum())
    slopes = (value, reference) if baseline.transform == "exp" else (1.0, 1.0)
    influence = []
    for scores, slope in zip((ablated, baseline), slopes):
        score, weight = scores.score[drawn], scores.weight[drawn]
        ratio = float(score.sum()) / float(weight.sum()) if weight.sum() else 0.0
        influence.append(slope * (score - ratio * weight) * population / total)
    clusters, missed = baseline.at(drawn).clusters, 1 / n - 1 / population
    errors: list[float | None] = []
    for psi in (influence[0], influence[0] - influence[1]):
        of_sample, groups, _ = mean_stderr(psi, clusters)
        if of_sample is None:
            errors.append(None)
            continue
        # Only the spread within clusters becomes smaller from the sample to the whole set, which has the same clusters.
        variance = float(psi.var(ddof=1))
        of_set = max(of_sample**2 - missed * variance, variance / population)
        errors.append(math.sqrt(of_set + missed * interval.spread**2))
    stderr, delta_stderr = errors
    return SampledMetric(
        value, stderr, reference, interval.estimate, delta_stderr, interval.low, interval.high, p_value, n, groups,
        population,
    )


def _inside(baseline: ExampleScores) -> np.ndarray:
    return (baseline.weight != 0) | (baseline.score != 0)


def _empty(task: ScoredTask) -> Scores:
    offsets = np.zeros(len(task.requests) + 1, dtype=np.int64)
    np.cumsum([len(request.targets) for request in task.requests], out=offsets[1:])
    n = int(offsets[-1])
    rank = np.zeros(n, dtype=np.int64) if task.needs_rank else None
    return Scores(np.zeros(n), np.zeros(n, dtype=bool), rank, offsets)


def _fill(scores: Scores, members: np.ndarray, group: Scores) -> None:
    """Overwrite the answers to the requests `members` by those of a group."""
    starts, lengths = scores.offsets[members], np.diff(scores.offsets)[members]
    entries = np.repeat(starts - group.offsets[:-1], lengths) + np.arange(len(group.logprob))
    scores.logprob[entries] = group.logprob
    scores.greedy[entries] = group.greedy
    if scores.rank is not None and group.rank is not None:
        scores.rank[entries] = group.rank
