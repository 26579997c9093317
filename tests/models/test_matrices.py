"""Writing a matrix edits exactly the slice of the checkpoint that a reader of the architecture would cut by hand."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from harness.errors import InputError
from harness.models.families import matrices_of, skeleton
from tests.models.tiny import TINY, model_inputs, tiny_config, tiny_model

ALL = slice(None)
# The tiny sizes, written out so that no rule of ours is used: 4 heads of 6 (24 wide), 2 of them for keys and values.
NEOX_ROWS = {part: [head * 18 + part * 6 + row for head in range(4) for row in range(6)] for part in range(3)}


def _linear(block: str, **paths: str) -> dict:
    return {name: (f"{block}.{path}.weight", ALL) for name, path in paths.items()}


def _llama(block: str = "model.layers.1", mlp: bool = True) -> dict:
    names = {f"{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"}
    if mlp:
        names |= {f"{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    return _linear(block, **names)


def _experts(ff: int) -> dict:
    slices = {"router": ("model.layers.2.mlp.gate.weight", ALL)}
    for e in range(3):
        slices[f"gate_proj.e{e}"] = ("model.layers.2.mlp.experts.gate_up_proj", (e, slice(0, ff)))
        slices[f"up_proj.e{e}"] = ("model.layers.2.mlp.experts.gate_up_proj", (e, slice(ff, 2 * ff)))
        slices[f"down_proj.e{e}"] = ("model.layers.2.mlp.experts.down_proj", e)
    return _llama("model.layers.2", mlp=False) | slices


def _bert(prefix: str) -> dict:
    return _linear(
        f"{prefix}.encoder.layer.1",
        **{"q_proj": "attention.self.query", "k_proj": "attention.self.key", "v_proj": "attention.self.value"},
        **{"o_proj": "attention.output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense"},
    )


def _t5_decoder() -> dict:
    slices = {f"{x}_proj": (f"decoder.block.0.layer.0.SelfAttention.{x}.weight", ALL) for x in "qkvo"}
    slices |= {f"cross_{x}_proj": (f"decoder.block.0.layer.1.EncDecAttention.{x}.weight", ALL) for x in "qkvo"}
    ff = "decoder.block.0.layer.2.DenseReluDense"
    slices |= {"gate_proj": (f"{ff}.wi_0.weight", ALL), "up_proj": (f"{ff}.wi_1.weight", ALL)}
    slices["down_proj"] = (f"{ff}.wo.weight", ALL)
    slices["relative_bias"] = ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", ALL)
    return slices


# model type -> (block label, {what follows the label in a matrix's name: (parameter, index)})
BY_HAND = {
    "recall": (
        "1",
        _linear("layers.1", k_proj="self_attn.k_proj", v_proj="self_attn.v_proj", o_proj="self_attn.o_proj")
        | _linear("layers.1", up_proj="mlp.up_proj", down_proj="mlp.down_proj"),
    ),
    "gpt2": (
        "1",
        {
            "q_proj": ("transformer.h.1.attn.c_attn.weight", (ALL, slice(0, 24))),
            "k_proj": ("transformer.h.1.attn.c_attn.weight", (ALL, slice(24, 48))),
            "v_proj": ("transformer.h.1.attn.c_attn.weight", (ALL, slice(48, 72))),
            **_linear("transformer.h.1", o_proj="attn.c_proj", up_proj="mlp.c_fc", down_proj="mlp.c_proj"),
        },
    ),
    "gpt_neox": (
        "1",
        {
            "q_proj": ("gpt_neox.layers.1.attention.query_key_value.weight", NEOX_ROWS[0]),
            "k_proj": ("gpt_neox.layers.1.attention.query_key_value.weight", NEOX_ROWS[1]),
            "v_proj": ("gpt_neox.layers.1.attention.query_key_value.weight", NEOX_ROWS[2]),
            **_linear("gpt_neox.layers.1", o_proj="attention.dense"),
            **_linear("gpt_neox.layers.1", up_proj="mlp.dense_h_to_4h", down_proj="mlp.dense_4h_to_h"),
        },
    ),
    "gptj": (
        "1",
        _linear("transformer.h.1", q_proj="attn.q_proj", k_proj="attn.k_proj", v_proj="attn.v_proj")
        | _linear("transformer.h.1", o_proj="attn.out_proj", up_proj="mlp.fc_in", down_proj="mlp.fc_out"),
    ),
    "opt": (
        "1",
        _linear("model.decoder.layers.1", q_proj="self_attn.q_proj", k_proj="self_attn.k_proj")
        | _linear("model.decoder.layers.1", v_proj="self_attn.v_proj", o_proj="self_attn.out_proj")
        | _linear("model.decoder.layers.1", up_proj="fc1", down_proj="fc2"),
    ),
    **{name: ("1", _llama())
       for name in ("llama", "mistral", "olmo2", "qwen2", "qwen3", "gemma2", "gemma3_text")},
    "gemma3": ("1", _llama("model.language_model.layers.1")),
    "phi3": (
        "1",
        {
            "q_proj": ("model.layers.1.self_attn.qkv_proj.weight", slice(0, 24)),
            "k_proj": ("model.layers.1.self_attn.qkv_proj.weight", slice(24, 36)),
            "v_proj": ("model.layers.1.self_attn.qkv_proj.weight", slice(36, 48)),
            "gate_proj": ("model.layers.1.mlp.gate_up_proj.weight", slice(0, 40)),
            "up_proj": ("model.layers.1.mlp.gate_up_proj.weight", slice(40, 80)),
            **_linear("model.layers.1", o_proj="self_attn.o_proj", down_proj="mlp.down_proj"),
        },
    ),
    "mixtral": ("2", _experts(40)),
    "qwen3_moe": ("2", _experts(20)),
    "olmoe": ("2", _experts(40)),
    "bert": ("1", _bert("bert")),
    "roberta": ("1", _bert("roberta")),
    "t5": ("decoder.0", _t5_decoder()),
}


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(**model_inputs(model)).logits


def _digest(model) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("model_type", TINY)
def test_zeroing_a_matrix_is_zeroing_the_slice_by_hand(model_type: str) -> None:
    ours, by_hand = tiny_model(model_type), tiny_model(model_type)
    pristine = copy.deepcopy(ours.state_dict())
    baseline = _logits(ours)
    label, slices = BY_HAND[model_type]
    matrices = {m.name.removeprefix(f"{label}."): m for m in matrices_of(ours) if m.name.startswith(f"{label}.")}
    assert set(matrices) == set(slices)
    for name, matrix in matrices.items():
        parameter, index = slices[name]
        matrix.write(ours, torch.zeros(matrix.shape))
        with torch.no_grad():
            by_hand.get_parameter(parameter)[index] = 0
        edited = _logits(ours)
        assert torch.equal(edited, _logits(by_hand)), name
        assert not torch.equal(edited, baseline), name
        ours.load_state_dict(pristine)
        by_hand.load_state_dict(pristine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TINY)
def test_writing_back_what_was_read_restores_every_bit(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype)
    before = _digest(model)
    for matrix in matrices_of(model):
        saved = matrix.read(model)
        assert saved.shape == matrix.shape and saved.dtype == dtype and saved.is_contiguous()
        matrix.write(model, torch.full(matrix.shape, 0.3, dtype=torch.float64))
        assert _digest(model) != before, matrix.name
        matrix.write(model, saved)
        assert _digest(model) == before, matrix.name


def test_bits_that_are_no_numbers_are_restored_too() -> None:
    model = tiny_model("gpt2", torch.bfloat16)
    matrix = next(m for m in matrices_of(model) if m.name == "1.k_proj")
    parameter = model.get_parameter(matrix.parameter)
    patterns = torch.tensor([0x7FC1, -0x8000, 0x0001, -0x0080], dtype=torch.int16)  # NaN payload, -0, subnormal, -inf
    parameter.data[0, 24:28] = patterns.view(torch.bfloat16)
    before = _digest(model)
    saved = matrix.read(model)
    matrix.write(model, torch.zeros(matrix.shape))
    matrix.write(model, saved)
    assert _digest(model) == before


def _capture_attention(model) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Make the model record what it hands to attention: query, key and value, each [batch, heads, tokens, head_dim]."""
    calls = []

    def attention(module, query, key, value, *args, **kwargs):
        calls.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", attention)
    AttentionMaskInterface.register("capture", sdpa_mask)
    model.set_attn_implementation("capture")
    return calls


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "mistral", "phi3", "opt"])
def test_matrix_times_input_is_the_projection_the_model_computes(model_type: str) -> None:
    model = tiny_model(model_type).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    paths = {"gpt2": "transformer.h.1.attn.c_attn", "gpt_neox": "gpt_neox.layers.1.attention.query_key_value"}
    paths |= {"phi3": "model.layers.1.self_attn.qkv_proj", "opt": "model.decoder.layers.1.self_attn.k_proj"}
    seen = []
    module = model.get_submodule(paths.get(model_type, "model.layers.1.self_attn.q_proj"))
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calls = _capture_attention(model)
    _logits(model)
    x = seen[0][0, 0]  # the first token: rotary embeddings turn by an angle of zero there
    matrices = {m.name: m for m in matrices_of(model)}
    for part, computed in zip("qkv", calls[1]):
        ours = matrices[f"1.{part}_proj"].read(model) @ x
        if model_type == "opt" and part == "q":
            ours = ours * (24 / 4) ** -0.5  # OPT scales its queries itself
        torch.testing.assert_close(ours, computed[0, :, 0].flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("model_type", "path", "label"),
    [
        ("llama", "model.layers.1.mlp", "1"),
        ("gemma2", "model.layers.1.mlp", "1"),
        ("phi3", "model.layers.1.mlp", "1"),
        ("t5", "encoder.block.1.layer.1.DenseReluDense", "encoder.1"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense", "decoder.1"),
    ],
)
def test_gate_and_up_are_not_mistaken_for_each_other(model_type: str, path: str, label: str) -> None:
    model = tiny_model(model_type).double()
    module = model.get_submodule(path)
    activation = next(child for name, child in module.named_modules() if name in ("act", "act_fn", "activation_fn"))
    matrices = {m.name: m.read(model) for m in matrices_of(model)}
    x = torch.randn(24, 5, dtype=torch.float64)
    gate, up, down = (matrices[f"{label}.{part}_proj"] for part in ("gate", "up", "down"))
    ours = down @ (activation(gate @ x) * (up @ x))
    torch.testing.assert_close(ours.T, module(x.T[None])[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("model_type", "experts", "parts"),
    [
        ("mixtral", "block_sparse_moe.experts.{}.{}.weight", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
        ("qwen3_moe", "mlp.experts.{}.{}.weight", {x: x for x in ("gate_proj", "up_proj", "down_proj")}),
        ("olmoe", "mlp.experts.{}.{}.weight", {x: x for x in ("gate_proj", "up_proj", "down_proj")}),
    ],
)
def test_experts_are_those_of_the_checkpoint(model_type: str, experts: str, parts: dict, tmp_path) -> None:
    """Checkpoints keep one tensor for each expert and projection; transformers fuses them when it loads."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    matrices = {m.name: m for m in matrices_of(model)}
    for expert in range(3):
        for ours, theirs in parts.items():
            stored = checkpoint[f"model.layers.2.{experts.format(expert, theirs)}"]
            assert torch.equal(matrices[f"2.{ours}.e{expert}"].read(model), stored)


def test_write_refuses_another_shape() -> None:
    model = tiny_model("llama")
    matrix = next(m for m in matrices_of(model) if m.name == "0.k_proj")
    with pytest.raises(ValueError, match="0.k_proj"):
        matrix.write(model, torch.zeros(24, 12))


def test_a_weight_without_storage_is_neither_read_nor_written() -> None:
    bare = skeleton(tiny_config("gpt2"))
    matrix = matrices_of(bare)[0]
    with pytest.raises(InputError, match="transformer.h.0.attn.c_attn.weight is not in memory"):
        matrix.read(bare)
    with pytest.raises(InputError, match="model.device_map"):
        matrix.write(bare, torch.zeros(matrix.shape))
