"""Keep transformers from looking at the values of a batch before its forward pass, for which a GPU is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_waiting() -> Iterator[None]:
    """Let a causal model take plain rows as they are for the time of the context; no number changes.

    transformers looks whether the positions of a row show several sequences one after the other, which those of plain
    rows never do, and whether a row contains padding that no mask hides, which would be on the right, where no token
    attends to it. Both are looked up by their names in transformers, and a version that lacks one is left as it is.
    """
    from transformers import PreTrainedModel, masking_utils

    replaced: list[tuple[Any, str, Any]] = []
    for owner, name in (
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    ):
        original = getattr(owner, name, None)
        if original is not None:
            replaced.append((owner, name, original))
            setattr(owner, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for owner, name, original in replaced:
            setattr(owner, name, original)
