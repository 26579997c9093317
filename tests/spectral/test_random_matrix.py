"""The null model against numerical integration, random draws and published constants; and calibration of the edges."""

import math

import pytest
import torch

from harness.measurements.spectra.figures import marchenko_pastur_density
from harness.spectral.random_matrix import (
    NOISE_ESTIMATORS,
    TRACY_WIDOM_1,
    bbp_threshold,
    estimate_noise,
    hard_threshold,
    mp_cdf,
    mp_distances,
    mp_edges,
    mp_median,
    mp_quantile,
    mp_region_bounds,
)
from harness.spectral.regions import GavishDonoho, LowerBulk, MarchenkoPastur, Random, fraction_interval, select

SHAPES = {"square": (384, 384), "swiglu": (288, 800), "four_to_one": (192, 768)}


def gaussian(shape, seed=0, noise=1.0):
    return noise * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_of(matrix):
    return torch.linalg.svdvals(matrix)


def spikes(shape, strengths, seed=7):
    strengths = torch.as_tensor(strengths, dtype=torch.float64)
    left = torch.linalg.qr(gaussian((shape[0], len(strengths)), seed)).Q
    right = torch.linalg.qr(gaussian((shape[1], len(strengths)), seed + 1)).Q
    return (left * strengths) @ right.T


@pytest.fixture(scope="module")
def noise_values():
    return {name: values_of(gaussian(shape, noise=0.02)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("aspect", [1.0, 0.36, 0.25, 0.01])
def test_cdf_is_the_integral_of_the_density_that_figures_show(aspect):
    integrate = pytest.importorskip("scipy.integrate")
    low, high = 1 - math.sqrt(aspect), 1 + math.sqrt(aspect)
    noise, shape, unit = 0.3, (round(100 * aspect), 100), 3.0  # unit: noise sqrt(n), of which y is a multiple

    def density(angle):  # y = middle - half-width cos(angle) takes the square-root edges out of the integrand
        y = 1 - math.sqrt(aspect) * math.cos(angle)
        return unit * float(marchenko_pastur_density(unit * y, noise, shape)) * math.sqrt(aspect) * math.sin(angle)

    assert integrate.quad(density, 0, math.pi)[0] == pytest.approx(1, abs=1e-9)
    for angle in (0.01, 0.4, 1.2, 2.0, 3.0):
        y = torch.tensor(1 - math.sqrt(aspect) * math.cos(angle), dtype=torch.float64)
        assert float(mp_cdf(y, aspect)) == pytest.approx(integrate.quad(density, 0, angle)[0], abs=1e-10)
    outside = torch.tensor([low - 0.1, high + 0.1], dtype=torch.float64)
    assert mp_cdf(outside, aspect).tolist() == pytest.approx([0, 1], abs=1e-12)
    assert marchenko_pastur_density(unit * outside.numpy(), noise, shape).tolist() == [0, 0]
    shares = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    assert torch.allclose(mp_cdf(mp_quantile(shares, aspect), aspect), shares, rtol=0, atol=1e-12)


def test_constants_of_gavish_and_donoho():
    assert mp_median(1.0) ** 2 == pytest.approx(0.6528, abs=5e-5)
    square = torch.ones(100, dtype=torch.float64)
    assert hard_threshold(square, (100, 100)) == pytest.approx(2.858, abs=5e-4)  # times the median, which is 1
    assert hard_threshold(square, (100, 100), noise=0.3) == pytest.approx(4 / math.sqrt(3) * 10 * 0.3)
    for k, n in ((100, 400), (100, 200), (100, 110)):  # the paper's own approximation, good to 0.02
        b = k / n
        assert hard_threshold(square, (k, n)) == pytest.approx(0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43, abs=0.02)


def test_tracy_widom_quantiles_against_the_fredholm_determinant():
    special = pytest.importorskip("scipy.special")
    numpy = pytest.importorskip("numpy")
    nodes, weights = numpy.polynomial.legendre.leggauss(60)
    for share, quantile in TRACY_WIDOM_1.items():
        x = quantile + 8 * (nodes + 1)  # Airy functions vanish to 1e-20 by s + 16
        kernel = special.airy((x[:, None] + x[None, :]) / 2)[0] / 2
        root = numpy.sqrt(8 * weights)
        determinant = numpy.linalg.det(numpy.eye(60) - root[:, None] * kernel * root[None, :])
        assert determinant == pytest.approx(share, abs=2e-5)


@pytest.mark.parametrize("shape", [(60, 150), (150, 60), (80, 80)])
def test_tracy_widom_edges_are_crossed_by_one_matrix_in_a_hundred(shape):
    draws = values_of(gaussian((1000, *shape), seed=3))
    lower, upper = mp_edges(1.0, shape, tracy_widom=True)
    plain_lower, plain_upper = mp_edges(1.0, shape)
    assert lower <= plain_lower and upper > plain_upper
    # 10 expected of 1000; a binomial of 1 % stays within 2 and 20 with probability 0.995.
    assert 2 <= int((draws[:, 0] > upper).sum()) <= 20
    assert int((draws[:, -1] < lower).sum()) <= 20
    assert int((draws[:, 0] > plain_upper).sum()) > 80  # the bare edge is crossed by a sixth of them


@pytest.mark.parametrize("estimator", list(NOISE_ESTIMATORS))
@pytest.mark.parametrize("tracy_widom", [False, True])
@pytest.mark.parametrize("name", list(SHAPES))
def test_pure_noise_lies_inside(noise_values, name, tracy_widom, estimator):
    sigma, shape = noise_values[name], SHAPES[name]
    assert estimate_noise(sigma, shape, estimator) == pytest.approx(0.02, rel=1.5e-2)  # spread 0.5 %
    start, stop = mp_region_bounds(sigma, shape, estimator, tracy_widom)
    assert start + len(sigma) - stop <= 0.005 * len(sigma) + 1
    assert mp_distances(sigma, 0.02, shape)[0] < 5 / len(sigma)  # eigenvalues repel: not 1 / sqrt(k)


@pytest.mark.parametrize("name, kept", [("square", 0.24), ("swiglu", 0.86), ("four_to_one", 1.0)])
def test_the_rule_of_laser_rmt_keeps_noise(noise_values, name, kept):
    sigma, shape = noise_values[name], SHAPES[name]
    quartiles = torch.quantile(sigma, torch.tensor([0.25, 0.75], dtype=torch.float64))
    threshold = float(quartiles[1] - quartiles[0]) / 1.349 * (1 + math.sqrt(min(shape) / max(shape)))
    assert float((sigma > threshold).double().mean()) == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize("estimator", list(NOISE_ESTIMATORS))
@pytest.mark.parametrize("shape", list(SHAPES.values()))
def test_planted_spikes_are_found_above_the_threshold_only(shape, estimator):
    threshold = bbp_threshold(0.02, shape)
    strengths = [f * threshold for f in (0.3, 0.5, 0.7, 1.5, 2.0, 3.0)]
    draws = [values_of(gaussian(shape, seed, 0.02) + spikes(shape, strengths, 100 + 2 * seed)) for seed in range(6)]
    assert [mp_region_bounds(sigma, shape, estimator, tracy_widom=True)[0] for sigma in draws] == [3] * 6
    # Where they land on average: sqrt((1 + t^2) (aspect + t^2)) / t (Benaych-Georges and Nadakuditi 2012), t in
    # units of noise sqrt(n). Each draw is spread by about one noise.
    found = torch.stack(draws)[:, :3].mean(0)
    unit = 0.02 * math.sqrt(max(shape))
    t = torch.tensor(strengths[:2:-1], dtype=torch.float64) / unit
    assert torch.allclose(found, unit * ((1 + t**2) * (min(shape) / max(shape) + t**2)).sqrt() / t, rtol=0, atol=0.025)


@pytest.mark.parametrize("estimator", list(NOISE_ESTIMATORS))
@pytest.mark.parametrize("shape", list(SHAPES.values()))
def test_noise_is_robust_to_five_per_cent_of_spikes(shape, estimator):
    count = min(shape) // 20
    planted = spikes(shape, [f * bbp_threshold(0.02, shape) for f in torch.linspace(4, 40, count).tolist()])
    sigma = values_of(gaussian(shape, 5, 0.02) + planted)
    assert estimate_noise(sigma, shape, estimator) == pytest.approx(0.02, rel=0.035)
    assert mp_region_bounds(sigma, shape, estimator, tracy_widom=True)[0] == count
    assert float(sigma.std()) > 0.5 * float(values_of(gaussian(shape, 5, 0.02)).max())  # a naive variance would not do


def test_values_below_the_bulk_are_found():
    shape = (192, 768)
    left, sigma, right = torch.linalg.svd(gaussian(shape, 2), full_matrices=False)
    sigma[-5:] *= 0.5
    sigma = values_of((left * sigma) @ right)
    for estimator in NOISE_ESTIMATORS:
        assert select(MarchenkoPastur("below", estimator), sigma, shape).tolist() == list(range(187, 192))


def test_mp_regions_partition_and_their_controls_match():
    shape = (192, 768)
    sigma = values_of(gaussian(shape, 1) + spikes(shape, [60.0] * 9 + [10.0]))
    for estimator in NOISE_ESTIMATORS:
        regions = [MarchenkoPastur(kind, estimator) for kind in ("above", "inside", "below")]
        parts = [select(region, sigma, shape).tolist() for region in regions]
        assert sum(parts, []) == list(range(192))
    above = MarchenkoPastur("above", tracy_widom=True)
    assert len(select(above, sigma, shape)) == 9
    control = select(LowerBulk(above), sigma, shape)
    inside = select(MarchenkoPastur("inside", tracy_widom=True), sigma, shape)
    assert control.tolist() == inside[-9:].tolist()
    assert fraction_interval(control, 192) == (183 / 192, 1)
    assert len(select(Random(above, 0), sigma, shape)) == 9
    threshold = hard_threshold(sigma, shape)
    assert select(GavishDonoho("above"), sigma, shape).tolist() == list(range(9))
    assert select(GavishDonoho("below"), sigma, shape).tolist() == list(range(9, 192))
    assert float(sigma[8]) > threshold > float(sigma[9])
    for region in (above, LowerBulk(above), GavishDonoho("above"), Random(above, 0)):
        assert not region.rank_only
        with pytest.raises(ValueError, match="depends on the singular values"):
            select(region, None, shape)
    labels = [MarchenkoPastur(kind, estimator, margin).label for kind in ("above", "inside", "below")
              for estimator in NOISE_ESTIMATORS for margin in (False, True)]
    labels += [LowerBulk(above).label, GavishDonoho("above").label, Random(above, 0).label]
    assert len(set(labels)) == len(labels)


def test_a_zero_matrix_has_no_noise_and_no_outliers():
    zero = torch.zeros(6, dtype=torch.float64)
    for estimator in NOISE_ESTIMATORS:
        assert estimate_noise(zero, (6, 9), estimator) == 0
        assert mp_region_bounds(zero, (6, 9), estimator) == (0, 6)
    assert hard_threshold(zero, (6, 9)) == 0


def test_tall_and_wide_are_the_same():
    sigma = values_of(gaussian((50, 200)))
    for estimator in NOISE_ESTIMATORS:
        assert estimate_noise(sigma, (50, 200), estimator) == estimate_noise(sigma, (200, 50), estimator)


def test_bad_input():
    with pytest.raises(ValueError, match="unknown noise estimator 'iqr': use gavish_donoho"):
        estimate_noise(torch.ones(5), (5, 6), "iqr")
    with pytest.raises(ValueError, match="unknown noise estimator"):
        MarchenkoPastur("above", "iqr")
    with pytest.raises(ValueError, match="5x6 matrix has 5 singular values"):
        estimate_noise(torch.ones(6), (5, 6))
    with pytest.raises(ValueError, match="in .0, 1."):
        mp_cdf(torch.ones(1), 2.0)
    with pytest.raises(ValueError, match="above, inside, below"):
        MarchenkoPastur("large")
    with pytest.raises(ValueError, match="use above, below"):
        GavishDonoho("inside")
    with pytest.raises(ValueError, match="reference region by mp"):
        LowerBulk(GavishDonoho("above"))
