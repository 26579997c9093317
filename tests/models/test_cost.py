"""Predicted floating-point operations against those that torch counts in transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.models.cost import model_cost
from harness.models.families import FAMILIES, skeleton
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
