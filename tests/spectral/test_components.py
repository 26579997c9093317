"""The columns of single components against NumPy: outputs over a text, concentration, stability, rounding to 4 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.spectral import components
from harness.spectral.activations import InputCovariance, decompose_in_metric
from harness.spectral.decomposition import decompose


def a_weight(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.fixture
def text():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(500, 12)) * np.linspace(3, 0.1, 12) + rng.normal(size=12)
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    return x, InputCovariance(torch.from_numpy(mean), torch.from_numpy(covariance), len(x))


@pytest.mark.parametrize("shape", [(7, 12), (20, 12)])
def test_outputs_are_those_of_a_plain_decomposition(shape, text):
    x, inputs = text
    weight = a_weight(shape)
    of = components.directions(weight, decompose(weight))
    found, signs = components.outputs(of, inputs, components.leading_directions(inputs))
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    plain = x @ vt.T * s
    assert np.allclose(found["output_rms"], np.sqrt((plain**2).mean(0)))
    assert np.allclose(found["output_mean"], np.abs(plain.mean(0)))
    assert np.allclose(found["constant_share"], plain.mean(0) ** 2 / (plain**2).mean(0))
    assert np.array_equal(np.argsort(found["output_rank"]), np.argsort(-(plain**2).mean(0)))
    turned = (of.output * signs[:, None]).numpy()
    assert ((turned @ weight.numpy() @ x.mean(0)) >= 0).all()
    assert np.allclose(np.abs(found["mean_cosine"]), np.abs(vt @ x.mean(0)) / np.linalg.norm(x.mean(0)))
    leading = np.linalg.eigh(np.cov(x.T))[1][:, ::-1][:, : components.LEADING]
    assert np.allclose(found["leading_share"], ((vt @ leading) ** 2).sum(1))
    of_coordinates = components.concentration(of)
    assert np.allclose(of_coordinates["input_participation"], (vt**4).sum(1))
    assert np.array_equal(of_coordinates["output_coordinate"], np.abs(u).argmax(0))


def test_in_the_metric_of_the_activations_the_values_are_the_outputs(text):
    _, inputs = text
    weight = a_weight((7, 12))
    found = decompose_in_metric(weight, inputs.factor())
    of = components.directions(weight, found)
    columns, _ = components.outputs(of, inputs, components.leading_directions(inputs))
    assert np.allclose(columns["output_rms"], found.sigma)
    assert columns["output_rank"].tolist() == list(range(7))


@pytest.mark.parametrize("shape", [(7, 12), (20, 12)])
def test_stability_is_one_for_the_same_and_small_for_another_weight(shape):
    weight = a_weight(shape)
    of = components.directions(weight, decompose(weight))
    u, _, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    other = a_weight(shape, 5)
    u2, _, vt2 = np.linalg.svd(other.numpy(), full_matrices=False)
    assert np.allclose(components.stability(of, 3 * weight), 1)
    expected = (np.abs(u.T @ u2) * np.abs(vt @ vt2.T)).max(1)
    assert np.allclose(components.stability(of, other), expected) and expected.max() < 0.9


def test_rounding_to_4_bits_has_16_levels_in_each_block():
    weight = a_weight((3, 70)).float()
    rounded = components.rounded_to_4_bits(weight)
    for start in (0, 32, 64):
        block, found = weight[:, start : start + 32].double(), rounded[:, start : start + 32]
        step = (block.amax(1) - block.amin(1)) / 15
        assert ((found - block).abs().amax(1) <= step / 2 + 1e-12).all()
        assert all(len(row.mul(1e9).round().unique()) <= 16 for row in found)
    assert torch.equal(components.rounded_to_4_bits(torch.ones(2, 5)), torch.ones(2, 5).double())


def test_a_zero_matrix_has_columns_without_a_number_where_there_is_none(text):
    _, inputs = text
    weight = torch.zeros(7, 12)
    of = components.directions(weight, decompose(weight))
    columns, _ = components.outputs(of, inputs, components.leading_directions(inputs))
    assert not columns["output_rms"].any() and np.isnan(columns["constant_share"]).all()
