"""Experts of one parameter are edited together on a device, and by themselves on the CPU."""

from __future__ import annotations

import pytest
import torch

from harness.models import editing
from harness.models.decompositions import DecompositionCache
from harness.models.editing import Ablation, ablated
from harness.models.loading import LoadedModel, loaded_from
from harness.models.matrices import experts_together, read_all, write_all
from harness.models.targets import TargetSettings, expand_targets
from harness.spectral.regions import small
from tests.models.tiny import tiny_model
from tests.simulated import FIRST, moved, simulated


def _edited(loaded: LoadedModel, values) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """The parameters under an edit of the first block and after it, and how many groups were edited."""
    target = expand_targets(TargetSettings("block", ["gate_proj", "up_proj", "down_proj"], [0]), loaded.matrices)[0]
    groups = experts_together([m for m in loaded.matrices if m.name in target.matrices], loaded.model,
                              editing.EXPERT_BYTES)
    cache = DecompositionCache(loaded, 2**30)
    with ablated(loaded, Ablation(target, small(0.3)), cache):
        during = {name: values(one).clone() for name, one in loaded.model.named_parameters()}
    after = {name: values(one).clone() for name, one in loaded.model.named_parameters()}
    return during, after, len(groups)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_experts_are_edited_together_on_a_device_and_restored(model_type: str) -> None:
    loaded = loaded_from(tiny_model(model_type))
    before = {name: one.clone() for name, one in loaded.model.named_parameters()}
    expected, restored, alone = _edited(loaded, lambda one: one.data)
    experts = [matrix for matrix in loaded.matrices if matrix.expert is not None and matrix.block == 0]
    assert alone == len(experts) >= 9 and all(torch.equal(restored[name], one) for name, one in before.items())
    with simulated() as devices:
        loaded = loaded_from(tiny_model(model_type))
        moved(loaded.model)
        loaded.device = FIRST
        during, after, together = _edited(loaded, lambda one: one.data.values)
        assert together == 3 and devices.operations.count("baddbmm") == 3
    for name, one in before.items():
        assert torch.equal(after[name], one), name
        # an expert that is alone and one among others differ by at most the last bit of float32
        assert torch.allclose(during[name], expected[name], rtol=2e-7, atol=0), name
    assert any(not torch.equal(during[name], one) for name, one in before.items())


def test_a_group_holds_what_fits_and_consecutive_experts_of_one_type() -> None:
    with simulated():
        loaded = loaded_from(tiny_model("mixtral"))
        matrices = [matrix for matrix in loaded.matrices if matrix.block == 0]
        moved(loaded.model)
        experts = [one for one in matrices if one.expert is not None]
        size = 8 * experts[0].shape[0] * experts[0].shape[1]
        names = [[one.name for one in group] for group in experts_together(matrices, loaded.model, 2 * size)]
        assert ["0.gate_proj.e0", "0.gate_proj.e1"] in names and ["0.gate_proj.e2"] in names
        assert ["0.q_proj"] in names
        gap = [experts[0], experts[2]]
        assert len(experts_together(gap, loaded.model, 100 * size)) == 2


def test_several_experts_are_read_and_written_as_each_is() -> None:
    model = tiny_model("mixtral")
    loaded = loaded_from(model)
    for layer_type in ("gate_proj", "up_proj", "down_proj"):
        group = [one for one in loaded.matrices if one.layer_type == layer_type and one.block == 1][1:]
        assert len(group) == 2
        read = read_all(group, model)
        assert all(torch.equal(one, matrix.read(model)) for one, matrix in zip(read, group))
        first = next(one for one in loaded.matrices if one.layer_type == layer_type and one.block == 1).read(model)
        write_all(group, model, read + 1)
        assert all(torch.equal(matrix.read(model), one + 1) for one, matrix in zip(read, group))
        assert torch.equal(
            next(one for one in loaded.matrices if one.layer_type == layer_type and one.block == 1).read(model), first
        )
        with pytest.raises(ValueError, match="are expected"):
            write_all(group, model, read[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    """The edit of all experts together against that of each by itself, on the device."""
    loaded, found = loaded_from(tiny_model("mixtral").to("cuda", torch.bfloat16)), []
    for most in (editing.EXPERT_BYTES, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(editing, "EXPERT_BYTES", most)
            found.append(_edited(loaded, lambda one: one.data)[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
