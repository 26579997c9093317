"""The null hypotheses of experiments/calibration are true, and its samples have the clusters that they say."""

import runpy
from dataclasses import replace

import numpy as np
import pytest

from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import paired
from harness.tasks.clusters import BLOCKS
from tests.studies import ROOT

SCRIPT = runpy.run_path(str(ROOT / "experiments" / "calibration" / "calibration.py"))


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 9, 300).astype(float)
    baseline = ExampleScores(3 * weight + rng.standard_normal(300), weight, "exp", clusters=np.arange(300) // 20)
    return replace(baseline, score=baseline.score + 0.4 * weight + rng.standard_normal(300)), baseline


def test_an_ablation_without_effect_has_the_metric_of_the_baseline(scores):
    assert paired(*scores).delta > 1
    found = paired(SCRIPT["without_effect"](*scores), scores[1])
    assert found.delta == pytest.approx(0, abs=1e-10)
    assert found.p_value == pytest.approx(1)


def test_samples_keep_clusters_whole(scores):
    clusters, rng = scores[1].clusters, np.random.default_rng(1)
    examples, groups = SCRIPT["drawn_clusters"](clusters, 7, rng)
    assert (np.bincount(groups) == 20).all() and len(np.unique(groups)) == 7
    assert all(len(set(clusters[examples[groups == one]])) == 1 for one in range(7))
    examples, groups = SCRIPT["stretch"](clusters, 64, rng)
    assert len(examples) == 64 and (np.bincount(groups) == 64 / BLOCKS).all()
    first, second = SCRIPT["exchanged"](*scores, clusters, rng)
    assert np.array_equal(first.score + second.score, scores[0].score + scores[1].score)
    swapped = first.score == scores[1].score
    assert 0 < swapped.mean() < 1 and all(len(set(swapped[clusters == one])) == 1 for one in range(15))
