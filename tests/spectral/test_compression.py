"""Budgets of parameters: the ranks of SVD-LLM, and the zero-sum rule against a plain loop over all candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.spectral.regions import Compression, Random, by_loss, from_plain, select, to_plain
from harness.spectral.regions.compression import keeping, zero_sum_ranks


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (288, 768), (15, 15)])
@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8])
def test_uniform_ranks_are_the_largest_that_fit(shape, ratio):
    out, width = shape
    kept = min(shape) - len(select(Compression(ratio), None, shape))
    assert kept * (out + width) <= (1 - ratio) * out * width * (1 + 1e-12) < (kept + 1) * (out + width)


def plain_loop(losses, shapes, ratio):
    """The zero-sum rule without heaps: every candidate of every matrix is looked at in every step."""
    kept = {name: min(shape) for name, shape in shapes.items()}
    size = lambda name: min(shapes[name][0] * shapes[name][1], kept[name] * sum(shapes[name]))  # noqa: E731
    whole, drift = sum(map(size, kept)), 0.0
    while sum(map(size, kept)) > (1 - ratio) * whole:
        there = [(float(losses[name][kept[name] - 1]), name) for name in kept if kept[name] > 1]
        if not there:
            break
        right = [one for one in there if (one[0] > 0) == (drift <= 0)] or there
        change, name = min(right, key=lambda one: abs(one[0]))
        kept[name] -= 1
        drift += change
    return {n: k if k * sum(shapes[n]) < shapes[n][0] * shapes[n][1] else min(shapes[n]) for n, k in kept.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_zero_sum_ranks_are_those_of_a_plain_loop(seed, ratio):
    rng = np.random.default_rng(seed)
    shapes = {f"{i}": (int(rng.integers(4, 30)), int(rng.integers(4, 30))) for i in range(7)}
    losses = {name: torch.from_numpy(rng.normal(size=min(shape)) * np.linspace(2, 0.1, min(shape)))
              for name, shape in shapes.items()}
    found = zero_sum_ranks(losses, shapes, ratio)
    assert found == plain_loop(losses, shapes, ratio) and min(found.values()) >= 1
    size = sum(min(np.prod(shapes[name]), k * sum(shapes[name])) for name, k in found.items())
    whole = sum(np.prod(shape) for shape in shapes.values())
    if min(found.values()) > 1:
        assert (1 - ratio) * whole - max(map(sum, shapes.values())) <= size <= (1 - ratio) * whole
    assert ratio == 0.9 or len(set(found.values())) > 1  # at 0.9 one value of each matrix is more than the budget


def test_a_sensitive_matrix_keeps_more():
    shapes = {"sensitive": (40, 40), "other": (40, 40)}
    losses = {"sensitive": torch.full((40,), 1.0), "other": torch.full((40,), 1e-6)}
    found = zero_sum_ranks(losses, shapes, 0.4)
    assert found["sensitive"] == 40 and found["other"] == 4  # whole, because its factors would take no less room


def test_a_shared_budget_and_its_controls():
    region = Compression(0.4, "zero_sum")
    assert by_loss(region) and by_loss(Random(region, 3)) and not region.rank_only
    assert not by_loss(Compression(0.4)) and not by_loss(Random(Compression(0.4), 3))
    assert (region.label, Compression(0.4).label) == ("compression 0.4 zero_sum", "compression 0.4")
    assert from_plain(to_plain(region)) == region
    with pytest.raises(ValueError, match="depend on all matrices of a target"):
        select(region, torch.ones(4), (4, 6))
    assert len(select(keeping(4), None, (4, 6))) == 0 and select(keeping(3), None, (4, 6)).tolist() == [3]


@pytest.mark.parametrize(("ratio", "ranks"), [(0.0, "uniform"), (1.0, "uniform"), (0.5, "other")])
def test_wrong_budgets(ratio, ranks):
    with pytest.raises(ValueError):
        Compression(ratio, ranks)
