"""The metric of the activations against float64 numpy: spectra, removed parts, energies of outputs, singular C."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.spectral.ablation import Operation, ablate, bias_of, edit
from harness.spectral.activations import InputCovariance, decompose_in_metric
from harness.spectral.decomposition import decompose

SHAPES = [(12, 20), (20, 12), (15, 15)]


def weight_of(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def activations(n, width, seed=1, mean=3.0, spread=2.0):
    """Rows of correlated inputs, whose directions have standard deviations over `spread` orders of magnitude."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return rng.normal(size=(n, width)) * np.logspace(0, -spread, width) @ basis + mean * rng.normal(size=width)


def statistics(rows):
    return InputCovariance(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)), len(rows))


def second_moment(rows, centred):
    rows = rows - rows.mean(0) if centred else rows
    return rows.T @ rows / len(rows)


def root(c):
    values, vectors = np.linalg.eigh(c)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_parts_and_output_energies_are_numpys(shape, centred):
    weight, rows = weight_of(shape), activations(400, shape[1])
    factor = statistics(rows).factor(centred)
    c = second_moment(rows, centred)
    assert np.allclose(factor @ factor.T, c, rtol=0, atol=1e-12 * np.abs(c).max())
    found = decompose_in_metric(weight, factor)
    left, sigma, _ = np.linalg.svd(weight.numpy() @ root(c), full_matrices=False)
    assert np.allclose(found.sigma, sigma, rtol=0, atol=1e-10 * sigma[0])
    assert found.side == "left" and found.vectors.shape == (shape[0], min(shape))
    assert found.orthogonality_error < 1e-13
    for indices in (torch.arange(2), torch.arange(5, 9), torch.arange(3, min(shape)), torch.tensor([1, 4, 7])):
        picked = left[:, indices.numpy()]
        part = picked @ (picked.T @ weight.numpy())
        edited, removed = edit(weight, found, indices, Operation(values="output"))
        assert np.allclose(weight - edited, part, rtol=0, atol=1e-10 * np.abs(part).max())
        energy = float(np.square(part @ root(c)).sum())
        assert energy == pytest.approx(float((sigma[indices.numpy()] ** 2).sum()), rel=1e-10)
        assert removed.output_norm_removed == pytest.approx(energy**0.5, rel=1e-10)
        assert removed.output_energy_removed == pytest.approx(energy / float(np.square(sigma).sum()), rel=1e-10)
        assert removed.energy_removed == pytest.approx(float(np.square(part).sum() / weight.square().sum()), rel=1e-10)
        assert removed.norm_removed == pytest.approx(float(np.linalg.norm(part)), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_where_c_is_a_multiple_of_the_identity_it_is_the_metric_of_the_weights(shape):
    weight = weight_of(shape)
    found = decompose_in_metric(weight, InputCovariance(torch.zeros(shape[1]).double(),
                                                        7.0 * torch.eye(shape[1]).double(), 100).factor())
    plain = decompose(weight)
    assert torch.allclose(found.sigma, 7**0.5 * plain.sigma, rtol=1e-12)
    for indices in (torch.arange(3), torch.arange(4, min(shape))):
        ours, theirs = ablate(weight, found, indices), ablate(weight, plain, indices)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_a_singular_c_is_the_limit_of_c_plus_t_identity(shape, n_tokens):
    """Fewer tokens than inputs: no jitter changes what is seen of the text, and the rest has a definite order."""
    weight, rows = weight_of(shape), activations(n_tokens, shape[1])
    found = decompose_in_metric(weight, statistics(rows).factor())
    assert int((found.sigma > 0).sum()) == n_tokens
    everything = found.vectors @ (found.vectors.T @ weight)
    assert torch.allclose(everything, weight, rtol=0, atol=1e-12)
    root_of_c_plus_t = np.concatenate([rows.T / n_tokens**0.5, 1e-6 * np.eye(shape[1])], axis=1)
    limit, _, _ = np.linalg.svd(weight.numpy() @ root_of_c_plus_t, full_matrices=False)
    for stop in range(1, min(shape)):
        ours = found.vectors[:, :stop] @ found.vectors[:, :stop].T @ weight
        theirs = limit[:, :stop] @ limit[:, :stop].T @ weight.numpy()
        assert np.allclose(ours, theirs, rtol=0, atol=1e-7)  # t is 1e-12; the limit itself is exact
    kept = ablate(weight, found, torch.arange(n_tokens, min(shape)))
    assert np.allclose(kept @ rows.T, weight @ rows.T, rtol=0, atol=1e-10)  # no output of the text changes


def test_a_centred_covariance_of_one_token_leaves_the_metric_of_the_weights():
    weight, rows = weight_of((12, 20)), activations(1, 20)
    found = decompose_in_metric(weight, statistics(rows).factor(centred=True))
    assert torch.equal(found.sigma, torch.zeros(12).double())
    assert torch.allclose(ablate(weight, found, torch.arange(4)), ablate(weight, decompose(weight), torch.arange(4)),
                          rtol=0, atol=1e-10)


def test_a_large_mean_and_small_variances_are_both_kept():
    """1e8 beside deviations of 1e-3: their sum in one float64 matrix would lose all variances below 1."""
    rows = activations(4000, 6, mean=0.0, spread=1.0) * 1e-3
    rows += 1e8 * np.linalg.qr(np.random.default_rng(4).normal(size=(6, 6)))[0][0]
    exact = rows - rows.mean(0)
    covariance = InputCovariance(torch.from_numpy(rows.mean(0)), torch.from_numpy(exact.T @ exact / len(rows)), 4000)
    weight = weight_of((6, 6))
    found = decompose_in_metric(weight, covariance.factor())
    scaled = np.concatenate([exact / len(rows) ** 0.5, rows.mean(0)[None]])
    reference = np.linalg.svd(weight.numpy() @ scaled.T)[1]
    assert np.allclose(found.sigma[1:], reference[1:], rtol=1e-4)
    lost = np.linalg.eigvalsh(weight.numpy() @ second_moment(rows, False) @ weight.numpy().T)[:-1]
    assert not np.allclose(np.sqrt(lost.clip(0)), reference[:0:-1], rtol=0.1)


@pytest.mark.parametrize("metric", ["weight", "activations"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_scale_and_kept_and_removed_parts(shape, metric):
    weight, rows = weight_of(shape), activations(100, shape[1])
    inputs = statistics(rows).factor()
    found = decompose(weight) if metric == "weight" else decompose_in_metric(weight, inputs)
    values = "own" if metric == "weight" else "output"
    left = found.vectors if found.side == "left" else np.linalg.svd(weight, full_matrices=False)[0]
    for indices in (torch.arange(3), torch.arange(2, min(shape)), torch.arange(min(shape))):
        picked = torch.as_tensor(left[:, indices.numpy()])
        part = picked @ (picked.T @ weight)
        for scale in (-1.0, 0.0, 0.5, 3.0):
            edited, said = edit(weight, found, indices, Operation(scale, values, inputs=inputs))
            assert torch.allclose(edited, weight + (scale - 1) * part, rtol=0, atol=1e-12)
            assert said.realised_removal == pytest.approx(1, abs=1e-12)
            assert said.norm_removed == pytest.approx(abs(1 - scale) * float(part.norm()), rel=1e-10)
            assert said.output_norm_removed == pytest.approx(abs(1 - scale) * float((part @ inputs).norm()), rel=1e-10)
            assert said.energy_removed == pytest.approx(float(part.square().sum() / weight.square().sum()), rel=1e-10)
    first, second = torch.arange(4), torch.arange(4, min(shape))
    assert torch.allclose(ablate(weight, found, first) + ablate(weight, found, second), weight, rtol=0, atol=1e-12)


def test_an_edit_of_another_operand():
    """W + (s - 1) U_r U_r^T D with the vectors of a third matrix, as for a change in the directions of a reference."""
    weight, change, reference = (weight_of((9, 14), seed) for seed in (0, 1, 2))
    found, indices = decompose(reference), torch.tensor([0, 3, 4])
    picked = np.linalg.svd(reference.numpy())[0][:, indices.numpy()]
    for scale in (0.0, 2.0):
        expected = weight.numpy() + (scale - 1) * picked @ (picked.T @ change.numpy())
        edited, said = edit(weight, found, indices, Operation(scale, "other", operand=change))
        assert np.allclose(edited, expected, rtol=0, atol=1e-12)
        assert said.realised_removal == pytest.approx(1, abs=1e-12)
        share = np.square(picked.T @ change.numpy()).sum() / change.square().sum()
        assert said.energy_removed == pytest.approx(float(share), rel=1e-10)


def test_a_factor_of_another_width_is_refused():
    with pytest.raises(ValueError, match="20 rows, not 12"):
        decompose_in_metric(weight_of((12, 20)), torch.eye(12).double())


@pytest.mark.parametrize("metric", ["weight", "activations"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_part_that_is_replaced_by_its_mean(shape, metric):
    weight, rows = weight_of(shape), activations(300, shape[1])
    known = statistics(rows)
    found = decompose(weight) if metric == "weight" else decompose_in_metric(weight, known.factor())
    values = "own" if metric == "weight" else "output"
    left = found.vectors.numpy() if found.side == "left" else np.linalg.svd(weight.numpy(), full_matrices=False)[0]
    indices = torch.tensor([0, 2, 5])
    picked = left[:, indices.numpy()]
    for scale in (0.0, 0.5):
        operation = Operation(scale, values, inputs=known.factor(centred=True), mean=known.mean, to_mean=True)
        edited, said = edit(weight, found, indices, operation)
        bias = bias_of(weight, found, indices, operation)
        outputs = rows @ weight.numpy().T
        part = outputs @ picked @ picked.T
        expected = outputs + (scale - 1) * (part - part.mean(0))
        assert np.allclose(rows @ edited.numpy().T + bias.numpy(), expected, rtol=0, atol=1e-10 * np.abs(outputs).max())
        varied = np.square(part - part.mean(0)).sum(1).mean()
        assert said.output_norm_removed == pytest.approx((1 - scale) * varied**0.5, rel=1e-9)
        assert said.output_constant_energy == pytest.approx(np.square(part.mean(0)).sum(), rel=1e-9)
        assert said.output_part_energy == pytest.approx(np.square(part).sum(1).mean(), rel=1e-9)
        variance = np.square(outputs - outputs.mean(0)).sum(1).mean()
        assert said.output_energy_removed == pytest.approx(varied / variance, rel=1e-9)
    with pytest.raises(ValueError, match="only if the mean of the inputs is known"):
        bias_of(weight, found, indices, Operation())
