"""Pack requests into batches for models that read whole sequences: encoders, encoder-decoders, classifiers.

In such a model every token may attend to every other one. A prefix is therefore another sequence, only identical
requests can share a row, and padding must be masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.evaluation.packing import PackedRequests
from harness.evaluation.requests import Request


@dataclass(frozen=True)
class WholeBatch:
    """Right-padded sequences, and which log-probabilities are wanted of them.

    input_ids: int64 [B, T], the sequences whose outputs are scored; in an encoder-decoder the input of the decoder.
    lengths: int64 [B], without the padding.
    rows, entry_row, targets, entries: as in `packing.Batch`.
    segments: int64 [B, T], as in Request; None if no sequence is a pair of sentences.
    source_ids, source_lengths: int64 [B, S] and [B], the input of the encoder of an encoder-decoder; else None.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    entry_row: torch.Tensor
    targets: torch.Tensor
    entries: np.ndarray
    segments: torch.Tensor | None
    source_ids: torch.Tensor | None
    source_lengths: torch.Tensor | None

    def model_inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward, on `device`, with a mask for padding where it is needed."""
        if self.source_ids is None or self.source_lengths is None:
            inputs = {"input_ids": self.input_ids, "attention_mask": _mask(self.input_ids, self.lengths)}
            if self.segments is not None:
                inputs["token_type_ids"] = self.segments
        else:
            # the decoder needs no mask: it is causal, so that no token attends to padding on its right
            inputs = {
                "input_ids": self.source_ids, "attention_mask": _mask(self.source_ids, self.source_lengths),
                "decoder_input_ids": self.input_ids,
            }
        return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def _mask(tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return (torch.arange(tokens.shape[1], device=lengths.device)[None, :] < lengths[:, None]).long()


def pack_whole(requests: Sequence[Request], batch_tokens: int, pad_id: int = 0) -> PackedRequests:
    """Pack requests into batches of at most `batch_tokens` padded tokens, sources included, or one sequence.

    The longest sequences come first, and identical requests are fed once. pad_id: the token for padding. The batches
    depend only on these arguments.
    """
    offsets = np.zeros(len(requests) + 1, dtype=np.int64)
    np.cumsum([len(request.targets) for request in requests], out=offsets[1:])
    served: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        served.setdefault(_key(request), []).append(i)
    groups = sorted(served.values(), key=lambda group: (*(-n for n in _sizes(requests[group[0]])), group[0]))
    members: list[list[int]] = []
    batches, width = [], np.zeros(2, dtype=np.int64)
    for group in groups:
        width = np.maximum(width, _sizes(requests[group[0]]))
        if members and (len(members) + 1) * width.sum() > batch_tokens:
            batches.append(_batch(requests, members, offsets, pad_id))
            members, width = [], np.array(_sizes(requests[group[0]]))
        members.append(group)
    if members:
        batches.append(_batch(requests, members, offsets, pad_id))
    return PackedRequests(
        tuple(batches), offsets, int(offsets[-1]), sum(sum(_sizes(requests[group[0]])) for group in groups),
        sum(len(batch.rows) for batch in batches),
    )


def _key(request: Request) -> bytes:
    parts = [part for part in (request.tokens, request.segments, request.source) if part is not None]
    return np.concatenate([[len(part) for part in parts], *parts]).astype("<i8").tobytes()


def _sizes(request: Request) -> tuple[int, int]:
    return 0 if request.source is None else len(request.source), len(request.tokens)


def _padded(arrays: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    padded = np.full((len(arrays), lengths.max()), pad_id, dtype=np.int64)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded), torch.from_numpy(lengths)


def _batch(requests: Sequence[Request], members: list[list[int]], offsets: np.ndarray, pad_id: int) -> WholeBatch:
    first = [requests[group[0]] for group in members]
    input_ids, lengths = _padded([request.tokens for request in first], pad_id)
    segments = source_ids = source_lengths = None
    if any(request.segments is not None for request in first):
        blank = (np.zeros(len(request.tokens), dtype=np.int64) for request in first)
        segments, _ = _padded([zeros if request.segments is None else request.segments
                               for request, zeros in zip(first, blank)], 0)
    if first[0].source is not None:
        sources = [request.source for request in first if request.source is not None]
        assert len(sources) == len(first)  # all requests of a task have a source, or none has
        source_ids, source_lengths = _padded(sources, pad_id)
    served = [(row, i) for row, group in enumerate(members) for i in group]
    flat = np.concatenate([row * input_ids.shape[1] + requests[i].positions for row, i in served])
    rows, entry_row = np.unique(flat, return_inverse=True)
    return WholeBatch(
        input_ids, lengths, torch.from_numpy(rows), torch.from_numpy(entry_row.astype(np.int64)),
        torch.from_numpy(np.concatenate([requests[i].targets for _, i in served])),
        np.concatenate([np.arange(offsets[i], offsets[i + 1]) for _, i in served]),
        segments, source_ids, source_lengths,
    )
