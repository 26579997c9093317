"""From requests to padded batches: sorted by length, bounded in tokens, nothing fed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harness.evaluation.requests import Request


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and what to read off them.

    input_ids: int64 [B, T]. lengths: int64 [B]. rows: int64 [K], ascending flat indices into B x T whose output
    distribution is needed. entry_row: int64 [M], index into `rows`; targets: int64 [M]; entries: int64 [M], where the
    answer goes in the concatenated Scores.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    entry_row: torch.Tensor
    targets: torch.Tensor
    entries: np.ndarray


@dataclass(frozen=True)
class PackedRequests:
    """All batches of one task. offsets: int64 [R + 1] as in Scores."""

    batches: tuple[Batch, ...]
    offsets: np.ndarray
    n_entries: int
    n_tokens: int  # fed, without padding
    n_rows: int  # output distributions computed
    n_tokens_asked: int  # what the requests would feed one by one


def _share_prefixes(requests: Sequence[Request], causal: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Distinct sequences to feed, and for each request the one that serves it.

    In a causal model a request whose tokens are a prefix of another's reads its outputs off the longer one.
    """
    keys = [request.tokens.astype("<i8").tobytes() for request in requests]
    order = sorted(range(len(requests)), key=lambda i: keys[i])
    sequence_of = np.empty(len(requests), dtype=np.int64)
    sequences: list[np.ndarray] = []
    previous: bytes | None = None
    # in descending byte order a longer sequence comes right before its own prefixes
    for i in reversed(order):
        served = previous is not None and (previous.startswith(keys[i]) if causal else previous == keys[i])
        if not served:
            sequences.append(requests[i].tokens)
            previous = keys[i]
        sequence_of[i] = len(sequences) - 1
    return sequences, sequence_of


def pack(requests: Sequence[Request], batch_tokens: int, causal: bool = True, pad_id: int = 0) -> PackedRequests:
    """Group requests into batches of at most `batch_tokens` padded tokens (at least one sequence each).

    The grouping depends only on the requests, so low-precision scores do not move with what else a study measures.
    """
    offsets = np.zeros(len(requests) + 1, dtype=np.int64)
    np.cumsum([len(request.targets) for request in requests], out=offsets[1:])
    sequences, sequence_of = _share_prefixes(requests, causal)
    served: list[list[int]] = [[] for _ in sequences]
    for i, s in enumerate(sequence_of):
        served[s].append(i)
    order = sorted(range(len(sequences)), key=lambda s: (-len(sequences[s]), s))
    batches, start = [], 0
    while start < len(order):
        width = len(sequences[order[start]])
        count = max(1, batch_tokens // width)
        members = order[start : start + count]
        batches.append(_batch(members, sequences, served, requests, offsets, width, pad_id))
        start += count
    return PackedRequests(
        tuple(batches), offsets, int(offsets[-1]), sum(map(len, sequences)),
        sum(len(batch.rows) for batch in batches), sum(len(request.tokens) for request in requests),
    )


def _batch(members, sequences, served, requests, offsets, width, pad_id) -> Batch:
    input_ids = np.full((len(members), width), pad_id, dtype=np.int64)
    lengths = np.empty(len(members), dtype=np.int64)
    flat, targets, entries = [], [], []
    for row, s in enumerate(members):
        input_ids[row, : len(sequences[s])] = sequences[s]
        lengths[row] = len(sequences[s])
        for i in served[s]:
            flat.append(row * width + requests[i].positions)
            targets.append(requests[i].targets)
            entries.append(np.arange(offsets[i], offsets[i + 1]))
    rows, entry_row = np.unique(np.concatenate(flat), return_inverse=True)
    return Batch(
        torch.from_numpy(input_ids), torch.from_numpy(lengths), torch.from_numpy(rows),
        torch.from_numpy(entry_row.astype(np.int64)), torch.from_numpy(np.concatenate(targets)),
        np.concatenate(entries),
    )
