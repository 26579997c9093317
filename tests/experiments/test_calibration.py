"""Null hypotheses of experiments/calibration are true, samples keep clusters whole, and the tests can refuse."""

import importlib
from dataclasses import replace

import numpy as np
import pytest

from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import paired
from tests.studies import ROOT


@pytest.fixture(scope="module")
def modules():
    """The modules of the experiment by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments" / "calibration"))
        yield {name: importlib.import_module(name) for name in ("nulls", "calibration", "small_models", "rows")}


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 9, 300).astype(float)
    baseline = ExampleScores(3 * weight + rng.standard_normal(300), weight, "exp", clusters=np.arange(300) // 20)
    return replace(baseline, score=baseline.score + 0.4 * weight + rng.standard_normal(300)), baseline


def test_an_ablation_without_effect_has_the_metric_of_the_baseline(modules, scores):
    assert paired(*scores).delta > 1
    found = paired(modules["nulls"].without_effect(*scores), scores[1])
    assert found.delta == pytest.approx(0, abs=1e-10)
    assert found.p_value == pytest.approx(1)


def test_samples_keep_clusters_whole(modules, scores):
    nulls, clusters, rng = modules["nulls"], scores[1].clusters, np.random.default_rng(1)
    examples, groups = nulls.drawn_clusters(clusters, 7, rng)
    assert (np.bincount(groups) == 20).all() and len(np.unique(groups)) == 7
    assert all(len(set(clusters[examples[groups == one]])) == 1 for one in range(7))
    examples, groups = nulls.stretch(clusters, 64, 4, rng)
    assert len(examples) == 64 and (np.bincount(groups) == 16).all()
    first, second = nulls.exchanged(*scores, clusters, rng)
    assert np.array_equal(first.score + second.score, scores[0].score + scores[1].score)
    swapped = first.score == scores[1].score
    assert 0 < swapped.mean() < 1 and all(len(set(swapped[clusters == one])) == 1 for one in range(15))


def test_the_sample_of_everything_holds_the_truth_and_another_truth_is_missed(modules, scores):
    ablated, baseline = scores
    log = (ablated.score.sum() - baseline.score.sum()) / baseline.weight.sum()
    truth = {"value": np.exp(ablated.score.sum() / ablated.weight.sum()), "delta": paired(ablated, baseline).delta,
             "ratio": pytest.approx(log)}
    assert modules["nulls"].truths(ablated, baseline) == truth
    truth["ratio"], held = log, modules["nulls"].held
    assert held(ablated, baseline, truth) == {name: {0.9: True, 0.95: True, 0.99: True} for name in truth}
    wrong = held(ablated, baseline, {name: 9 * one for name, one in truth.items()})
    assert not any(one for of_name in wrong.values() for one in of_name.values())


@pytest.mark.parametrize(("discrete", "power", "refused"), [
    (False, 1.0, "no"), (False, 1.3, "refused"), (False, 0.7, "refused"), (True, 0.7, "no"), (True, 1.3, "refused"),
])
def test_p_values_that_are_not_uniform_are_refused(modules, discrete, power, refused):
    p = np.random.default_rng(2).random(800) ** power  # power above 1: too small
    rows = [{"null": "a", "metric": "m", "p": one, "naive": one, "ratio": 1.0, "discrete": discrete} for one in p]
    (line,) = modules["calibration"].summary(rows)
    assert (line["refused"], line["p-values"]) == (refused, 800)
    assert line["p < 0.05"] == np.mean(p < 0.05)


def test_sentences_and_words_of_stories(modules):
    story = "Tim had a dog. The dog ran away! He was sad."
    pairs = modules["small_models"].next_sentences([story], 7, 1)
    assert pairs == [{"source": "Tim had a dog.", "target": "The dog ran away!", "story": 7}]
    asked = modules["small_models"].last_words([story], 2)
    assert [(one["question"], one["answer"]) for one in asked] == [
        ("Tim had a", "dog"), ("Tim had a dog. The dog ran", "away")]


def test_windows_of_drawn_stories_are_a_true_null(modules, tmp_path):
    """Without dependence within stories and with many windows, p-values are uniform and intervals hold."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(20, 60, 50)
    nll = rng.standard_normal((2, lengths.sum())) + 2
    np.savez(tmp_path / "stories.npz", lengths=lengths, nll=nll)
    rows = modules["nulls"].packed(tmp_path, 25)
    assert {row["null"] for row in rows} == {f"stories: {n} windows of {w} tokens" for n, w in modules["nulls"].PACKED}
    p = np.array([row["p"] for row in rows])
    assert 0.35 < p.mean() < 0.65 and 0 < len(p) <= 100
    assert np.mean([row["held"]["delta"][0.95] for row in rows]) > 0.85
    name = rows[0]["null"], "token_perplexity"
    again = modules["nulls"].packed(tmp_path, 25, 1, {name})
    assert {row["null"] for row in again} == {name[0]} and again[0]["p"] != rows[0]["p"]


def test_every_sample_of_rows_has_the_size_that_is_asked_for(modules):
    samples = list(modules["rows"].samples_of([str(i) for i in range(40)], 10))
    assert len(samples) == 8 and all(len(one) == 10 for one in samples)
    assert (samples[0][0], samples[-1][-1]) == ("0", "39")
