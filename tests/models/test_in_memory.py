"""Modules that are in memory: looked at, not taken over; known by their bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import InputError
from harness.models.families import Family, Stored, blocks_of, matrices_of
from harness.models.identity import module_identity
from harness.models.loading import MEMORY, describe_model, evaluating, loaded_from
from harness.models.settings import ModelSettings
from tests.models.tiny import tiny_model


def test_a_module_is_left_as_it_is() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    loaded = loaded_from(model, identity={"digest": "mine"})
    assert loaded.model is model and loaded.description.identity == {"digest": "mine"}
    assert loaded.description.source == MEMORY and loaded.description.dtype == "float32"
    assert [module.training for module in model.modules()] == modes and {True, False} == set(modes)
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_identity_is_every_byte_name_and_setting() -> None:
    def identity(change=lambda model: None, model_type="llama", **overrides):
        model = tiny_model(model_type, **overrides)
        with torch.no_grad():
            change(model)
        return module_identity(model)["digest"]

    def set_bit(model):
        model.model.layers[2].mlp.down_proj.weight.view(torch.int32)[3, 4] ^= 1

    def to_minus_zero(model):
        model.model.norm.weight[0] = -0.0

    def to_zero(model):
        model.model.norm.weight[0] = 0.0

    def add_buffer(model):
        model.register_buffer("extra", torch.zeros(0))

    same = identity()
    assert identity() == same == module_identity(tiny_model("llama").train())["digest"]
    changes = (set_bit, to_minus_zero, to_zero, add_buffer, nn.Module.double, nn.Module.bfloat16)
    others = [identity(change) for change in changes]
    others += [identity(rms_norm_eps=1e-3), identity(model_type="mistral"), identity(seed=1)]
    assert len({same, *others}) == 1 + len(others)


def test_a_model_of_a_python_process_is_no_folder() -> None:
    with pytest.raises(InputError, match="^model.name: 'memory/Mine' was handed over by a Python process; only that"):
        describe_model(ModelSettings(name="memory/Mine"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.writes = nn.Linear(6, 10), nn.Linear(10, 6)


class Mine(nn.Module):
    """No config, no architecture that transformers knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.tower = nn.Embedding(5, 6), nn.ModuleList([Block(), Block()])


FAMILY = Family({"": "tower"}, {"reads.weight": Stored(("up_proj",)), "writes.weight": Stored(("down_proj",))})


def test_an_architecture_of_ones_own() -> None:
    model = Mine()
    loaded = loaded_from(model, family=FAMILY)
    assert [m.name for m in loaded.matrices] == ["0.up_proj", "0.down_proj", "1.up_proj", "1.down_proj"]
    assert [m.shape for m in loaded.matrices[:2]] == [(10, 6), (6, 10)]
    assert loaded.blocks == list(model.tower) == blocks_of(model, FAMILY)
    assert loaded.matrices == matrices_of(model, FAMILY)
    weight = loaded.matrices[2].read(model)
    loaded.matrices[2].write(model, torch.zeros(10, 6))
    assert not model.tower[1].reads.weight.any() and model.tower[0].reads.weight.any()
    loaded.matrices[2].write(model, weight)
    assert torch.equal(model.tower[1].reads.weight, weight)
    with pytest.raises(InputError, match="model type None is not known"):
        loaded_from(model)
    model.tower[1].extra = nn.Linear(2, 2)
    with pytest.raises(InputError, match="block 1 is not a plain None block: its weight 'extra.weight'"):
        loaded_from(model, family=FAMILY)
