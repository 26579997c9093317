"""The tables of experiments/components on made-up components whose answers are known."""

from __future__ import annotations

import runpy

import numpy as np
import pandas as pd
import pytest

from tests.studies import ROOT

MADE = runpy.run_path(str(ROOT / "experiments" / "components" / "analysis.py"))
by_matrix, half, rank_correlation, what_is_left = (
    MADE[name] for name in ("by_matrix", "half", "rank_correlation", "what_is_left")
)


def test_half_of_an_effect_is_carried_by_the_fewest():
    assert half(np.array([1.0, -8.0, 3.0, 4.0])).tolist() == [1]
    assert sorted(half(np.array([2.0, -2.0, 2.0, 2.0])).tolist()) == [0, 1]
    assert half(np.array([0.0, 5.0, -4.0, 3.0])).tolist() == [1, 2]


def test_what_is_said_of_a_matrix():
    n = 20
    effect = np.zeros(n)
    effect[[18, 19, 3]] = [4.0, -5.0, 1.0]
    rows = pd.DataFrame({
        "task": "text", "matrix": "0.up_proj", "index": range(n), "improvement": effect,
        "predicted_improvement": -effect, "sigma": np.linspace(5, 1, n), "output_rms": np.abs(effect) + 0.01,
        "output_rank": np.argsort(np.argsort(-np.abs(effect))), "constant_share": 0.3,
    })  # fmt: skip
    (row,) = by_matrix(rows).to_dict("records")
    assert (row["half"], row["in_smallest_tenth"]) == (1, 1)
    assert row["at_sigma"] == 19 / 20 and row["at_output"] == 0
    assert row["with_output"] == pytest.approx(1) and row["first_order"] == pytest.approx(-1)
    assert np.isnan(row["with_constant_share"]) and np.isnan(rank_correlation(rows["sigma"][:2], rows["sigma"][:2]))


def test_what_is_left_of_constants_and_of_others():
    pairs = pd.DataFrame({"task": "text", "improvement": [-4.0, 1.0, 2.0], "improvement_mean": [0.5, -0.5, 1.0],
                          "constant_share": [0.9, 0.1, 0.2]})
    (row,) = what_is_left(pairs).to_dict("records")
    assert (row["n_constant"], row["left_constant"], row["left_varying"]) == (1, 0.125, 0.5)
    assert row["left_all"] == pytest.approx(2 / 7)


@pytest.fixture
def whole(monkeypatch):
    folder = ROOT / "experiments" / "components"
    monkeypatch.syspath_prepend(str(folder))
    return runpy.run_path(str(folder / "whole.py")) | runpy.run_path(str(folder / "choose.py"))


def test_components_are_chosen_by_prediction_of_either_sign_and_by_chance(whole):
    predictions = pd.DataFrame({"matrix": ["0.a"] * 4 + ["1.b"] * 4, "index": [0, 1, 2, 3] * 2,
                                "predicted_improvement": [3.0, -9.0, 0.1, 0.2, 5.0, -1.0, -0.1, 0.3]})
    assert whole["chosen"](predictions, 1, 0, 0, 0) == ["1.b:0", "0.a:1"]
    assert set(whole["chosen"](predictions, 0, 1, 0, 0)) == {"1.b:0", "1.b:1", "0.a:0", "0.a:1"}
    drawn = whole["drawn"](predictions, 3, 0)
    assert len(drawn.drop_duplicates()) == 3
    names = whole["chosen"](predictions, 1, 0, 3, 0)
    assert set(names) == {"1.b:0", "0.a:1", *(drawn["matrix"] + ":" + drawn["index"].astype(str))}


def test_the_tables_of_a_whole_model(whole):
    n = 20
    effect = np.full(n, 0.1)
    effect[[18, 3]] = [-8.0, 5.0]
    predictions = pd.DataFrame({"matrix": "0.up_proj", "index": range(n), "task": "text", "metric": "nll",
                                "predicted_improvement": effect})
    components = pd.DataFrame({"matrix": "0.up_proj", "index": range(n), "layer_type": "up_proj", "block": 0,
                               "output_rms": np.abs(effect), "output_rank": np.argsort(np.argsort(-np.abs(effect))),
                               "constant_share": 0.5})
    matrices = whole["by_matrix"](components, predictions)
    (row,) = matrices.to_dict("records")
    assert (row["half"], row["at_sigma"], row["at_output"]) == (1, 18 / 20, 0)
    assert (row["gain_index"], row["harm_index"]) == (3, 18)
    assert row["in_smallest_tenth"] == pytest.approx(8.1 / 14.8)
    assert row["in_largest_tenth"] == pytest.approx(0.2 / 14.8)
    assert list(whole["by_layer_type"](matrices)["layer_type"]) == ["up_proj", "all"]
    assert whole["concentrated"](predictions).iloc[0].to_dict() == {
        "task": "text", "n": n, "half": 1, "largest_hundred": 1.0, "matrices_of_the_hundred": 1}
    rows = predictions.assign(improvement=effect - 0.01, p_value=[0.001] + [0.5] * (n - 1), random=False,
                              output_rms=np.abs(effect), constant_share=0.5)
    (said,) = whole["agreement"](rows).to_dict("records")
    assert (said["significant"], said["first_order"], said["too_hopeful"], said["sign"]) == (1, pytest.approx(1), 1, 1)
