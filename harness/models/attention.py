"""Another implementation of a model's attention, which adds the same numbers in another order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def other_attention(model: PreTrainedModel) -> Iterator[str | None]:
    """Let a model compute attention by another implementation of transformers for the time of the context.

    Yields its name, eager or else sdpa; None if the model has no other, and then nothing is changed.
    """
    with _restored(model):
        other = "sdpa" if model.config._attn_implementation == "eager" else "eager"
        try:
            model.set_attn_implementation(other)
        except (ValueError, ImportError):
            pass
        yield other if model.config._attn_implementation == other else None


@contextmanager
def flex_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model that has FlexAttention in transformers compute attention by it for the time of the context."""
    with _restored(model) as configs:
        for config in configs:
            config._attn_implementation = "flex_attention"
        yield


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Yield the configs that say how a model computes attention; afterwards they say what they said before."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())
               if config is not None and hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        yield list(configs.values())
    finally:
        # The outermost config comes first, because setting it also sets the configs inside of it.
        for config, implementation in before:
            config._attn_implementation = implementation
