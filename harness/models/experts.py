"""The plain loop over the experts of a mixture, in place of fused products that cannot be differentiated forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def plain_experts(block: nn.Module) -> Iterator[None]:
    """Let a block compute its experts one after the other for the time of the context; other blocks change nothing."""
    found: list[Any] = [getattr(module, "config", None) for module in block.modules()]
    configs = {id(one): one for one in found if getattr(one, "_experts_implementation", None) is not None}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
