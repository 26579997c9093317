"""Singular values alone, against float64 LAPACK and against the decomposition with vectors."""

import pytest
import torch

from harness.spectral.decomposition import decompose
from harness.spectral.singular_values import singular_values
from tests.spectral.test_decomposition import matrix_with

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 300), (40, 40)])
@pytest.mark.parametrize("smallest", [0.5, 0.011, 0.009, 1e-5, 0.0])
def test_values_are_those_of_lapack(shape, smallest):
    sigma = torch.linspace(1, smallest, min(shape), dtype=torch.float64) * 7.3
    weight = matrix_with(sigma, *shape)
    (found,) = singular_values([weight])
    expected = torch.linalg.svdvals(weight)
    assert found.method == ("gram" if smallest > 0.01 and shape != (40, 40) else "gesdd")
    if found.method == "gram":
        assert torch.allclose(found.sigma, expected, rtol=1e-11, atol=0)
    assert torch.allclose(found.sigma, expected, rtol=1e-11, atol=20 * EPS * float(expected[0]))
    assert torch.equal(found.sigma, found.sigma.sort(descending=True).values) and found.shape == shape
    assert torch.allclose(found.sigma, decompose(weight).sigma, rtol=1e-11, atol=20 * EPS * float(expected[0]))


def test_matrices_of_one_shape_are_taken_together():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(*shape, generator=generator) for shape in ((40, 300), (300, 40), (40, 300))]
    weights.append(torch.ones(40, 300))  # of rank one
    found = singular_values(weights)
    assert [one.method for one in found] == ["gram", "gram", "gram", "gesdd"]
    for one, weight in zip(found, weights):
        assert torch.equal(one.sigma, singular_values([weight])[0].sigma)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_neither_overflow_nor_vanish(scale):
    weight = torch.randn(8, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, scaled = (singular_values([one])[0] for one in (weight, weight * scale))
    assert torch.allclose(scaled.sigma, own.sigma * scale, rtol=1e-13, atol=0) and scaled.method == "gram"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_matrices_are_refused(bad):
    weight = torch.ones(3, 7)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        singular_values([torch.ones(3, 7), weight])
    with pytest.raises(ValueError, match="same sides"):
        singular_values([torch.ones(3, 7), torch.ones(3, 8)])
    with pytest.raises(ValueError, match="non-empty"):
        singular_values([torch.ones(0, 7)])
