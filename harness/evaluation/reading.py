"""Compute the log-probabilities of the wanted tokens from the hidden states that enter the output head.

Logits are computed for scored positions only, and for a chunk of these at a time. On the CPU the head is even applied
to one part of the vocabulary at a time, whose logits stay in the processor's cache; a running maximum and a running sum
give the softmax over the whole vocabulary (the online softmax of arXiv 1805.02867, algorithm 3). On a GPU with
runtime.compile, everything after the product is one compiled function, which goes through the logits less often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

TILE_ELEMENTS = 1 << 21  # logits that are held at once on the CPU: 8 MiB in float32


@dataclass(frozen=True)
class Reading:
    """Which log-probabilities are wanted of the outputs of one batch, in chunks of rows.

    rows, entry_row, targets, entries: as in `packing.Batch`, but sorted so that entry_row is ascending. entries is a
    numpy array, because the scores are on the CPU. bounds: for each chunk its first row, the row after its last one,
    and the same for its entries.
    """

    rows: Tensor
    entry_row: Tensor
    targets: Tensor
    entries: np.ndarray
    bounds: tuple[tuple[int, int, int, int], ...]

    def to(self, device: torch.device) -> Reading:
        """The same reading with its tensors on `device`."""
        return replace(
            self, rows=self.rows.to(device), entry_row=self.entry_row.to(device), targets=self.targets.to(device)
        )


@dataclass(frozen=True)
class Head:
    """The output head of a model.

    outputs: a function from hidden states [k, d] to outputs [k, vocabulary] of any floating-point type.
    softcap: the logits are tanh(outputs / softcap) * softcap in float32, or the outputs if it is None.
    weight, bias: set if the head is only a matrix product with a bias, so that it can be applied to parts of the
    vocabulary; otherwise weight is None.
    answers: what reads a chunk of outputs, `answers_of` or the same compiled.
    """

    outputs: Callable[[Tensor], Tensor]
    softcap: float | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    answers: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=lambda: answers_of)


def head_of(module: nn.Module, softcap: float | None = None, compiled: bool = False) -> Head:
    """Return the output head that a module computes, followed by tanh(logits / softcap) * softcap as in Gemma 2.

    compiled: whether what reads whole rows of outputs is compiled. It takes seconds once for each type of outputs.
    """
    answers = torch.compile(answers_of, dynamic=True) if compiled else answers_of
    hooked = "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    if type(module) is nn.Linear and module.weight.device.type == "cpu" and not hooked:
        return Head(module, softcap, module.weight, module.bias, answers)
    return Head(module, softcap, answers=answers)


def reading_of(
    rows: Tensor, entry_row: Tensor, targets: Tensor, entries: np.ndarray, logit_rows: int
) -> Reading:
    """Return the reading of a batch in chunks of at most `logit_rows` rows.

    rows, entry_row, targets, entries: as in `packing.Batch`, on the CPU.
    """
    order = torch.argsort(entry_row, stable=True)
    entry_row, targets, entries = entry_row[order], targets[order], entries[order.numpy()]
    starts = list(range(0, len(rows), logit_rows))
    stops = [*starts[1:], len(rows)]
    cuts = np.searchsorted(entry_row.numpy(), [*starts, len(rows)]).tolist()
    bounds = tuple(zip(starts, stops, cuts, cuts[1:]))
    return Reading(rows, entry_row, targets, entries, bounds)


def read(head: Head, hidden: Tensor, reading: Reading, needs_rank: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return log-probability, greedy and rank of the entries of `reading`.

    hidden: [K, d], the hidden states at its rows. The log-probability is float32 [M], the natural logarithm. greedy is
    bool [M]: whether the target has the largest logit, and is the first token that has it. rank is int64 [M], the
    number of tokens with a strictly larger logit, or None without `needs_rank`.
    """
    device, n = hidden.device, len(reading.targets)
    logprob = torch.empty(n, dtype=torch.float32, device=device)
    greedy = torch.empty(n, dtype=torch.bool, device=device)
    rank = torch.empty(n, dtype=torch.int64, device=device) if needs_rank else None
    tiled = head.weight is not None and not needs_rank
    for start, stop, first, last in reading.bounds:
        local, targets = reading.entry_row[first:last] - start, reading.targets[first:last]
        if tiled:
            logprob[first:last], greedy[first:last] = _read_tiled(head, hidden[start:stop], local, targets)
            continue
        outputs = head.outputs(hidden[start:stop])
        logprob[first:last], greedy[first:last], ranks = head.answers(outputs, head.softcap, local, targets, needs_rank)
        if rank is not None and ranks is not None:
            rank[first:last] = ranks
    return logprob, greedy, rank


def answers_of(
    outputs: Tensor, softcap: float | None, local: Tensor, targets: Tensor, needs_rank: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `read` returns, of the targets [m] in the rows `local` [m] of outputs [k, vocabulary]."""
    logits = _capped(outputs.float(), softcap)
    target_logit = logits[local, targets]
    logprob = target_logit - torch.logsumexp(logits, dim=-1)[local]
    greedy = logits.argmax(dim=-1)[local] == targets
    return logprob, greedy, (logits[local] > target_logit[:, None]).sum(dim=-1) if needs_rank else None


def _read_tiled(head: Head, hidden: Tensor, local: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as `read` for one chunk on the CPU, with the logits of one part of the vocabulary at a time."""
    weight = head.weight
    assert weight is not None
    n_rows, vocabulary = len(hidden), len(weight)
    width = min(vocabulary, max(512, TILE_ELEMENTS // n_rows))
    largest = torch.full((n_rows,), -torch.inf)
    total = torch.zeros(n_rows)
    target_logit = torch.empty(len(targets))
    greedy = torch.zeros(len(targets), dtype=torch.bool)
    order = torch.argsort(targets, stable=True)
    edges = list(range(0, vocabulary, width)) + [vocabulary]
    cuts = torch.searchsorted(targets[order], torch.tensor(edges)).tolist()
    buffer = torch.empty(n_rows * width, dtype=hidden.dtype)
    for start, stop, first, last in zip(edges, edges[1:], cuts, cuts[1:]):
        # the tile is contiguous, because the product is fastest then; a slice of columns would not be
        tile = buffer[: n_rows * (stop - start)].view(n_rows, stop - start)
        if head.bias is None:
            torch.mm(hidden, weight[start:stop].T, out=tile)
        else:
            torch.addmm(head.bias[start:stop], hidden, weight[start:stop].T, out=tile)
        tile = _capped(tile.float(), head.softcap)
        tile_largest = tile.amax(dim=1)
        if first < last:
            inside = order[first:last]
            row, column = local[inside], targets[inside] - start
            found = tile[row, column]
            target_logit[inside] = found
            # of equal logits the first is the greedy one: none may come before the target, in this tile or earlier
            leads = (found == tile_largest[row]) & (found > largest[row])
            candidates = leads.nonzero().flatten()
            leads[candidates] = tile[row[candidates]].argmax(dim=1) == column[candidates]
            greedy[inside] = leads
        raised = torch.maximum(largest, tile_largest)
        total = total * (largest - raised).exp() + tile.sub_(raised[:, None]).exp_().sum(dim=1)
        largest = raised
    greedy &= target_logit == largest[local]
    return target_logit - (largest + total.log())[local], greedy


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return torch.tanh(logits / softcap) * softcap if softcap else logits
