"""A read-only cache: the keys and values of the tokens before one token, so that a block can run on that token alone.

transformers writes every token that it sees into its cache. Here the tokens before are written once, and every later
call of a block sees them without leaving anything behind.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReadOnlyCache:
    """Wraps a cache of the tokens before; `update` returns them with the new ones, and stores nothing.

    Everything else, such as the sizes of masks, is that of the wrapped cache.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, heads, n + 1, head width]. The prefix is shared by all B sequences."""
        layer = self._cache.layers[layer_idx]
        if not layer.is_initialized:
            return key_states, value_states
        rows = len(key_states)
        return tuple(  # type: ignore[return-value]  # of two
            torch.cat([kept.expand(rows, -1, -1, -1), new], dim=-2)
            for kept, new in ((layer.keys, key_states), (layer.values, value_states))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def takes_cache(model: PreTrainedModel) -> bool:
    """Return whether the model can be given a cache of the tokens before."""
    return "past_key_values" in inspect.signature(model.forward).parameters


@torch.no_grad()
def cache_of(model: PreTrainedModel, tokens: Tensor) -> ReadOnlyCache:
    """Return the read-only cache of tokens, int64 [1, n]; n may be 0."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if tokens.shape[1]:
        model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return ReadOnlyCache(cache)
