"""Tiny randomly-initialised models of every family; sizes differ from each other so that a transposition shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from harness.models.families import auto_class

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, **_TOKENS}
_GQA = {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 128}

TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 67, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 128, **_TOKENS},
    "gpt_neox": {**_SIZES, "intermediate_size": 40, "max_position_embeddings": 128, "rotary_pct": 0.5},
    "llama": _GQA,
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of the tiny model of a family; overrides are config keys."""
    return AutoConfig.for_model(model_type, **{**TINY[model_type], **overrides})


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode with seeded weights, all noise about N(0, 0.2^2) so that every matrix matters."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class(config).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # transformers' own 0.02 leaves attention nearly uniform: q and k would hardly change the output.
                noise = 0.2 * torch.randn(parameter.shape)
                parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model.to(dtype).eval()
