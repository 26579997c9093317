"""Coupling against scores over models: made-up rows whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from harness.measurements import compose_settings
from harness.measurements.coupling.leaderboard import (
    collect,
    family_bootstrap,
    main,
    partial_correlation,
    r_squared,
    unseen_families,
    verdicts,
    without_each_family,
)
from tests.measurements.coupling.test_coupling import run, words  # noqa: F401  a fixture


def made_up(within: float, between: float, seed: int = 0, n_families: int = 12, size: int = 4):
    """Models whose score follows coupling with slope `within` a family, and whose families differ by `between`."""
    rng = np.random.default_rng(seed)
    family = np.repeat(np.arange(n_families), size)
    centre = rng.normal(size=n_families)
    x = centre[family] * between + rng.normal(size=len(family)) * 0.3
    y = within * (x - centre[family] * between) + centre[family] * between + rng.normal(size=len(family)) * 0.05
    return x, y, family.astype(str).tolist()


def test_r_squared_and_partial_correlation_are_those_of_scipy():
    x, y, _ = made_up(1, 1)
    z = x + np.random.default_rng(1).normal(size=len(x))
    assert r_squared(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic ** 2)
    assert np.isnan(r_squared(np.ones(5), y[:5]))
    r = np.corrcoef([x, y, z])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert partial_correlation(x, y, z) == pytest.approx(expected)


def test_a_line_that_fits_four_families_predicts_an_unseen_one_less():
    """Four families of five equal models at x = 0, 1, 2, 3 and y = 0, 2, 1, 3, of which the lines are known by hand."""
    x, y, families = np.repeat([0.0, 1, 2, 3], 5), np.repeat([0.0, 2, 1, 3], 5), list(np.repeat(list("abcd"), 5))
    assert r_squared(x, y) == pytest.approx(0.64)
    # The line without a misses it by 1, that without b by 9/7; the means of the others miss them by 2 and by 2/3.
    assert unseen_families(x, y, families) == pytest.approx(1 - (1 + (9 / 7) ** 2) / (4 + 4 / 9))
    without = without_each_family(x, y, families)
    assert without == pytest.approx({"a": 0.25, "b": 0.862, "c": 0.862, "d": 0.25}, abs=1e-3)
    rng = np.random.default_rng(3)
    low, high = family_bootstrap(x, y, rng.normal(size=20), families)["r_squared"]
    alone = family_bootstrap(x, y, rng.normal(size=20), [str(i) for i in range(20)])["r_squared"]
    assert high - low > 1.5 * (alone[1] - alone[0])


def test_coupling_that_only_follows_size_has_no_partial_correlation():
    rng = np.random.default_rng(5)
    size = rng.uniform(18, 25, 60)
    x, y = size + rng.normal(size=60) * 0.5, 2 * size + rng.normal(size=60)
    assert r_squared(x, y) > 0.8 and abs(partial_correlation(x, y, size)) < 0.35


def test_the_interval_covers_the_truth():
    """Of 40 sets of models without any effect, at least 34 of the 95 % intervals of the partial correlation hold 0."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        families = np.repeat(np.arange(15), 3)
        x, y = (rng.normal(size=15)[families] + rng.normal(size=45) for _ in range(2))
        low, high = family_bootstrap(x, y, rng.normal(size=45), families.astype(str).tolist(), draws=300)["partial"]
        covered += low < 0 < high
    assert covered >= 34


def test_runs_and_scores_become_verdicts(words, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "out"
    assert run(words, f"output={folder}") == 0
    model = words[1].partition("=")[2]
    scores = pd.DataFrame({"model": [model], "family": ["llama"], "score": [50.0], "parameters": [1e6]})
    rows = collect([folder], scores)
    assert rows["k"].tolist() == [2, 5] and rows["score"].tolist() == [50, 50]
    assert rows["m_abs"].between(0.5, 1.2).all()
    x, y, families = made_up(1, 1)
    many = pd.DataFrame({"model": families, "family": families, "score": y, "parameters": np.exp(x * x + 20), "k": 10,
                         "m_abs": 1 - x, "coupling": x})
    table = verdicts(many)
    assert table["value"].tolist() == ["published", "calibrated"] and table["r_squared"].nunique() == 1
    assert (table["low"] < table["r_squared"]).all() and (table["unseen_families"] > 0.5).all()
    scores.to_csv(tmp_path / "scores.csv", index=False)
    assert main([str(tmp_path / "scores.csv"), str(folder)]) == 2
    assert capsys.readouterr().err == "harness: scores: 1 families are too few; at least 3 are needed\n"
    assert main([]) == 2 and "usage" in capsys.readouterr().err
    scores.drop(columns="family").to_csv(tmp_path / "scores.csv", index=False)
    assert main([str(tmp_path / "scores.csv"), str(folder)]) == 2
    assert "there is no column 'family'" in capsys.readouterr().err


def test_the_experiment_composes():
    settings = compose_settings("coupling", ["experiment=coupling_leaderboard", "model.name=meta-llama/Llama-2-7b-hf"])
    assert settings.k == [10, 30, 50] and settings.tasks["wikitext"].window == 128
