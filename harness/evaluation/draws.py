"""The random order in which adaptive precision draws the examples of a task, and the groups in which it scores them.

A group is packed by itself, with more padding than the whole task has, and is followed by a test of whether the cell
may stop. A cell that stops nowhere pays for both. The groups of a task are therefore so few that their cost is hardly
more than that of the whole task. The order and the groups depend on the lengths of the requests and not on any score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.evaluation.packing import padded_cost
from harness.evaluation.requests import Request, ScoredTask

ORDER_STREAM = 71  # a number beside the study's seed, so that no other use of that seed draws the same numbers
# How many times as many examples there are after a group as before it, at least. The first of these numbers is taken
# with which the groups are cheap enough.
GROWTHS = (1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0, 10.0)
MOST_OVERHEAD = 0.06  # of the cost of scoring the task as a whole
LOOK_OVERHEAD = 256  # the cost of a test after a group, in tokens; 2.5 ms where a token costs 0.01 ms (ADAPTIVE.md)


@dataclass(frozen=True)
class Draws:
    """One task with its examples in a fixed random order, cut into groups.

    examples: for each group, the indices of its examples in the order of drawing, int64. requests: for each group, the
    indices of the requests of its examples in ascending order, int64. tasks: the groups as tasks named
    "<task>#<group>". They are for the scorer alone, because their `measure` is that of the whole task.
    """

    task: ScoredTask
    examples: tuple[np.ndarray, ...]
    requests: tuple[np.ndarray, ...]
    tasks: tuple[ScoredTask, ...]


def draw(task: ScoredTask, batch_tokens: int, seed: int) -> Draws:
    """Draw the order of a task's examples from `seed`, and cut it into groups of at least about `batch_tokens` tokens.

    Later groups are larger: each has at least a tenth as many examples as all groups before it. If the cost of all
    groups is then more than MOST_OVERHEAD above that of the task as a whole, groups grow faster, and a task of few
    batches becomes one group. The tokens that a request shares with the request before it in the same example count
    once. Raises ValueError if a task has several requests per example and does not say which belong together.
    """
    n = len(task.example_ids)
    example_of = np.arange(n) if task.example_of is None else np.asarray(task.example_of)
    if len(example_of) != len(task.requests):
        raise ValueError(f"task {task.name}: {len(task.requests)} requests for {len(example_of)} known examples")
    fed = np.array(_fed(task.requests, example_of), dtype=np.int64)
    order = np.random.default_rng([ORDER_STREAM, seed]).permutation(n)
    sizes = np.bincount(example_of, fed, minlength=n)[order]
    turn = np.empty(n, dtype=np.int64)
    turn[order] = np.arange(n)
    starts, most = [0], (1 + MOST_OVERHEAD) * _cost([0], fed, turn[example_of], batch_tokens)
    for growth in GROWTHS:
        found = _starts(sizes, batch_tokens, growth)
        if _cost(found, fed, turn[example_of], batch_tokens) <= most:
            starts = found
            break
    groups = np.searchsorted(starts, turn[example_of], side="right") - 1
    requests = tuple(np.flatnonzero(groups == i) for i in range(len(starts)))
    tasks = tuple(
        replace(task, name=f"{task.name}#{i}", requests=[task.requests[j] for j in members.tolist()])
        for i, members in enumerate(requests)
    )
    return Draws(task, tuple(np.split(order, starts[1:])), requests, tasks)


def _starts(sizes: np.ndarray, batch_tokens: int, growth: float) -> list[int]:
    """Return the number of examples before each group.

    sizes: the tokens of each example in the order of drawing. growth: how many times as many examples there are after
    a group as before it, at least. No group but the only one has less than half of `batch_tokens`.
    """
    starts, held, left = [0], 0.0, float(sizes.sum())
    for i, size in enumerate(sizes.tolist()):
        full = held + size > batch_tokens and i >= growth * starts[-1]
        if i and full and left >= batch_tokens / 2:
            starts.append(i)
            held = 0.0
        held, left = held + size, left - size
    return starts


def _cost(starts: Sequence[int], fed: np.ndarray, turns: np.ndarray, batch_tokens: int) -> int:
    """Return the cost of scoring and testing groups, in tokens.

    starts: as `_starts` returns. fed: int64 [R], the tokens of each request that are fed. turns: int64 [R], how many
    examples are drawn before that of each request. A request that is fed in part is taken for a sequence of this part.
    """
    groups = np.searchsorted(starts, turns, side="right") - 1
    members = (fed[(groups == i) & (fed > 0)] for i in range(len(starts)))
    return sum(LOOK_OVERHEAD + padded_cost(widths, batch_tokens) for widths in members)


def _fed(requests: Sequence[Request], example_of: np.ndarray) -> list[int]:
    """Return the number of tokens of each request, without the prefix shared with the previous one of its example."""
    last: dict[int, np.ndarray] = {}
    sizes = []
    for request, example in zip(requests, example_of):
        before, tokens = last.get(int(example)), request.tokens
        shared = 0
        if before is not None:
            n = min(len(before), len(tokens))
            differs = np.flatnonzero(before[:n] != tokens[:n])
            shared = int(differs[0]) if len(differs) else n
        sizes.append(len(tokens) - shared)
        last[int(example)] = tokens
    return sizes
