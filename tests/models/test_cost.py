"""Predicted floating-point operations against those that torch counts in transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from harness.errors import InputError
from harness.models.cost import generation_tokens, key_value_bytes, model_cost, n_experts, routed_share
from harness.models.families import FAMILIES, matrices_of, skeleton
from tests.models.tiny import tiny_config, tiny_model

DENSE = [name for name, family in FAMILIES.items() if family.kind == "causal"]
DENSE = [name for name in DENSE if name not in ("mixtral", "qwen3_moe", "olmoe", "recall")]


@pytest.mark.parametrize("model_type", DENSE)
def test_operations_of_blocks_attention_and_head(model_type: str) -> None:
    tokens = 17
    model = tiny_model(model_type, attn_implementation="eager")
    cost = model_cost(skeleton(tiny_config(model_type)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(3, 3 + tokens)[None], use_cache=False)
    outside = 2 * tokens * 2 * 24 * 20 if model_type == "opt" else 0  # its projections into and out of the stream
    rotary = 0 if model_type in ("gpt2", "opt") else counter.get_total_flops() * 0.01  # angles are a product too
    predicted = sum(tokens * (block + tokens * cost.pair) for block in cost.block) + tokens * cost.head
    assert predicted <= counter.get_total_flops() - outside <= predicted + rotary


def test_of_a_mixture_only_the_experts_that_a_token_uses_are_counted() -> None:
    sparse, dense = (
        model_cost(skeleton(tiny_config("mixtral", num_experts_per_tok=used))) for used in (1, 3)
    )
    assert dense.block[0] - sparse.block[0] == 2 * 2 * 3 * 24 * 40  # two experts of three matrices


def cache_bytes(cache) -> int:
    """The bytes of the keys and values that transformers keeps."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@pytest.mark.parametrize("model_type", [*DENSE, "mixtral", "qwen3_moe", "olmoe"])
def test_keys_and_values_of_a_token_against_what_transformers_keeps(model_type: str) -> None:
    model = tiny_model(model_type)
    tokens = torch.arange(3, 8).repeat(2, 1)  # fewer than a sliding window
    with torch.no_grad():
        kept = model(input_ids=tokens, use_cache=True).past_key_values
    assert key_value_bytes(model.config, "float32") * tokens.numel() == cache_bytes(kept)
    assert key_value_bytes(model.config, "bfloat16") * 2 == key_value_bytes(model.config, "float32")


def test_keys_and_values_of_an_encoder_decoder() -> None:
    """Of a source of 7 tokens and 5 tokens of the decoder, as many as of one text of 12."""
    model = tiny_model("t5")
    source, fed = torch.arange(3, 10).repeat(2, 1), torch.arange(3, 8).repeat(2, 1)
    with torch.no_grad():
        kept = model(input_ids=source, decoder_input_ids=fed, use_cache=True).past_key_values
    total = cache_bytes(kept.self_attention_cache) + cache_bytes(kept.cross_attention_cache)
    assert key_value_bytes(model.config, "float32") * 2 * 12 == total


def test_tokens_that_a_memory_holds() -> None:
    config = AutoConfig.for_model(  # Llama-3-8B: 8 heads of 128 in 32 blocks, 131,072 bytes in bfloat16
        "llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    )
    assert generation_tokens(20, config, "bfloat16") == 163840
    with pytest.raises(InputError, match=r"^runtime.generation_gib: 1e-05 is less than the 131072 bytes"):
        generation_tokens(1e-5, config, "bfloat16")


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe", "olmoe", "recall"])
def test_experts_of_a_config(model_type) -> None:
    config = tiny_config(model_type)
    experts = {matrix.expert for matrix in matrices_of(skeleton(config))} - {None}
    assert n_experts(config) == max(1, len(experts))
    assert routed_share(config) == (config.num_experts_per_tok if n_experts(config) > 1 else 1) / n_experts(config)
