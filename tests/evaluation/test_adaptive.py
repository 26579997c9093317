"""Adaptive precision: the order of drawing, when a cell stops, and that what it says holds for all examples."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.evaluation.adaptive import Sampler, decided, measure_sampled, score_all
from harness.evaluation.draws import draw
from harness.evaluation.packing import pack
from harness.evaluation.requests import ExampleScores, Request, ScoredTask, Scores
from harness.evaluation.sequential import Interval
from harness.evaluation.settings import AdaptiveSettings
from harness.evaluation.statistics import estimate, paired

SIZE = 400


def _windows(seed=0):
    """A text task with windows of unequal length; request i is example i."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(80, 320, SIZE)
    requests = [Request(np.zeros(n, np.int64), np.arange(n), np.zeros(n, np.int64)) for n in lengths]

    def measure(scores):
        nll = -scores.request_logprob()
        return {"perplexity": ExampleScores(nll, lengths.astype(float), "exp", higher_is_better=False),
                "nll": ExampleScores(nll, lengths.astype(float), higher_is_better=False)}

    return ScoredTask("text", {}, requests, [str(i) for i in range(SIZE)], measure)


def _choices():
    """Three choices per question, the first is right; the requests of a question lie far apart."""
    requests = [Request(np.zeros(112, np.int64), np.array([111]), np.array([0])) for _ in range(3 * SIZE)]
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
    draws = draw(task, 1600, seed=1)
    assert sorted(np.concatenate(draws.examples)) == list(range(SIZE))
    assert sorted(np.concatenate(draws.requests)) == list(range(len(task.requests)))
    owner, before = np.arange(SIZE) if task.example_of is None else task.example_of, 0
    for examples, requests, group in zip(draws.examples, draws.requests, draws.tasks):
        assert set(owner[requests]) == set(examples)
        assert len(group.requests) == len(requests)
        # a question's choices are the same tokens here, and count once
        fed = sum(len(request.tokens) for request in group.requests) / (1 if task.example_of is None else 3)
        assert 1300 < fed <= 1600 or before and fed >= 800
        # a later group has at least a tenth of what was drawn before it
        assert len(examples) >= 0.1 * before or group is draws.tasks[-1]
        before += len(examples)
    assert len(draws.tasks) > 5
    order = np.concatenate(draws.examples)
    assert np.array_equal(order, np.concatenate(draw(task, 48000, seed=1).examples))
    assert not np.array_equal(order, np.concatenate(draw(task, 1600, seed=2).examples))
    # neither the order as a whole nor that within a group is the file's
    assert abs(stats.spearmanr(order, np.arange(SIZE)).statistic) < 0.2
    assert any(np.any(np.diff(examples) < 0) for examples in draws.examples)


def test_a_shared_context_counts_once():
    context = list(range(100, 190))
    requests = [Request(np.array([*context, choice, *range(choice)]), np.array([89]), np.array([choice]))
                for choice in (3, 4, 5) for _ in range(200)]
    ids = [str(i) for i in range(200)]
    task = ScoredTask("choices", {}, requests, ids, None, example_of=np.tile(np.arange(200), 3))
    # 90 + 4 + 5 + 6 tokens each
    assert [len(draw(task, limit, 0).examples[0]) for limit in (1050, 1049)] == [10, 9]


LENGTHS = {
    "windows": lambda rng, n: np.full(n, 64),
    "sentences": lambda rng, n: rng.integers(8, 40, n),
    "documents": lambda rng, n: np.minimum(rng.lognormal(4.5, 0.8, n), 1000).astype(int) + 2,
}


@pytest.mark.parametrize("batch_tokens", [2048, 8192])
@pytest.mark.parametrize("n", [40, 150, 700])
@pytest.mark.parametrize("kind", LENGTHS)
def test_all_groups_together_are_hardly_more_work_than_the_whole_task(kind, n, batch_tokens):
    """Padded tokens of the batches as they are packed, and with them passes and tests, of a cell that stops nowhere."""
    rng = np.random.default_rng(n)
    requests = [Request(rng.integers(0, 500, length), np.array([length - 1]), np.array([0]))
                for length in LENGTHS[kind](rng, n)]
    task = ScoredTask(kind, {}, requests, [str(i) for i in range(n)], None)

    def work(of_task):
        batches = pack(of_task.requests, batch_tokens).batches
        return np.array([sum(batch.input_ids.numel() for batch in batches), len(batches)])

    groups = draw(task, batch_tokens, 0).tasks
    whole, (padded, passes) = work(task), sum(work(group) for group in groups)
    assert padded <= 1.1 * whole[0]
    # a pass and a test each cost as much as 128 tokens
    assert padded + 128 * (passes + len(groups)) <= 1.1 * (whole[0] + 128 * (whole[1] + 1))


def test_many_examples_are_tested_from_the_first_batch_on():
    """The least that a cell can use is one batch, however many examples there are."""
    requests = [Request(np.zeros(64, np.int64), np.array([63]), np.array([0]))] * 3200
    sizes = [len(group) for group in draw(ScoredTask("text", {}, requests, ["x"] * 3200, None), 2048, 0).examples]
    assert sizes[:10] == [32] * 10 and len(sizes) > 20
    assert all(size <= max(32, 0.15 * sum(sizes[:i])) for i, size in enumerate(sizes[:-1]))


def test_a_task_that_does_not_say_whose_its_requests_are_is_refused():
    task = _choices()
    unknown = ScoredTask("choices", {}, task.requests, task.example_ids, task.measure)
    with pytest.raises(ValueError, match="1200 requests for 400 known examples"):
        draw(unknown, 1600, 0)


@pytest.mark.parametrize("task", [_windows(), _choices()], ids=["text", "choices"])
def test_an_undecided_cell_ends_with_the_numbers_of_exact(task):
    baseline, ablated = _scores(task, 1, 0, 0), _scores(task, 2, -0.1, 0.2)
    draws = draw(task, 8000, seed=0)
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
        draws = draw(task, 1600, seed)
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
    assert np.median(used) < 0.65 * SIZE


def test_standard_errors_are_of_all_examples_as_a_sample():
    """Double sampling: the mean of squared standard errors is the variance over populations and orders."""
    deltas, errors, values, value_errors = [], [], [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        base = rng.normal(3, 1, SIZE)
        ablated = base + 0.3 + rng.normal(0, 0.5, SIZE)
        requests = [Request(np.zeros(64, np.int64), np.array([63]), np.array([0]))] * SIZE
        task = ScoredTask("mean", {}, requests, [str(i) for i in range(SIZE)],
                            lambda scores: {"mean": ExampleScores(scores.request_logprob(), np.ones(SIZE))})
        as_scores = [Scores(x, x > 0, None, np.arange(SIZE + 1)) for x in (base, ablated)]
        draws = draw(task, 3200, seed)
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
    draws = draw(task, 3200, 0)
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
        draws = draw(task, 3200, 0)
        found = measure_sampled(draws, _scorer(task, draws, same)[0], same,
                                AdaptiveSettings(relative=None, of_baseline=None, absolute=0.1))
        assert (len(found.used) < SIZE) == stops
        assert found.metrics[next(iter(found.metrics))].p_value == 1


def test_sampler_needs_and_keeps_the_baseline():
    task = _windows()
    sampler = Sampler({"text": task}, AdaptiveSettings(relative=0.5), batch_tokens=3200, seed=3)
    groups = sampler.groups(["text"])
    assert list(groups)[:2] == ["text#0", "text#1"]
    draws = draw(task, 3200, 3)
    baseline = _scores(task, 1, 0, 0)
    found = sampler.measure_baseline("text", _scorer(task, draws, baseline)[0])
    assert np.array_equal(found["nll"].score, task.measure(baseline)["nll"].score)
    sampled = sampler.measure("text", _scorer(task, draws, _scores(task, 5, -0.5, 0.02))[0])
    assert sampled.metrics["nll"].n < SIZE and math.isfinite(sampled.metrics["nll"].low)
