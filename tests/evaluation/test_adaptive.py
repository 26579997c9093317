"""Adaptive precision: the order of drawing, when a cell stops, and that what it says holds for all examples."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.evaluation.adaptive import Sampler, decided, draw, measure_sampled, score_all
from harness.evaluation.requests import ExampleScores, Request, ScoredTask, Scores
from harness.evaluation.sequential import Interval
from harness.evaluation.settings import AdaptiveSettings
from harness.evaluation.statistics import estimate, paired

SIZE = 400


def _windows(seed=0):
    """A text task with windows of unequal length; request i is example i."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 20, SIZE)
    requests = [Request(np.zeros(n, np.int64), np.arange(n), np.zeros(n, np.int64)) for n in lengths]

    def measure(scores):
        nll = -scores.request_logprob()
        return {"perplexity": ExampleScores(nll, lengths.astype(float), "exp", higher_is_better=False),
                "nll": ExampleScores(nll, lengths.astype(float), higher_is_better=False)}

    return ScoredTask("text", {}, requests, [str(i) for i in range(SIZE)], measure)


def _choices():
    """Three choices per question, the first is right; the requests of a question lie far apart."""
    requests = [Request(np.zeros(7, np.int64), np.array([6]), np.array([0])) for _ in range(3 * SIZE)]
    example_of = np.tile(np.arange(SIZE), 3)

    def measure(scores):
        logprob = scores.request_logprob().reshape(3, SIZE)
        return {"accuracy": ExampleScores((logprob.argmax(0) == 0).astype(float), np.ones(SIZE), bounds=(0.0, 1.0)),
                "logprob": ExampleScores(logprob[0], np.ones(SIZE))}

    return ScoredTask("choices", {}, requests, [str(i) for i in range(SIZE)], measure, example_of=example_of)


def _scores(task, seed, shift, noise):
    """What a model would answer: a baseline of its own for each request, moved by an ablation."""
    lengths = [len(request.targets) for request in task.requests]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    base = np.random.default_rng(99).normal(-3, 1, len(lengths))
    rng = np.random.default_rng(seed)
    moved = base + shift * rng.gamma(2, 0.5, len(lengths)) + noise * rng.normal(0, 1, len(lengths))
    logprob = np.repeat(moved, lengths)
    return Scores(logprob, logprob > -2, None, offsets)


def _scorer(task, draws, scores):
    """What the scorer is to the sampler; and how often it was called."""
    calls = []

    def score(name):
        i = [group.name for group in draws.tasks].index(name)
        calls.append(i)
        members = draws.requests[i]
        parts = [slice(scores.offsets[j], scores.offsets[j + 1]) for j in members]
        sizes = [part.stop - part.start for part in parts]
        return Scores(np.concatenate([scores.logprob[part] for part in parts]),
                      np.concatenate([scores.greedy[part] for part in parts]), None,
                      np.concatenate([[0], np.cumsum(sizes)]))

    return score, calls


@pytest.mark.parametrize("task", [_windows(), _choices()], ids=["text", "choices"])
def test_draws_are_a_seeded_partition_with_whole_examples(task):
    draws = draw(task, 100, seed=1)
    assert sorted(np.concatenate(draws.examples)) == list(range(SIZE))
    assert sorted(np.concatenate(draws.requests)) == list(range(len(task.requests)))
    owner, before = np.arange(SIZE) if task.example_of is None else task.example_of, 0
    for examples, requests, group in zip(draws.examples, draws.requests, draws.tasks):
        assert set(owner[requests]) == set(examples)
        assert len(group.requests) == len(requests)
        # a question's choices are the same tokens here, and count once
        fed = sum(len(request.tokens) for request in group.requests) / (1 if task.example_of is None else 3)
        # a later group is a tenth of what was drawn before it
        assert fed <= 100 or len(examples) <= max(1, 0.1 * before + 1)
        assert fed > 70 or group is draws.tasks[-1]
        before += len(examples)
    order = np.concatenate(draws.examples)
    assert np.array_equal(order, np.concatenate(draw(task, 3000, seed=1).examples))
    assert not np.array_equal(order, np.concatenate(draw(task, 100, seed=2).examples))
    # neither the order as a whole nor that within a group is the file's
    assert abs(stats.spearmanr(order, np.arange(SIZE)).statistic) < 0.2
    assert any(np.any(np.diff(examples) < 0) for examples in draws.examples)


def test_a_shared_context_counts_once():
    context = list(range(100, 190))
    requests = [Request(np.array([*context, choice, *range(choice)]), np.array([89]), np.array([choice]))
                for choice in (3, 4, 5) for _ in range(2)]
    task = ScoredTask("choices", {}, requests, ["a", "b"], None, example_of=np.array([0, 1, 0, 1, 0, 1]))
    # 90 + 4 + 5 + 6 tokens each
    assert [len(draw(task, limit, 0).tasks) for limit in (210, 209)] == [1, 2]


def test_a_task_that_does_not_say_whose_its_requests_are_is_refused():
    task = _choices()
    unknown = ScoredTask("choices", {}, task.requests, task.example_ids, task.measure)
    with pytest.raises(ValueError, match="1200 requests for 400 known examples"):
        draw(unknown, 100, 0)


@pytest.mark.parametrize("task", [_windows(), _choices()], ids=["text", "choices"])
def test_an_undecided_cell_ends_with_the_numbers_of_exact(task):
    baseline, ablated = _scores(task, 1, 0, 0), _scores(task, 2, -0.1, 0.2)
    draws = draw(task, 500, seed=0)
    everything = score_all(draws, _scorer(task, draws, ablated)[0])
    assert np.array_equal(everything.logprob, ablated.logprob)
    settings = AdaptiveSettings(relative=1e-9, of_baseline=None)
    score, calls = _scorer(task, draws, ablated)
    found = measure_sampled(draws, score, baseline, settings)
    assert calls == list(range(len(draws.tasks)))
    for name, scores in task.measure(ablated).items():
        delta, value = paired(scores, task.measure(baseline)[name]), estimate(scores)
        metric = found.metrics[name]
        assert (metric.value, metric.stderr, metric.n) == (value.value, value.stderr, SIZE)
        assert (metric.delta, metric.delta_stderr, metric.low, metric.high) == (
            delta.delta, delta.stderr, delta.delta, delta.delta)
        assert np.array_equal(found.scores[name].score, scores.score)


@pytest.mark.parametrize(("make", "settings"), [
    (_windows, AdaptiveSettings(relative=0.2, of_baseline=0.05)),
    (_windows, AdaptiveSettings(relative=None, of_baseline=None, sign=True)),
    (_choices, AdaptiveSettings(relative=None, of_baseline=None, absolute=0.06)),
], ids=["text", "sign", "choices"])
def test_stopped_intervals_hold_the_delta_of_all_examples(make, settings):
    """Over many cells and seeds, with every metric of the task, at the stated rate; and precision is as asked."""
    task, n, missed, used = make(), 200, {}, []
    reference = task.measure(_scores(task, 1, 0, 0))
    primary = next(iter(reference))
    for seed in range(n):
        ablated = _scores(task, 1000 + seed, -0.03 - 0.15 * (seed % 5), 0.1)
        draws = draw(task, 200, seed)
        found = measure_sampled(draws, _scorer(task, draws, ablated)[0], _scores(task, 1, 0, 0), settings)
        used.append(len(found.used))
        for name, scores in task.measure(ablated).items():
            metric, truth = found.metrics[name], paired(scores, reference[name]).delta
            missed[name] = missed.get(name, 0) + (not metric.low <= truth <= metric.high)
        metric = found.metrics[primary]
        interval = Interval(metric.delta, metric.low, metric.high, 0)
        assert used[-1] == SIZE or decided(interval, metric.baseline, settings)
        assert metric.baseline == estimate(reference[primary]).value
    most = stats.binom.ppf(0.9985, n, 0.05)
    assert all(count <= most for count in missed.values()), missed
    assert np.median(used) < SIZE / 2


def test_standard_errors_are_of_all_examples_as_a_sample():
    """Double sampling: the mean of squared standard errors is the variance over populations and orders."""
    deltas, errors, values, value_errors = [], [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        base = rng.normal(3, 1, SIZE)
        ablated = base + 0.3 + rng.normal(0, 0.5, SIZE)
        requests = [Request(np.zeros(5, np.int64), np.array([4]), np.array([0]))] * SIZE
        task = ScoredTask("mean", {}, requests, [str(i) for i in range(SIZE)],
                            lambda scores: {"mean": ExampleScores(scores.request_logprob(), np.ones(SIZE))})
        as_scores = [Scores(x, x > 0, None, np.arange(SIZE + 1)) for x in (base, ablated)]
        draws = draw(task, 250, seed)
        found = measure_sampled(draws, _scorer(task, draws, as_scores[1])[0], as_scores[0],
                                AdaptiveSettings(relative=None, of_baseline=None, absolute=0.2))
        metric = found.metrics["mean"]
        assert metric.n == 100 or metric.n == 50
        deltas.append(metric.delta - 0.3)
        errors.append(metric.delta_stderr)
        values.append(metric.value - 3.3)
        value_errors.append(metric.stderr)
    for found, stated in ((deltas, errors), (values, value_errors)):
        ratio = np.mean(np.square(found)) / np.mean(np.square(stated))
        assert stats.chi2.ppf(0.001, 300) / 300 < ratio < stats.chi2.ppf(0.999, 300) / 300


def test_a_group_is_not_scored_once_the_delta_is_decided():
    task = _windows()
    draws = draw(task, 200, 0)
    score, calls = _scorer(task, draws, _scores(task, 5, -0.5, 0.02))
    found = measure_sampled(draws, score, _scores(task, 1, 0, 0), AdaptiveSettings(relative=0.5, min_examples=40))
    assert calls == list(range(len(calls))) and len(calls) < len(draws.tasks)
    assert 40 <= len(found.used) == sum(len(draws.examples[i]) for i in calls)
    assert np.array_equal(found.used, np.sort(np.concatenate([draws.examples[i] for i in calls])))


def test_no_difference_anywhere_is_not_taken_for_no_difference_at_all():
    """An ablation that moved nothing so far may move what was not drawn: only a known range allows to stop."""
    text, choices = _windows(), _choices()
    for task, stops in ((text, False), (choices, True)):
        same = _scores(task, 1, 0, 0)
        draws = draw(task, 200, 0)
        found = measure_sampled(draws, _scorer(task, draws, same)[0], same,
                                AdaptiveSettings(relative=None, of_baseline=None, absolute=0.1))
        assert (len(found.used) < SIZE) == stops
        assert found.metrics[next(iter(found.metrics))].p_value == 1


def test_sampler_needs_and_keeps_the_baseline():
    task = _windows()
    sampler = Sampler({"text": task}, AdaptiveSettings(), batch_tokens=200, seed=3)
    groups = sampler.groups(["text"])
    assert list(groups)[:2] == ["text#0", "text#1"]
    draws = draw(task, 200, 3)
    baseline = _scores(task, 1, 0, 0)
    found = sampler.measure_baseline("text", _scorer(task, draws, baseline)[0])
    assert np.array_equal(found["nll"].score, task.measure(baseline)["nll"].score)
    sampled = sampler.measure("text", _scorer(task, draws, _scores(task, 5, -0.5, 0.02))[0])
    assert sampled.metrics["nll"].n < SIZE and math.isfinite(sampled.metrics["nll"].low)
