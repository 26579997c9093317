"""Tiny randomly-initialised models of every family; sizes differ from each other so that a transposition shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from harness.models.families import family_of

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, **_TOKENS}
_PLAIN = {**_SIZES, "intermediate_size": 40, "max_position_embeddings": 128}
_GQA = {**_PLAIN, "num_key_value_heads": 2}
_WIDE = {**_GQA, "head_dim": 8}  # q_proj is 32 x 24: heads * head_dim is not hidden_size
_SLIDING = {**_WIDE, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}
_GPT = {"vocab_size": 67, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 40, "n_positions": 128, **_TOKENS}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}

TINY: dict[str, dict[str, Any]] = {
    "recall": {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 128},
    "gpt2": _GPT,
    "gpt_neox": {**_PLAIN, "rotary_pct": 0.5},
    "llama": _GQA,
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {**_SIZES, "ffn_dim": 40, "word_embed_proj_dim": 20, "max_position_embeddings": 128},
    "mistral": {**_WIDE, "sliding_window": 8},
    "qwen2": _GQA,
    "qwen3": _WIDE,
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3": {
        "text_config": _SLIDING,
        "vision_config": {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 66,
    },
    "phi3": _GQA,
    "mixtral": {**_GQA, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {**_WIDE, **_EXPERTS, "moe_intermediate_size": 20, "mlp_only_layers": [1]},
    "olmo2": _GQA,
    "olmoe": {**_GQA, **_EXPERTS},
    "bert": _PLAIN,
    "roberta": _PLAIN,
    "t5": {"vocab_size": 67, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_heads": 4, "num_layers": 2}
    | {"num_decoder_layers": 3, "feed_forward_proj": "gated-gelu", **_TOKENS, "decoder_start_token_id": 0},
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of the tiny model of a family; overrides are config keys."""
    if model_type == "recall":
        import harness.models.recall  # noqa: F401  registers the model with transformers
    return AutoConfig.for_model(model_type, **{**TINY[model_type], **overrides})


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode with seeded weights, all noise about N(0, 0.2^2) so that every matrix matters."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family_of(config).auto_class().from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # transformers' own 0.02 leaves attention nearly uniform: q and k would hardly change the output.
                noise = 0.2 * torch.randn(parameter.shape)
                parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
    return model.to(dtype).eval()


def model_inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 19, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens [batch, tokens] for any family, without special ones; with decoder tokens where it has one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(3, 60, (batch, tokens), generator=generator)}
    inputs["attention_mask"] = torch.ones(batch, tokens, dtype=torch.long)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 60, (batch, tokens - 6), generator=generator)
    return inputs
