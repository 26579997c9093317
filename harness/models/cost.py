"""The cost of a token in each part of a model, in floating-point operations, computed from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.errors import InputError
from harness.models.families import Family, blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelCost:
    """Floating-point operations, where a multiplication and an addition are two.

    block: for the weights of each block, per token. pair: for the attention of one block, per pair of a token and a
    token that it attends to. head: for the output head, per scored position.
    """

    block: tuple[float, ...]
    pair: float
    head: float


def model_cost(model: PreTrainedModel, family: Family | None = None) -> ModelCost:
    """Return the cost of a model, which may be on the meta device.

    In a mixture of experts only the experts that a token uses are counted. family: needed for an architecture that is
    not in FAMILIES. Raises InputError as `blocks_of` does.
    """
    config = model.config.get_text_config()
    blocks = tuple(2.0 * sum(prod(p.shape) * _share(config, p) for p in block.parameters() if p.ndim >= 2)
                   for block in blocks_of(model, family))
    heads = getattr(config, "num_attention_heads", 1)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head = model.get_output_embeddings()
    return ModelCost(blocks, 4.0 * heads * head_dim, 2.0 * prod(head.weight.shape) if head is not None else 0.0)


def key_value_bytes(config: Any, dtype: str) -> int:
    """Return the bytes of the keys and values that a model keeps of one token while it generates text.

    config: the config of transformers. dtype: "float32", "bfloat16" or "float16". A decoder keeps them in each of its
    blocks; the decoder of an encoder-decoder keeps those of its own tokens or of the source's. Blocks whose attention
    reaches a limited number of tokens back keep fewer in all.
    """
    config = config.get_text_config()
    blocks = (config.num_decoder_layers if getattr(config, "num_decoder_layers", None) else
              getattr(config, "decoder_layers", None) or config.num_hidden_layers)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
    kept = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    return 2 * blocks * kept * head_dim * (4 if dtype == "float32" else 2)


def generation_tokens(gib: float, config: Any, dtype: str) -> int:
    """Return the number of tokens whose keys and values take `gib` GiB, as `key_value_bytes` counts them.

    Raises InputError if not even one token fits.
    """
    each = key_value_bytes(config, dtype)
    if not (tokens := int(gib * 2**30 / each)):
        raise InputError(
            f"runtime.generation_gib: {gib} is less than the {each} bytes that the keys and values of one token take"
        )
    return tokens


def _share(config: Any, parameter: nn.Parameter) -> float:
    """Return the share of a parameter by which one token is multiplied: less than 1 for experts, stacked in 3-D."""
    if parameter.ndim != 3:
        return 1.0
    return routed_share(config)


def n_experts(config: Any) -> int:
    """Return the number of experts of a block; 1 for a model without experts."""
    text = config.get_text_config()
    return getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1


def routed_share(config: Any) -> float:
    """Return the share of the experts that one token goes through."""
    experts = n_experts(config)
    return (getattr(config.get_text_config(), "num_experts_per_tok", None) or experts) / experts
