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
