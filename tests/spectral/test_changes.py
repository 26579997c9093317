"""Statistics of changes against numpy, which forms all singular vectors by LAPACK, and against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness.spectral import changes
from harness.spectral.changes import Change, changes_of, frame, rotated

SHAPES = [(30, 80), (80, 30), (40, 40)]


def gaussian(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(shape, rank=6, size=0.3):
    """A reference and a tuned matrix, whose difference has a steep spectrum and some noise."""
    reference = gaussian(*shape, seed=1)
    change = gaussian(shape[0], rank, seed=2) @ gaussian(rank, shape[1], seed=3) / math.sqrt(rank)
    return reference, reference + size * change + gaussian(*shape, seed=4, scale=0.01)


def numpy_frame(matrix):
    output, sigma, entering = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return output, sigma, entering.T


@pytest.mark.parametrize("shape", SHAPES)
def test_every_statistic_is_that_of_numpy(shape):
    reference, tuned = pair(shape)
    base = frame(reference)
    change = next(changes_of(reference, tuned, [], [], "m"))
    ours = {**changes.spectrum_columns(change.frame, shape, "gavish_donoho", False),
            **changes.relation_columns(base, reference, change)}
    b, w = reference.numpy(), tuned.numpy()
    d = w - b
    (ub, sb, vb), (uw, sw, vw), (ud, sd, vd) = map(numpy_frame, (reference, tuned, tuned - reference))
    p, q = sd / sd.sum(), sd**2 / (sd**2).sum()
    assert ours["change_sigma_max"] == pytest.approx(sd[0], rel=1e-12)
    assert ours["change_stable_rank"] == pytest.approx((sd**2).sum() / sd[0] ** 2, rel=1e-10)
    assert ours["change_effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert ours["change_entropy"] == pytest.approx(-(q * np.log(q)).sum(), rel=1e-10)
    assert ours["change_rank_90"] == 1 + int((np.cumsum(sd**2) < 0.9 * (sd**2).sum()).sum())
    assert ours["change_n_above"] == 6  # the planted directions
    scaling = (sw * sb).sum() / (sb**2).sum()
    assert ours["scaling"] == pytest.approx(scaling, rel=1e-12)
    assert ours["scaling_residual"] == pytest.approx(np.linalg.norm(sw - scaling * sb) / np.linalg.norm(sw), rel=1e-9)
    qu, qv = ub.T @ uw, vb.T @ vw
    consistency = (qu * qv).sum() / (np.linalg.norm(qu) * np.linalg.norm(qv))
    assert ours["rotation_consistency"] == pytest.approx(consistency, rel=1e-9)
    along = np.array([ub[:, i] @ d @ vb[:, i] for i in range(len(sb))])
    assert ours["value_share"] == pytest.approx((along**2).sum() / (d**2).sum(), rel=1e-9)
    seen = np.linalg.norm(ud[:, :10].T @ b @ vd[:, :10])
    assert ours["amplification"] == pytest.approx(np.linalg.norm(sd[:10]) / seen, rel=1e-8)
    for side, of_base, of_tuned, of_change in (("output", ub, uw, ud), ("input", vb, vw, vd)):
        intruders = sum(np.abs(of_base.T @ of_tuned[:, j]).max() < 0.5 for j in range(10))
        assert ours[f"intruders_{side}"] == intruders
        overlap = np.linalg.norm(of_change[:, :10].T @ of_base[:, :10]) ** 2 / 10
        assert ours[f"overlap_top_k_{side}"] == pytest.approx(overlap, rel=1e-8)


def test_a_planted_direction_is_an_intruder():
    reference = gaussian(60, 90)
    strong = torch.linalg.qr(gaussian(60, 60, seed=5)).Q[:, :1] @ torch.linalg.qr(gaussian(90, 90, seed=6)).Q[:1]
    change = next(changes_of(reference, reference + 40 * strong, [], [], "m"))
    row = changes.relation_columns(frame(reference), reference, change)
    assert (row["intruders_output"], row["intruders_input"]) == (1, 1)
    assert changes.spectrum_columns(change.frame, (60, 90), "gavish_donoho", False)["change_rank_90"] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_tenths_are_those_of_numpy(shape):
    reference, tuned = pair(shape)
    change = next(changes_of(reference, tuned, [], [], "m"))
    rows = changes.region_rows(frame(reference), change)
    d, (ub, sb, vb), (uw, sw, vw) = (tuned - reference).numpy(), *map(numpy_frame, (reference, tuned))
    n = min(shape) // 10
    for row in rows:
        at = slice((row["decile"] - 1) * n, row["decile"] * n)
        of_base, of_tuned, projected = (
            (ub, uw, ub[:, at].T @ d) if row["side"] == "output" else (vb, vw, d @ vb[:, at])
        )
        assert row["energy"] == pytest.approx(np.linalg.norm(projected) ** 2 / np.linalg.norm(d) ** 2, rel=1e-8)
        assert row["energy_expected"] == n / shape[0 if row["side"] == "output" else 1]
        assert row["energy_ratio"] == pytest.approx(row["energy"] / row["energy_expected"])
        assert row["sigma_shift"] == pytest.approx(sw[at].sum() / sb[at].sum() - 1, rel=1e-7, abs=1e-12)
        best = [np.abs(of_base.T @ of_tuned[:, j]).max() for j in range(at.start, at.stop)]
        assert row["best_cosine"] == pytest.approx(np.mean(best), rel=1e-8)
    assert len(rows) == 20
    short = "output" if shape[0] <= shape[1] else "input"
    assert sum(row["energy"] for row in rows if row["side"] == short) == pytest.approx(1)


def test_controls_have_the_size_of_the_change_and_random_directions():
    reference, tuned = pair((60, 150))
    real, turned, again, noise, _ = changes_of(reference, tuned, ["rotated", "noise"], [0, 1], "m")
    size = float(torch.linalg.matrix_norm(real.matrix))
    for control in (turned, again, noise):
        assert float(torch.linalg.matrix_norm(control.matrix)) == pytest.approx(size, rel=1e-12)
    assert (turned.control, turned.seed, again.seed, noise.control) == ("rotated", 0, 1, "noise")
    sigma = torch.linalg.svdvals(turned.matrix)
    assert torch.allclose(sigma, real.frame.sigma, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(turned.matrix, again.matrix)
    same = list(changes_of(reference, tuned, ["rotated"], [0], "m"))[1]
    other = list(changes_of(reference, tuned, ["rotated"], [0], "n"))[1]
    assert torch.equal(same.matrix, turned.matrix) and not torch.equal(other.matrix, turned.matrix)


def test_the_energy_ratio_of_random_changes_is_one():
    """The one calibrated statistic: its mean over draws is 1 within four standard errors, in every tenth."""
    reference, tuned = pair((60, 150))
    base = frame(reference)
    _, *drawn = changes_of(reference, tuned, ["rotated"], [*range(40)], "m")
    draws = [changes.region_rows(base, change) for change in drawn]
    ratios = np.array([[row["energy_ratio"] for row in rows] for rows in draws])
    errors = ratios.std(0, ddof=1) / math.sqrt(len(draws))
    assert (np.abs(ratios.mean(0) - 1) < 4 * errors).all() and errors.max() < 0.1


def test_a_matrix_that_did_not_change_has_no_controls():
    reference = gaussian(20, 30)
    (only,) = changes_of(reference, reference.clone(), ["rotated", "noise"], [0, 1], "m")
    assert only.control == "real" and float(only.frame.sigma[0]) == 0


def test_a_change_of_low_rank_leaves_out_what_it_does_not_determine():
    reference = gaussian(50, 70)
    low = gaussian(50, 3, seed=8) @ gaussian(3, 70, seed=9)
    change = next(changes_of(reference, reference + low, [], [], "m"))
    assert change.frame.determined() in range(3, 51)
    exact = Change("real", None, low, frame(low), frame(reference + low))
    assert exact.frame.determined() == 3 and changes.spectrum_columns(exact.frame, (50, 70), "usvt", False)
    row = changes.relation_columns(frame(reference), reference, exact)
    ud, _, vd = np.linalg.svd(low.numpy(), full_matrices=False)
    seen = np.linalg.norm(ud[:, :3].T @ reference.numpy() @ vd[:3].T)
    assert row["amplification"] == pytest.approx(np.linalg.norm(low.numpy()) / seen, rel=1e-8)


def test_overlaps_of_two_changes_are_those_of_numpy():
    one, two = (frame(gaussian(40, 60, seed=seed)) for seed in (1, 2))
    row = changes.overlap_columns(one, two)
    (ua, sa, va), (ub, sb, vb) = (numpy_frame(gaussian(40, 60, seed=seed)) for seed in (1, 2))
    d = ua * sa @ va.T
    assert row["energy_kept_output"] == pytest.approx(np.linalg.norm(ub[:, :10].T @ d) ** 2 / np.linalg.norm(d) ** 2)
    assert row["energy_kept_input"] == pytest.approx(np.linalg.norm(d @ vb[:, :10]) ** 2 / np.linalg.norm(d) ** 2)
    assert row["mode_overlap_output"] == pytest.approx(np.linalg.norm(ua[:, :10].T @ ub[:, :10]) ** 2 / 10)
    assert row["mode_overlap_input"] == pytest.approx(np.linalg.norm(va[:, :10].T @ vb[:, :10]) ** 2 / 10)
    u, v = np.hstack([ua[:, :10], ub[:, :10]]), np.hstack([va[:, :10], vb[:, :10]])
    s = np.diag(np.concatenate([sa[:10], sb[:10]]))
    interference = np.abs((u.T @ u - np.eye(20)) @ s @ (v.T @ v - np.eye(20))).sum()
    assert row["interference"] == pytest.approx(interference)
    same = changes.overlap_columns(one, one)
    assert same["mode_overlap_output"] == pytest.approx(1)
    turned = changes.overlap_columns(rotated(one, 0, "a"), rotated(one, 0, "b"))
    assert turned["mode_overlap_output"] == pytest.approx(10 / 40, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_rounding_floor_is_what_rounding_does(dtype):
    exact = gaussian(400, 300, scale=0.02)
    exact[0, :50] = 0
    stored = exact.to(dtype).to(torch.float64)
    measured = float(torch.linalg.matrix_norm(stored - exact) / torch.linalg.matrix_norm(exact))
    assert changes.rounding_floor(stored, exact) == pytest.approx(measured, rel=0.01)
