"""Other batches of the same examples, which may add the same numbers in another order.

Sums are rounded in the order in which a kernel adds, and that order may depend on the shape of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from harness.evaluation.packing import Batch
from harness.evaluation.settings import ScoringOptions
from harness.evaluation.whole_packing import WholeBatch

AnyBatch = Batch | WholeBatch


def other_options(options: ScoringOptions, batches: Sequence[AnyBatch], share: float) -> ScoringOptions:
    """Return options under which the examples of some batches are scored in other batches.

    No context is shared. A batch has at most `share` of the tokens of the largest of those batches that have two rows
    or more, so that at least this one is divided. If each row is a batch of its own, twice the tokens of the largest.
    """
    several = [batch.input_ids.numel() for batch in batches if batch.input_ids.shape[0] > 1]
    tokens = int(share * max(several)) if several else 2 * max(batch.input_ids.numel() for batch in batches)
    return dataclasses.replace(options, batch_tokens=max(1, tokens), reuse=False, share_context=False)


def batches_differ(one: Sequence[AnyBatch], other: Sequence[AnyBatch]) -> bool:
    """Return whether some batch of the second list is not in the first."""
    known = {_content(batch) for batch in one}
    return any(_content(batch) not in known for batch in other)


def _content(batch: AnyBatch) -> tuple[tuple[int, ...], bytes]:
    source = batch.source_ids if isinstance(batch, WholeBatch) else None
    tensors = [batch.input_ids] if source is None else [batch.input_ids, source]
    return tuple(batch.input_ids.shape), b"".join(tensor.numpy().tobytes() for tensor in tensors)
