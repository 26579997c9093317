"""The map from architectures to matrices: complete, disjoint, in order, and plain about what it does not know."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, GPT2LMHeadModel, MambaConfig, T5EncoderModel

from harness.errors import InputError
from harness.models.families import (
    FAMILIES,
    GROUPS,
    LAYER_TYPES,
    Family,
    Stored,
    blocks_of,
    expand_layer_types,
    family_of,
    matrices_of,
    skeleton,
)
from tests.models.tiny import TINY, model_inputs, tiny_config, tiny_model

IN_BLOCK = re.compile(r"\b(?:h|layers|layer|block)\.(\d+)\.")


def _weights_in_blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    """By their names alone, so that nothing of ours decides what counts."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and IN_BLOCK.search(name) and "vision_tower" not in name
    }


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("model_type", TINY)
def test_every_element_of_every_weight_is_in_exactly_one_matrix(model_type: str) -> None:
    model = tiny_model(model_type)
    matrices = matrices_of(model)
    assert len({m.name for m in matrices}) == len(matrices)
    outside = {n: p.detach().clone() for n, p in model.named_parameters() if n not in _weights_in_blocks(model)}
    for parameter in _weights_in_blocks(model).values():
        parameter.data.fill_(-1)
    for index, matrix in enumerate(matrices):
        matrix.view(model).fill_(index)
    owners = torch.cat([parameter.detach().flatten() for parameter in _weights_in_blocks(model).values()])
    # Later fills win where two overlap, so that equal counts exclude overlaps, and a gap shows as -1.
    ids, counts = owners.long().unique(return_counts=True)
    assert ids.tolist() == list(range(len(matrices)))
    assert counts.tolist() == [m.shape[0] * m.shape[1] for m in matrices]
    assert all(torch.equal(model.get_parameter(name), before) for name, before in outside.items())


@pytest.mark.parametrize("model_type", TINY)
def test_order_and_names(model_type: str) -> None:
    matrices = matrices_of(tiny_model(model_type))
    keys = [(m.block, LAYER_TYPES.index(m.layer_type), m.expert or 0) for m in matrices]
    assert keys == sorted(keys)
    for m in matrices:
        number = int(IN_BLOCK.search(m.parameter).group(1))
        stack = f"{m.stack}." if m.stack else ""
        assert m.name == f"{stack}{number}.{m.layer_type}" + ("" if m.expert is None else f".e{m.expert}")
        assert m.block == number + (2 if m.stack == "decoder" else 0)


@pytest.mark.parametrize("model_type", TINY)
def test_skeleton_knows_names_and_shapes_without_weights(model_type: str) -> None:
    bare = skeleton(tiny_config(model_type))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    matrices = matrices_of(bare)
    assert matrices == matrices_of(tiny_model(model_type))
    for matrix in matrices:
        assert matrix.view(bare).reshape(matrix.shape).shape == matrix.shape


@pytest.mark.parametrize("model_type", TINY)
def test_blocks_run_in_their_order(model_type: str) -> None:
    model = tiny_model(model_type)
    blocks, ran = blocks_of(model), []
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        model(**model_inputs(model))
    assert ran == list(range(len(blocks)))
    names = {id(p): n for n, p in model.named_parameters()}
    for matrix in matrices_of(model):
        inside = {names[id(p)] for p in blocks[matrix.block].parameters()}
        assert matrix.parameter in inside


def test_block_2_is_not_block_12() -> None:
    model = tiny_model("gpt2", n_layer=13)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for matrix in matrices_of(model):
        if matrix.block == 2:
            matrix.write(model, torch.zeros(matrix.shape))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    paths = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.2.{path}.weight" for path in paths}
    assert len(blocks_of(model)) == 13


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "opt", "t5"])
def test_the_same_matrices_without_a_head_or_with_another(model_type: str) -> None:
    config = tiny_config(model_type, num_labels=3)
    names = [m.name for m in matrices_of(tiny_model(model_type))]
    with torch.device("meta"):
        bare, classifier = AutoModel.from_config(config), AutoModelForSequenceClassification.from_config(config)
    assert [m.name for m in matrices_of(bare)] == names
    assert [m.name for m in matrices_of(classifier)] == names


def test_t5_encoder_alone_and_ungated() -> None:
    encoder = T5EncoderModel(tiny_config("t5"))
    assert {m.stack for m in matrices_of(encoder)} == {"encoder"} and len(blocks_of(encoder)) == 2
    types = {m.layer_type for m in matrices_of(skeleton(tiny_config("t5", feed_forward_proj="relu")))}
    assert {"up_proj", "down_proj"} < types and "gate_proj" not in types


def test_recall_feed_forward_may_be_two_matrices_one_or_none() -> None:
    names = {kind: [m.name for m in matrices_of(tiny_model("recall", feed_forward=kind))] for kind in ("mlp", "linear")}
    attention = ["1.k_proj", "1.v_proj", "1.o_proj"]
    assert names["mlp"][5:] == [*attention, "1.up_proj", "1.down_proj"]
    assert names["linear"][4:] == [*attention, "1.up_proj"]
    assert [m.name for m in matrices_of(tiny_model("recall", feed_forward="none"))][3:] == attention


def test_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'mamba'.*gpt2.*llama.*docs/architecture.md says how") as refused:
        skeleton(MambaConfig())
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="None"):
        family_of(SimpleNamespace())


def test_a_weight_that_the_family_does_not_have_is_refused() -> None:
    model = GPT2LMHeadModel(tiny_config("gpt2"))
    model.transformer.h[1].mlp.register_parameter("lora_A", nn.Parameter(torch.zeros(4, 24)))
    with pytest.raises(InputError, match=r"block 1 .*'mlp\.lora_A'"):
        matrices_of(model)


def test_a_weight_that_is_missing_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers[2].mlp.up_proj
    with pytest.raises(InputError, match=r"block 2 .*'mlp\.up_proj\.weight' is missing"):
        matrices_of(model)


def test_packed_integer_weights_are_refused() -> None:
    model = tiny_model("llama")
    packed = nn.Parameter(torch.zeros(288, 1, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].self_attn.q_proj.weight = packed
    with pytest.raises(InputError, match=r"self_attn\.q_proj\.weight is quantised \(torch\.uint8\)"):
        matrices_of(model)


def test_a_module_without_a_config_needs_a_family_only() -> None:
    block = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    weights = {"up.weight": Stored(("up_proj",)), "down.weight": Stored(("down_proj",))}
    assert [m.name for m in matrices_of(model, Family({"": "layers"}, weights))] == ["0.up_proj", "0.down_proj"]
    with pytest.raises(InputError, match="ModuleDict has none of the blocks of None"):
        matrices_of(model, Family({"": "blocks"}, weights))
    with pytest.raises(InputError, match="model type None is not known"):
        matrices_of(model)


def test_layer_types_expand_in_one_order_without_repeats() -> None:
    assert expand_layer_types(["down_proj", "q_proj", "down_proj"]) == ("q_proj", "down_proj")
    assert expand_layer_types(["mlp"]) == ("gate_proj", "up_proj", "down_proj")
    assert expand_layer_types(["mlp", "up_proj", "attn"]) == expand_layer_types(["all"])
    assert expand_layer_types(["router", "relative_bias"]) == ("router", "relative_bias")
    assert set(expand_layer_types(["all"])) == set(LAYER_TYPES) - {"router", "relative_bias"}
    assert expand_layer_types([]) == ()


def test_unknown_layer_types_are_refused_with_those_known() -> None:
    with pytest.raises(InputError, match=r"target\.layer_types: 'fc_in' .*q_proj.*attn, mlp, all"):
        expand_layer_types(["mlp", "fc_in"])
    assert not set(GROUPS) & set(LAYER_TYPES)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "wte", "wpe", "embed_in", "embed_out", "shared"])
def test_embeddings_are_refused_in_words_of_their_own(name: str) -> None:
    with pytest.raises(InputError, match=f"target.layer_types: '{name}' is an embedding or the head .*tied"):
        expand_layer_types([name])
