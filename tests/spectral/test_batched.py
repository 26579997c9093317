"""Edits of several matrices at once: on the CPU those of each by itself, and on a device the same up to float64."""

from dataclasses import asdict, replace

import pytest
import torch

from harness.spectral import batched
from harness.spectral.ablation import Operation, ablate, edit
from harness.spectral.batched import Part, edit_each
from harness.spectral.decomposition import decompose
from tests.simulated import FIRST, SimulatedTensor, simulated


def _weights(shape: tuple[int, int], n: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def _parts(weights: torch.Tensor, n_removed: int) -> list[Part]:
    """Other positions in every matrix, as those of a random control are."""
    generator, rank = torch.Generator().manual_seed(1), min(weights.shape[1:])
    return [Part(decompose(weight), torch.randperm(rank, generator=generator)[:n_removed].sort().values)
            for weight in weights]


def test_on_the_cpu_every_matrix_is_edited_by_itself_bit_for_bit() -> None:
    weights = _weights((9, 14))
    parts = _parts(weights, 3)
    edited, removals = edit_each(weights, parts)
    for weight, part, after, removed in zip(weights, parts, edited, removals):
        own, of_own = edit(weight, part.decomposition, part.indices)
        assert torch.equal(after, own) and removed == of_own


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("n_removed", [0, 1, 5, 10, "all"])
def test_products_over_all_matrices_give_the_same_up_to_float64(shape, n_removed) -> None:
    n = min(shape) if n_removed == "all" else n_removed
    weights = _weights(shape, dtype=torch.float64)
    parts = _parts(weights, n)
    edited, removals = batched._edit_together(weights, parts)
    for weight, part, after, removed in zip(weights, parts, edited, removals):
        exact, (_, own) = ablate(weight, part.decomposition, part.indices), edit(weight, *_of(part))
        assert (after - exact).abs().max() < 1e-14 * weight.abs().max() * 20
        if n in (0, min(shape)):
            assert torch.equal(after, exact)
        found, expected = asdict(removed), asdict(own)
        for name, value in expected.items():
            if name == "realised_removal":  # of rounding noise
                assert (value is None) == (found[name] is None) and (value is None or abs(found[name] - value) < 1e-12)
            else:
                assert found[name] == (value if value is None else pytest.approx(value, rel=1e-12)), name


def _of(part: Part) -> tuple:
    return part.decomposition, part.indices


def test_after_rounding_no_weight_of_bfloat16_differs() -> None:
    weights = _weights((24, 40), n=8, dtype=torch.bfloat16)
    parts = _parts(weights, 7)
    assert torch.equal(batched._edit_together(weights, parts)[0], edit_each(weights, parts)[0])


def test_a_wrong_position_is_refused() -> None:
    weights = _weights((4, 6), n=2)
    good = _parts(weights, 2)
    for indices in (torch.tensor([1, 4]), torch.tensor([1, 1])):
        with pytest.raises(ValueError, match="indices"):
            batched._edit_together(weights, [good[0], replace(good[1], indices=indices)])


def test_only_equal_removals_are_taken_together() -> None:
    weights = _weights((6, 8), n=2)
    one, two = _parts(weights, 2)
    assert batched._alike([one, two])
    assert not batched._alike([one, replace(two, indices=two.indices[:1])])
    assert not batched._alike([one, replace(two, operation=Operation(scale=0.5))])
    assert not batched._alike([one, replace(two, operation=Operation(factors=torch.ones(2, dtype=torch.float64)))])
    assert not batched._alike([one, replace(two, operation=Operation(inputs=torch.eye(8, dtype=torch.float64)))])


def test_on_a_device_the_host_waits_once_for_all_matrices() -> None:
    weights = _weights((12, 20), n=6)
    parts = _parts(weights, 4)
    expected = edit_each(weights, parts)[0]
    with simulated() as devices:
        moved = [
            replace(part, decomposition=replace(
                part.decomposition, sigma=SimulatedTensor(part.decomposition.sigma, FIRST),
                vectors=SimulatedTensor(part.decomposition.vectors, FIRST),
            )) for part in parts
        ]
        devices.waits.clear()
        devices.operations.clear()
        edited, removals = edit_each(SimulatedTensor(weights, FIRST), moved)
        assert devices.waits == ["_to_copy from cuda:0 to cpu"]
        assert devices.operations.count("baddbmm") == 1 and "mm" not in devices.operations
        assert len(removals) == 6
        assert torch.equal(edited.values, expected)
