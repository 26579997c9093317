"""Another implementation of a model's attention, which adds the same numbers in another order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def other_attention(model: PreTrainedModel) -> Iterator[str | None]:
    """Let a model compute attention by another implementation of transformers for the time of the context.

    Yields its name, eager or else sdpa; None if the model has no other, and then nothing is changed.
    """
    configs = [config for config in (getattr(module, "config", None) for module in model.modules())
               if config is not None and hasattr(config, "_attn_implementation")]
    before = [(config, config._attn_implementation) for config in configs]
    usual = model.config._attn_implementation
    other = "sdpa" if usual == "eager" else "eager"
    try:
        try:
            model.set_attn_implementation(other)
        except (ValueError, ImportError):
            pass
        yield other if model.config._attn_implementation == other else None
    finally:
        # The outermost config comes first, because setting it also sets the configs inside of it.
        for config, implementation in before:
            config._attn_implementation = implementation
