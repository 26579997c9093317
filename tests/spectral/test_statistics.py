"""Statistics of singular values against scipy, numpy and the powerlaw package's own search."""

import math

import pytest
import torch

from harness.spectral import statistics as st

ONE = torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
EQUAL = torch.full((7,), 0.2, dtype=torch.float64)


def some_values(n=200, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01


def test_against_scipy_and_numpy():
    numpy, entropy = pytest.importorskip("numpy"), pytest.importorskip("scipy.stats").entropy
    sigma = some_values()
    s = sigma.numpy()
    assert st.stable_rank(sigma) == pytest.approx((numpy.linalg.norm(s) / s.max()) ** 2, rel=1e-12)
    assert st.participation_ratio(sigma) == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-12)
    assert st.spectral_entropy(sigma) == pytest.approx(entropy(s**2), rel=1e-12)
    assert st.effective_rank(sigma) == pytest.approx(math.exp(entropy(s)), rel=1e-12)
    assert st.condition(sigma) == pytest.approx(numpy.linalg.cond(numpy.diag(s)), rel=1e-12)


@pytest.mark.parametrize("statistic", [st.stable_rank, st.participation_ratio, st.effective_rank])
def test_ranks_count_equal_values(statistic):
    assert statistic(ONE) == pytest.approx(1, abs=1e-12)
    assert statistic(EQUAL) == pytest.approx(7, rel=1e-12)
    assert math.isnan(statistic(torch.zeros(3)))


def test_entropy_and_condition_at_their_ends():
    assert st.spectral_entropy(ONE) == 0 and st.spectral_entropy(EQUAL) == pytest.approx(math.log(7), rel=1e-12)
    assert st.condition(ONE) == math.inf and st.condition(EQUAL) == 1 and math.isnan(st.condition(torch.zeros(3)))


@pytest.mark.parametrize("scale", [1e-200, 1e180])
def test_squares_neither_overflow_nor_vanish(scale):
    sigma = some_values()
    for statistic in (st.stable_rank, st.participation_ratio, st.spectral_entropy, st.effective_rank, st.condition):
        assert statistic(sigma * scale) == pytest.approx(statistic(sigma), rel=1e-12)


def pareto(alpha, n, body, seed):
    generator = torch.Generator().manual_seed(seed)
    tail = torch.rand(n, generator=generator, dtype=torch.float64) ** (-1 / (alpha - 1))
    return torch.cat([tail, torch.rand(body, generator=generator, dtype=torch.float64)]).sqrt()


@pytest.mark.parametrize("sigma", [pareto(2.2, 120, 60, 0), pareto(4.5, 120, 60, 1), some_values(90),
                                   torch.cat([pareto(3.0, 80, 0, 2).round(decimals=1), torch.zeros(3)])],
                         ids=["alpha 2.2", "alpha 4.5", "uniform", "ties and zeros"])
def test_power_law_is_what_the_package_finds_by_its_own_search(sigma, monkeypatch):
    powerlaw = pytest.importorskip("powerlaw")
    monkeypatch.setattr(st, "_CHUNK_ELEMENTS", 1000)  # several chunks of candidates
    eigenvalues = (sigma**2)[sigma > 0].numpy()
    new = not hasattr(powerlaw, "Distribution_Fit")
    theirs = powerlaw.Fit(eigenvalues, verbose=0, **({"parameter_ranges": {"alpha": [1.0, 1e4]}} if new else {}))
    alpha, distance, xmin, n_tail = st.power_law(sigma)
    assert xmin == pytest.approx(theirs.xmin, rel=1e-12)
    assert alpha == pytest.approx(theirs.alpha, rel=1e-6) and distance == pytest.approx(theirs.D, rel=1e-5)
    tail = eigenvalues[eigenvalues >= xmin]
    assert n_tail == len(tail)
    assert alpha == pytest.approx(1 + n_tail / sum(math.log(x / xmin) for x in tail), rel=1e-4)  # the closed form


def test_power_law_finds_the_planted_exponent():
    alpha, _, xmin, n_tail = st.power_law(pareto(3.5, 4000, 2000, 5))
    assert alpha == pytest.approx(3.5, abs=4 * 2.5 / math.sqrt(n_tail)) and n_tail > 1500 and xmin < 2


@pytest.mark.parametrize("n", [8, 10, 19])
def test_small_samples_get_an_exponent_without_bias(n):
    found = torch.tensor([st.power_law(pareto(3.0, n, 0, seed)) for seed in range(400)], dtype=torch.float64)
    assert int(found[:, 3].min()) >= 8
    error = found[:, 0] - 3
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20  # 400 draws
    assert float(error.square().mean().sqrt()) < 1.0  # of the estimator for large samples it is 1.5 to 4


def test_the_small_sample_is_fitted_above_a_body():
    found = [st.power_law(pareto(3.0, 12, 7, seed))[0] for seed in range(200)]
    assert sum(found) / 200 == pytest.approx(3, abs=0.25)


def test_too_few_values_have_no_tail():
    assert st.power_law(torch.tensor([2.0, 1.0, 1.0, 0.0]))[3] == 0
    assert all(math.isnan(x) for x in st.power_law(torch.zeros(5))[:3])
