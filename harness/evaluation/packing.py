"""Pack the requests of a task into padded batches for causal models, so that no sequence is fed twice.

Requests that begin with the same tokens (the choices of a question, documents after one few-shot prefix) may share one
row of a batch, which is then a packed tree. It contains the common tokens once and every continuation after them. A
mask lets each token attend to its own ancestors only, and each token has the position id that it would have if its
sequence were fed alone. Rows are trees if that is cheaper than feeding the sequences one by one, else plain sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.evaluation.requests import Request
from harness.models.cost import model_cost
from harness.models.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A pair of tokens in attention with a mask takes about this many times as long as the same floating-point operations in
# a large matrix product.
ATTENTION_OVERHEAD = 2.0
WIDEST_TREE = 4096  # tokens; the size of a mask is the square of that
# The cost of one more batch, in tokens: it is not worth it if it saves less padding than this.
BATCH_OVERHEAD = 128


@dataclass(frozen=True)
class Sharing:
    """What decides whether a tree is cheaper than its sequences one by one.

    pair: the cost of a pair of tokens in the attention of a block, relative to the cost of a token in its matrix
    products. deepest: the length, in tokens, of the longest sequence that may share a row. It is the width of a sliding
    window, because the mask of a tree has no window.
    """

    pair: float
    deepest: int


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens, and which log-probabilities are wanted of them.

    input_ids: int64 [B, T]. lengths: int64 [B], without the padding.
    rows: int64 [K], the flat indices into B x T at which an output distribution is needed, in ascending order.
    entry_row, targets, entries: int64 [M] each. Number j asks for the log-probability of token targets[j] in the output
        at rows[entry_row[j]]; the answer goes to the index entries[j] of the concatenated Scores.
    position_ids, last: int64 [B, T] for trees, None for plain sequences. They hold the depth of each token in its tree,
        and the index after the last token of the row that may attend to it.
    block_mask: of FlexAttention, if trees are attended by it; then there is no additive mask.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    entry_row: torch.Tensor
    targets: torch.Tensor
    entries: np.ndarray
    position_ids: torch.Tensor | None = None
    last: torch.Tensor | None = None
    block_mask: Any = None

    def model_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of the model's forward, on `device`.

        A batch of trees has an additive mask [B, 1, T, T] in `dtype`, or its block mask. Plain sequences need no mask,
        because in a causal model no token attends to padding on its right.
        """
        inputs: dict[str, Any] = {"input_ids": self.input_ids.to(device, non_blocking=True)}
        if self.position_ids is not None and self.last is not None:
            inputs["position_ids"] = self.position_ids.to(device, non_blocking=True)
            inputs["attention_mask"] = self.block_mask
            if self.block_mask is None:
                inputs["attention_mask"] = tree_mask(self.last.to(device, non_blocking=True), dtype)
        return inputs


def tree_mask(last: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask [B, 1, T, T] in which token i attends to token j if j <= i < last[j].

    last: int64 [B, T], as in Batch.
    """
    index = torch.arange(last.shape[1], device=last.device)
    hidden = (index[:, None] < index[None, :]) | (index[None, :, None] >= last[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype, device=last.device).masked_fill_(
        hidden, torch.finfo(dtype).min
    )[:, None]


@dataclass(frozen=True)
class PackedRequests:
    """All batches of one task. offsets: int64 [R + 1], as in Scores."""

    batches: tuple[Any, ...]
    offsets: np.ndarray
    n_entries: int
    n_tokens: int  # tokens that are fed, without padding
    n_rows: int  # output distributions that are computed


def sharing_of(model: PreTrainedModel, family: Family) -> Sharing | None:
    """Return what decides whether a tree is cheaper in this model; None if its forward does not accept trees."""
    config = model.config.get_text_config()
    if not family.trees or model.config._attn_implementation not in ("sdpa", "eager"):
        return None
    cost = model_cost(model, family)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    pair = ATTENTION_OVERHEAD * cost.pair / (sum(cost.block) / len(cost.block))
    return Sharing(pair, window or np.iinfo(np.int64).max)


@dataclass(frozen=True)
class _Trie:
    """The distinct sequences of some requests, of which none is a prefix of another.

    sequences: S arrays of tokens, in an order in which sequences that begin with the same tokens are neighbours.
    common: int64 [S], the number of first tokens that each sequence shares with the one before it. leaf: int64 [R], for
    each request the index of the sequence off which its answers are read.
    """

    sequences: list[np.ndarray]
    common: np.ndarray
    leaf: np.ndarray


def _trie(requests: Sequence[Request]) -> _Trie:
    keys = [request.tokens.astype("<i8").tobytes() for request in requests]
    order = sorted(range(len(requests)), key=lambda i: keys[i], reverse=True)
    leaf = np.empty(len(requests), dtype=np.int64)
    sequences: list[np.ndarray] = []
    common: list[int] = []
    previous = b""
    # in descending order of the bytes a prefix comes right after the sequences that begin with it
    for i in order:
        if not sequences or not previous.startswith(keys[i]):
            common.append(_n_common(sequences[-1], requests[i].tokens) if sequences else 0)
            sequences.append(requests[i].tokens)
            previous = keys[i]
        leaf[i] = len(sequences) - 1
    return _Trie(sequences, np.array(common, dtype=np.int64), leaf)


def _n_common(one: np.ndarray, other: np.ndarray) -> int:
    n = min(len(one), len(other))
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def _cut(trie: _Trie, sharing: Sharing | None, widest: int) -> list[range]:
    """Cut the order of the sequences into rows so that the cost is least, by dynamic programming.

    A row that is a tree of T tokens costs T + pair T^2. A sequence alone costs T + pair T^2 / 2, because attention
    without a mask skips what is above the diagonal. widest: the most tokens of a tree.
    """
    n = len(trie.sequences)
    if sharing is None:
        return [range(i, i + 1) for i in range(n)]
    lengths = np.array([len(sequence) for sequence in trie.sequences], dtype=np.int64)
    added = np.cumsum(lengths - trie.common)  # a tree of sequences j..i has added[i] - added[j] + lengths[j] tokens
    shares = (trie.common > 0) & (lengths <= sharing.deepest) & (np.roll(lengths, 1) <= sharing.deepest)
    alone = lengths + sharing.pair * lengths.astype(np.float64) ** 2 / 2
    best, start = np.zeros(n + 1), np.zeros(n, dtype=np.int64)
    first = 0
    for i in range(n):
        first = first if shares[i] else i
        while first < i and added[i] - added[first] + lengths[first] > widest:
            first += 1
        best[i + 1], start[i] = best[i] + alone[i], i
        if first < i:
            tokens = (added[i] - added[first:i] + lengths[first:i]).astype(np.float64)
            cost = best[first:i] + tokens + sharing.pair * tokens**2
            j = int(cost.argmin())
            if cost[j] < best[i + 1]:
                best[i + 1], start[i] = cost[j], first + j
    runs, stop = [], n
    while stop:
        runs.append(range(start[stop - 1], stop))
        stop = int(start[stop - 1])
    return runs[::-1]


def _batches(widths: np.ndarray, batch_tokens: int) -> list[range]:
    """Cut rows of descending widths into batches of at most `batch_tokens` padded tokens, or one row.

    The cut has the least cost, which is that of the padded tokens and BATCH_OVERHEAD for each batch.
    """
    n = len(widths)
    best, stop = np.zeros(n + 1), np.zeros(n, dtype=np.int64)
    for i in range(n - 1, -1, -1):
        count = min(n - i, max(1, int(batch_tokens // widths[i])))
        cost = widths[i] * np.arange(1, count + 1) + best[i + 1 : i + count + 1]
        j = len(cost) - 1 - int(cost[::-1].argmin())  # the largest batch of those with equal costs
        best[i], stop[i] = cost[j] + BATCH_OVERHEAD, i + 1 + j
    runs, start = [], 0
    while start < n:
        runs.append(range(start, int(stop[start])))
        start = int(stop[start])
    return runs


def padded_cost(widths: np.ndarray, batch_tokens: int) -> int:
    """Return the cost of scoring sequences of these lengths: their padded tokens, and BATCH_OVERHEAD for each batch."""
    widths = np.sort(widths)[::-1]
    return sum(BATCH_OVERHEAD + len(run) * int(widths[run[0]]) for run in _batches(widths, batch_tokens))


@dataclass(frozen=True)
class _Row:
    """One row of a batch.

    tokens: int64 [T]. depth, last: int64 [T], as position_ids and last of Batch. paths: index of a sequence -> the
    position in the row of each of its tokens.
    """

    tokens: np.ndarray
    depth: np.ndarray
    last: np.ndarray
    paths: dict[int, np.ndarray]


def _row(trie: _Trie, run: range) -> _Row:
    tokens: list[np.ndarray] = []
    depth: list[np.ndarray] = []
    paths: dict[int, np.ndarray] = {}
    closed = np.zeros(sum(len(trie.sequences[s]) for s in run), dtype=np.int64)
    path, size = np.empty(0, dtype=np.int64), 0
    for s in run:
        kept = int(trie.common[s]) if s != run[0] else 0
        closed[path[kept:]] = size
        new = trie.sequences[s][kept:]
        path = np.concatenate([path[:kept], np.arange(size, size + len(new))])
        tokens.append(new)
        depth.append(np.arange(kept, kept + len(new)))
        paths[s] = path
        size += len(new)
    closed[path] = size
    return _Row(np.concatenate(tokens), np.concatenate(depth), closed[:size], paths)


def pack(
    requests: Sequence[Request], batch_tokens: int, sharing: Sharing | None = None, pad_id: int = 0
) -> PackedRequests:
    """Pack requests into batches of at most `batch_tokens` padded tokens, or one row.

    Identical requests are fed once, and the answers to a request that is a prefix of another one are read off the
    longer one. sharing: when to pack trees; None for plain sequences only. pad_id: the token for padding. The batches
    depend only on these arguments, so that scores in low precision do not depend on what else a study measures.
    """
    offsets = np.zeros(len(requests) + 1, dtype=np.int64)
    np.cumsum([len(request.targets) for request in requests], out=offsets[1:])
    trie = _trie(requests)
    runs = _cut(trie, sharing, min(batch_tokens, WIDEST_TREE))
    served: list[list[int]] = [[] for _ in trie.sequences]
    for i, s in enumerate(trie.leaf):
        served[s].append(i)
    batches, n_tokens = [], 0
    # trees and plain sequences are in different batches, because plain sequences need no mask
    for of_trees in (False, True):
        rows = [_row(trie, run) for run in runs if (len(run) > 1) == of_trees]
        n_tokens += sum(len(row.tokens) for row in rows)
        rows.sort(key=lambda row: -len(row.tokens))
        widths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
        for run in _batches(widths, batch_tokens):
            batches.append(_batch([rows[r] for r in run], served, requests, offsets, pad_id))
    return PackedRequests(
        tuple(batches), offsets, int(offsets[-1]), n_tokens, sum(len(batch.rows) for batch in batches)
    )


def _batch(
    members: Sequence[_Row], served: Sequence[Sequence[int]], requests: Sequence[Request], offsets: np.ndarray,
    pad_id: int,
) -> Batch:
    """Return the batch of some rows, which are all trees or all plain sequences.

    served: for each sequence of the trie, the indices of the requests that it answers. offsets: int64 [R + 1], as in
    Scores.
    """
    lengths = np.array([len(row.tokens) for row in members], dtype=np.int64)
    width = int(lengths.max())
    of_trees = any(len(row.paths) > 1 for row in members)
    input_ids = np.full((len(members), width), pad_id, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    # padding attends to itself, because a softmax over nothing would be NaN
    last = np.tile(np.arange(1, width + 1), (len(members), 1))
    flat, targets, entries = [], [], []
    for b, row in enumerate(members):
        input_ids[b, : len(row.tokens)] = row.tokens
        position_ids[b, : len(row.tokens)] = row.depth
        last[b, : len(row.tokens)] = row.last
        for s, path in row.paths.items():
            for i in served[s]:
                flat.append(b * width + path[requests[i].positions])
                targets.append(requests[i].targets)
                entries.append(np.arange(offsets[i], offsets[i + 1]))
    rows, entry_row = np.unique(np.concatenate(flat), return_inverse=True)
    return Batch(
        torch.from_numpy(input_ids), torch.from_numpy(lengths), torch.from_numpy(rows),
        torch.from_numpy(entry_row.astype(np.int64)), torch.from_numpy(np.concatenate(targets)),
        np.concatenate(entries),
        torch.from_numpy(position_ids) if of_trees else None, torch.from_numpy(last) if of_trees else None,
    )
