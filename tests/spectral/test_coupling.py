"""Coupling, its null, the Krylov method and the statistics of the residual stream, against LAPACK and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from harness.spectral.coupling import leading_triples, misfits, nulls, overlaps
from harness.spectral.krylov import krylov_triples
from harness.spectral.residual_stream import accumulated, departure_from_normality, plane, symmetry, trajectory

GENERATOR = 7


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(d: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(d, k, seed=seed)).Q


def falling(d: int, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall as slowly as those of a residual Jacobian, the first far above."""
    sigma = 5 * torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    return frame(d, d, seed) @ torch.diag(sigma) @ frame(d, d, seed + 1).T


def test_leading_triples_are_those_of_lapack():
    for matrix in (gaussian(60, 60), falling(60), gaussian(60, 3) @ gaussian(3, 60, seed=1)):
        triples, sigma = leading_triples(matrix, 8)
        u, expected, vt = np.linalg.svd(matrix.numpy())
        assert np.allclose(triples.sigma, expected[:8], atol=1e-10 * expected[0])
        assert np.allclose(sigma, expected, atol=2e-8 * expected[0])
        for found in (triples.u, triples.v):
            assert torch.dist(found.T @ found, torch.eye(8, dtype=torch.float64)) < 1e-8
        assert torch.dist(triples.u[:, :3] * triples.sigma[:3] @ triples.v[:, :3].T,
                          torch.from_numpy(u[:, :3] * expected[:3] @ vt[:3])) < 1e-8 * expected[0]
        assert triples.frobenius == pytest.approx(np.linalg.norm(matrix)) and triples.residual < 1e-8
    assert leading_triples(falling(20), 5)[0].gap == pytest.approx(math.sqrt(6 / 5))
    with pytest.raises(ValueError, match="1 to 20"):
        leading_triples(falling(20), 21)
    with pytest.raises(ValueError, match="NaN"):
        leading_triples(torch.full((3, 3), math.nan), 1)


def test_values_are_the_published_formula_for_every_pair_and_both_orders():
    """Stacked products give what a loop over pairs gives, written from the paper and from the released code."""
    jacobians = [gaussian(30, 30, seed=seed) + 2 * torch.outer(gaussian(30, seed=50), gaussian(30, seed=51)) / 30
                 for seed in range(4)]
    triples = [leading_triples(one, 6)[0] for one in jacobians]
    svd = [np.linalg.svd(one.numpy()) for one in jacobians]
    for left, right, order in (("u", "v", "ujv"), ("v", "u", "vju")):
        stacked = torch.cat([getattr(one, right) for one in triples], 1)
        for i, jacobian in enumerate(jacobians):
            overlap = overlaps(jacobian @ stacked, [getattr(one, left) for one in triples])
            for found in misfits(overlap, triples[i], [3, 6]):
                for j in range(4):
                    u, sigma, v = svd[j][0][:, : found.k], np.diag(svd[i][1][: found.k]), svd[j][2][: found.k].T
                    first, second = (u, v) if order == "ujv" else (v, u)
                    inner = first.T @ jacobian.numpy() @ second
                    m = np.linalg.norm(inner - sigma) / np.linalg.norm(sigma)
                    m_abs = np.linalg.norm(np.abs(inner) - sigma) / np.linalg.norm(np.diag(sigma), 2)
                    assert float(found.m[j]) == pytest.approx(m, rel=1e-9, abs=1e-12)
                    assert float(found.m_abs[j]) == pytest.approx(m_abs, rel=1e-9, abs=1e-12)
                    assert float(found.coupling[j]) == pytest.approx(1 - float(found.m[j]) / found.null)
            if order == "ujv":
                assert float(found.m[i]) < 1e-12 and float(found.coupling[i]) == pytest.approx(1)


@pytest.mark.parametrize("k", [5, 20])
def test_the_null_is_that_of_random_frames(k):
    """A simulation with 400 pairs of random frames agrees within four of its standard errors, which are below 1 %."""
    d, n = 120, 400
    jacobian = falling(d)
    triples, _ = leading_triples(jacobian, k)
    random = [(frame(d, k, 1000 + 2 * i), frame(d, k, 1001 + 2 * i)) for i in range(n)]
    products = jacobian @ torch.cat([right for _, right in random], 1)
    (found,) = misfits(overlaps(products, [left for left, _ in random]), triples, [k])
    assert (found.null, found.null_abs) == nulls(triples.sigma, triples.frobenius, d)
    for values, null in ((found.m, found.null), (found.m_abs, found.null_abs)):
        error = float(values.std()) / math.sqrt(n)
        assert error < 0.01 and abs(float(values.mean()) - null) < 4 * error + 2e-4
    assert abs(float(found.coupling.mean())) < 0.005


@pytest.mark.parametrize("k", [1, 10, 30])
def test_krylov_finds_the_triples_of_a_slowly_falling_spectrum(k):
    matrix = falling(288)
    exact, _ = leading_triples(matrix, k)
    calls = []

    def product(of):
        return lambda x: calls.append(x.shape[1]) or of @ x

    found = krylov_triples(product(matrix), product(matrix.T), 288, k, torch.Generator().manual_seed(GENERATOR))
    assert found.converged and found.n_products == sum(calls) < 288 + 2 * k
    assert torch.allclose(found.triples.sigma, exact.sigma, rtol=1e-5)
    for one, other in ((found.triples.u, exact.u), (found.triples.v, exact.v)):
        assert float(torch.linalg.svdvals(one.T @ other).min()) > 0.999
        assert torch.dist(one.T @ one, torch.eye(k, dtype=torch.float64)) < 1e-10
    assert found.triples.gap == pytest.approx(exact.gap, rel=0.02)
    assert found.triples.frobenius == pytest.approx(exact.frobenius, rel=0.05)
    again = krylov_triples(product(matrix), product(matrix.T), 288, k, torch.Generator().manual_seed(GENERATOR))
    assert torch.equal(again.triples.u, found.triples.u)


def test_krylov_of_a_small_or_a_poor_matrix():
    matrix = gaussian(6, 6)
    found = krylov_triples(matrix.matmul, matrix.T.matmul, 6, 6, torch.Generator().manual_seed(0))
    assert found.converged and torch.allclose(found.triples.sigma, torch.linalg.svdvals(matrix), rtol=1e-10)
    assert found.triples.frobenius == pytest.approx(float(torch.linalg.matrix_norm(matrix)), rel=1e-12)
    poor = gaussian(40, 3) @ gaussian(3, 40, seed=1)
    found = krylov_triples(poor.matmul, poor.T.matmul, 40, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(found.triples.sigma, torch.linalg.svdvals(poor)[:2], rtol=1e-10)
    with pytest.raises(ValueError, match="3 singular values that are not 0"):
        krylov_triples(poor.matmul, poor.T.matmul, 40, 5, torch.Generator().manual_seed(0))


def test_symmetry_and_departure_from_normality():
    a = gaussian(40, 40)
    assert symmetry(a + a.T) == pytest.approx(1) and symmetry(a - a.T) == pytest.approx(0, abs=1e-12)
    assert symmetry(a) == pytest.approx(0.5, abs=0.02)
    assert departure_from_normality(a - a.T) < 1e-6 and departure_from_normality(a + a.T) < 1e-6
    triangular, _ = scipy.linalg.schur(a.numpy(), output="complex")  # Henrici: the strict triangle of the Schur form
    expected = np.linalg.norm(np.triu(triangular, 1)) / np.linalg.norm(triangular)
    assert departure_from_normality(a) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(symmetry(torch.zeros(3, 3))) and math.isnan(departure_from_normality(torch.zeros(3, 3)))


def test_effective_rank_of_the_accumulated_product():
    steps, product, dense = [gaussian(20, 20, seed=seed) / 5 for seed in range(5)], None, np.eye(20)
    for step in steps:
        product, rank = accumulated(product, step)
        dense = (np.eye(20) + step.numpy()) @ dense
    p = np.linalg.svd(dense, compute_uv=False)
    p = p / p.sum()
    assert rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_trajectories():
    straight = torch.outer(torch.exp(0.3 * torch.arange(6.0)), torch.tensor([3.0, 4.0]))
    found = trajectory(straight)
    assert found.lss == pytest.approx(1) and found.lss_null == pytest.approx(math.sqrt(5))
    assert found.growth_mean == pytest.approx(0.3) and found.expodistance == pytest.approx(0, abs=1e-10)
    random = [trajectory(torch.cat([torch.zeros(1, 500), gaussian(30, 500, seed=seed).float()]).cumsum(0) + 1)
              for seed in range(20)]
    assert np.mean([one.lss for one in random]) == pytest.approx(math.sqrt(30), rel=0.02)
    back = trajectory(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    assert math.isinf(back.lss) and math.isnan(back.expodistance)
    growth = np.diff(np.log([1.0, 2.0, 6.0]))
    found = trajectory(torch.tensor([[1.0], [2.0], [6.0]]))
    assert (found.growth_mean, found.growth_std) == pytest.approx((growth.mean(), growth.std()))
    assert found.expodistance == pytest.approx((growth.std() / growth.mean()) ** 2)


def test_the_plane_is_that_of_the_two_principal_axes():
    states = torch.stack([gaussian(9) * scale for scale in (1, 2, 3, 4)]).reshape(2, 2, 9) + gaussian(2, 2, 9, seed=3)
    found = plane(states)
    flat = states.reshape(4, 9).numpy()
    u, sigma, _ = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert found.shape == (2, 2, 2)
    assert np.allclose(np.abs(found.reshape(4, 2)), np.abs(u * sigma)[:, :2])
