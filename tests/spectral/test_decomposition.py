"""The accuracy contract, against float64 LAPACK gesdd, and what the a-posteriori check says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.spectral import decomposition
from harness.spectral.decomposition import METHODS, decompose, decompose_many
from tests.simulated import FIRST, SimulatedTensor, simulated

EPS = torch.finfo(torch.float64).eps


def orthonormal(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


def matrix_with(sigma: torch.Tensor, out: int, inp: int, seed: int = 0) -> torch.Tensor:
    return (orthonormal(out, len(sigma), seed) * sigma) @ orthonormal(inp, len(sigma), seed + 1).T


def removed_part(weight: torch.Tensor, dec, start: int, stop: int) -> torch.Tensor:
    chosen = dec.vectors[:, start:stop]
    if dec.side == "left":
        return chosen @ (chosen.T @ weight)
    return (weight @ chosen) @ chosen.T


def assert_contract(weight: torch.Tensor, dec) -> None:
    """Every decile whose boundaries are not degenerate, within 1e-5 or the backward error of gesdd itself."""
    weight = weight.double()
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    rank, norm = len(sigma), float(torch.linalg.matrix_norm(weight))
    bounds = [rank * d // 10 for d in range(11)]

    def degenerate(k: int) -> bool:
        return 0 < k < rank and float(sigma[k - 1] - sigma[k]) <= 1e-9 * float(sigma[k - 1])

    for start, stop in zip(bounds, bounds[1:]):
        if start == stop or degenerate(start) or degenerate(stop):
            continue
        expected = (left[:, start:stop] * sigma[start:stop]) @ right[start:stop]
        error = float(torch.linalg.matrix_norm(removed_part(weight, dec, start, stop) - expected))
        # 200 eps |W|: below about 1e-9 sigma_max gesdd does not know its own answer to 1e-5.
        assert error <= max(1e-5 * float(torch.linalg.matrix_norm(expected)), 200 * EPS * norm), (start, stop)
    # Weyl: every value within the backward error.
    assert torch.allclose(dec.sigma, sigma, rtol=1e-10, atol=20 * EPS * float(sigma[0]))
    assert torch.equal(dec.sigma, dec.sigma.sort(descending=True).values)
    assert dec.orthogonality_error < 1e-13 * max(rank, 10)


@pytest.mark.parametrize("orders", [0, 2, 5, 7, 8, 10, 12])
@pytest.mark.parametrize("shape", [(60, 60), (50, 120), (200, 70)])
def test_contract_on_spectra_of_every_condition(shape, orders):
    rank = min(shape)
    values = torch.logspace(0, -orders, rank, dtype=torch.float64) if orders else torch.linspace(1, 0.5, rank)
    weight = matrix_with(values.double(), *shape)
    dec = decompose(weight)
    assert_contract(weight, dec)
    assert dec.side == ("left" if shape[0] <= shape[1] else "right")
    assert dec.method == ("gesdd" if orders > 8 else dec.method)


@pytest.mark.parametrize("method", ["gram", "gesdd"])
def test_each_method_holds_the_contract_where_it_is_used(method):
    for orders in (1, 4, 7):
        weight = matrix_with(torch.logspace(0, -orders, 64, dtype=torch.float64), 64, 160)
        dec = decompose(weight, method)
        assert dec.method == method
        assert_contract(weight, dec)


def test_one_gram_matrix_without_deflation_would_break_the_contract():
    weight = matrix_with(torch.logspace(0, -7.5, 100, dtype=torch.float64), 100, 200)
    vectors = torch.linalg.eigh(weight @ weight.T).eigenvectors.flip(1)
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    expected = (left[:, 90:] * sigma[90:]) @ right[90:]
    naive = vectors[:, 90:] @ (vectors[:, 90:].T @ weight)
    assert torch.linalg.matrix_norm(naive - expected) > 1e-5 * torch.linalg.matrix_norm(expected)
    dec = decompose(weight)
    assert dec.method == "gram"
    assert_contract(weight, dec)


def test_repeated_values():
    values = torch.tensor([3.0] * 20 + [2.0] * 20 + [1e-4] * 10, dtype=torch.float64)
    weight = matrix_with(values, 50, 80)
    dec = decompose(weight)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    for start, stop in ((0, 20), (20, 40), (40, 50)):  # subspaces between the gaps are determined, vectors are not
        expected = (left[:, start:stop] * values[start:stop]) @ right[start:stop]
        assert torch.allclose(removed_part(weight, dec, start, stop), expected, rtol=0, atol=1e-13)
    assert dec.reconstruction_error < 1e-10


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 30)])
def test_rank_deficient_and_zero(shape):
    rank = min(shape)
    values = torch.linspace(1, 0.1, rank - 7, dtype=torch.float64)
    weight = matrix_with(values, *shape)
    dec = decompose(weight)
    assert dec.method == "gesdd"
    assert torch.allclose(dec.sigma[:-7], values, rtol=1e-12, atol=0) and float(dec.sigma[-7:].max()) < 1e-14
    assert float(removed_part(weight, dec, rank - 7, rank).norm()) < 1e-13
    zero = decompose(torch.zeros(shape))
    assert float(zero.sigma.abs().max()) == 0 and zero.orthogonality_error < 1e-14
    assert zero.reconstruction_error == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_thin_matrices(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    dec = decompose(weight)
    assert_contract(weight, dec)
    assert dec.vectors.shape == (min(shape), min(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_exact_inputs(dtype):
    weight = (torch.randn(48, 100, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    dec = decompose(weight.T)  # a view with swapped strides, as GPT-2 stores it
    assert dec.sigma.dtype == dec.vectors.dtype == torch.float64
    assert_contract(weight.T, dec)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_scale_does_not_matter(scale):
    weight = matrix_with(torch.logspace(0, -6, 40, dtype=torch.float64), 40, 50)
    ours, scaled = decompose(weight), decompose(weight * scale)
    assert scaled.method == "gram"
    assert torch.allclose(scaled.sigma / scale, ours.sigma, rtol=1e-9, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 24),
    inp=st.integers(1, 24),
    orders=st.floats(0, 12),
    zeros=st.integers(0, 3),
    seed=st.integers(0, 10_000),
)
def test_contract_holds_for_any_matrix(out, inp, orders, zeros, seed):
    rank = min(out, inp)
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-orders * torch.rand(rank, generator=generator, dtype=torch.float64))
    values[: min(zeros, rank)] = 0
    weight = matrix_with(values, out, inp, seed)
    assert_contract(weight, decompose(weight))


def test_many_are_decomposed_as_each_alone():
    graded = matrix_with(torch.logspace(0, -6, 16, dtype=torch.float64), 16, 40)
    hopeless = matrix_with(torch.logspace(0, -11, 16, dtype=torch.float64), 16, 40)
    weights = torch.stack([torch.randn(16, 40, dtype=torch.float64), graded, torch.zeros_like(graded), hopeless])
    tall = torch.randn(3, 300, 40, generator=torch.Generator().manual_seed(0))
    mixed = ["gram", "gram", "gesdd", "gesdd"]
    for stack, methods in ((weights, mixed), (weights.mT, mixed), (tall, ["gram"] * 3)):
        many = decompose_many(stack)
        assert [dec.method for dec in many] == methods
        for weight, dec in zip(stack, many):
            assert_contract(weight, dec)
            assert dec.shape == tuple(weight.shape)
            alone = decompose(weight)
            assert torch.equal(dec.sigma, alone.sigma) and torch.equal(dec.vectors, alone.vectors)


def test_no_convergence_falls_back_to_gesdd(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    weight = torch.randn(12, 20, dtype=torch.float64)
    assert decompose(weight).method == "gesdd"
    assert [dec.method for dec in decompose_many(weight[None])] == ["gesdd"]
    with pytest.raises(torch.linalg.LinAlgError):
        decompose(weight, "gram")


def test_the_check_notices_vectors_that_are_not_singular(monkeypatch):
    wrong = orthonormal(20, 20, 5)
    monkeypatch.setitem(METHODS, "gesdd", lambda wide: (wrong, torch.ones(20, dtype=torch.float64), wrong.T @ wide))
    weight = matrix_with(torch.logspace(0, -2, 20, dtype=torch.float64), 20, 30)
    assert decompose(weight, "gesdd").reconstruction_error > 0.1
    assert decompose(weight, "gram").reconstruction_error < 1e-10


def test_bad_input():
    weight = torch.randn(4, 5)
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[1, 2] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            decompose(broken)
        with pytest.raises(ValueError, match="NaN or infinite"):
            decompose_many(broken[None])
    with pytest.raises(ValueError, match="unknown decomposition method 'svd': use auto, gram"):
        decompose(weight, "svd")
    with pytest.raises(ValueError, match=r"got shape \(20,\)"):
        decompose(weight.flatten())
    with pytest.raises(ValueError, match="needs a CUDA tensor"):
        decompose(weight, "gesvd")


def _with_a_null_space(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A graded matrix (values from 1 to 1e-6) with dead rows, dead columns, both, a repeated row, or low rank."""
    out, width = shape
    rank = min(shape)
    weight = matrix_with(torch.logspace(0, -6, rank, dtype=torch.float64), out, width, seed)
    if kind in ("dead rows", "both"):
        weight[[0, out // 2, out - 1]] = 0
    if kind in ("dead columns", "both"):
        weight[:, :: 5] = 0
    if kind == "repeated row":
        weight[1] = weight[0]
    if kind == "low rank":
        values = torch.logspace(0, -6, rank, dtype=torch.float64)
        values[rank // 2 :] = 0
        weight = matrix_with(values, out, width, seed)
    return torch.zeros_like(weight) if kind == "zero" else weight


KINDS = ("dead rows", "dead columns", "both", "repeated row", "low rank", "zero", "full")


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (90, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_null_space_is_taken_out_exactly(kind, shape):
    weight = _with_a_null_space(kind, shape)
    ours = decompose(weight, "deflated")
    assert ours.method == "deflated"
    assert_contract(weight, ours)
    theirs = torch.linalg.svdvals(weight)
    noise = 100 * EPS * float(theirs[0])
    assert torch.equal(ours.sigma > noise, theirs > noise)  # the rank
    if kind in ("dead rows", "zero"):
        assert int((ours.sigma == 0).sum()) >= (3 if kind == "dead rows" and shape != (90, 40) else kind == "zero")


@settings(max_examples=25, deadline=None)
@given(out=st.integers(2, 24), width=st.integers(2, 24), orders=st.floats(0, 7), zeros=st.integers(0, 6),
       dead=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_the_contract_holds_with_any_null_space(out, width, orders, zeros, dead, seed):
    rank = min(out, width)
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (-orders * torch.rand(rank, generator=generator, dtype=torch.float64))
    values[: min(zeros, rank)] = 0
    weight = matrix_with(values, out, width, seed)
    weight[: min(dead, out)] = 0
    try:
        ours = decompose(weight, "deflated")
    except torch.linalg.LinAlgError:  # a value between noise and the guard
        sigma = torch.linalg.svdvals(weight)
        assert bool(((sigma > 50 * EPS * sigma[0]) & (sigma < 2e-8 * sigma[0])).any())
        return
    assert_contract(weight, ours)


def test_deflation_refuses_what_it_cannot_resolve():
    values = torch.cat([torch.logspace(0, -4, 20, dtype=torch.float64), torch.tensor([1e-11, 0.0])])
    with pytest.raises(torch.linalg.LinAlgError, match="between rounding noise"):
        decompose(matrix_with(values, 22, 40), "deflated")


def test_on_a_gpu_a_null_space_does_not_send_the_matrix_to_the_processor(monkeypatch):
    """One dead row, and a pruned expert among others; on a simulated device."""
    monkeypatch.setattr(decomposition, "_gesdd", lambda wide: pytest.fail("LAPACK was asked on the CPU"))
    dead, full = _with_a_null_space("dead rows", (24, 60)), _with_a_null_space("full", (24, 60), 1)
    with simulated() as devices:
        one = decompose(SimulatedTensor(dead, FIRST))
        many = decompose_many(SimulatedTensor(torch.stack([full, torch.zeros_like(full), dead]), FIRST))
        assert one.vectors.device == FIRST and not any("to cpu" in wait for wait in devices.waits)
        sigma = one.sigma.cpu()
    assert [one.method, *(dec.method for dec in many)] == ["deflated", "gram", "deflated", "deflated"]
    assert torch.allclose(sigma, torch.linalg.svdvals(dead), rtol=1e-9, atol=1e-15)
    with pytest.raises(pytest.fail.Exception):
        decompose(dead)  # on the CPU, where LAPACK is at hand, numbers stay what they were


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_null_space_on_cuda(kind):
    weight = _with_a_null_space(kind, (90, 200))
    dec = decompose(weight.cuda())
    assert dec.method == ("gram" if kind in ("full", "dead columns") else "deflated") and dec.vectors.is_cuda
    on_cpu = type(dec)(dec.sigma.cpu(), dec.vectors.cpu(), *[getattr(dec, f) for f in
                       ("side", "shape", "method", "reconstruction_error", "orthogonality_error")])
    assert_contract(weight, on_cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["auto", "gesvd"])
def test_contract_on_cuda(method):
    weight = matrix_with(torch.logspace(0, -6, 96, dtype=torch.float64), 96, 200)
    dec = decompose(weight.cuda(), method)
    assert dec.vectors.is_cuda
    on_cpu = type(dec)(dec.sigma.cpu(), dec.vectors.cpu(), *[getattr(dec, f) for f in
                       ("side", "shape", "method", "reconstruction_error", "orthogonality_error")])
    assert_contract(weight, on_cpu)
