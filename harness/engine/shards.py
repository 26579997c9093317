"""Split units into shards of about equal predicted cost, for ranks and for Slurm jobs alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.engine.plan import ShardCost

_STEPS = 30  # of the search for the smallest possible largest shard
_CHUNKS_PER_SHARD = 64  # finer than this a split would not be noticeably more even


def split(groups: Sequence[list[Any]], n: int, shard_cost: Callable[[], ShardCost]) -> list[list[Any]]:
    """Return the units of these groups in at most `n` shards. No shard is empty, and each group is in exactly one.

    A shard holds consecutive groups, because neighbours share work. Of all such splits this is the one whose most
    expensive shard costs least. Work that several shards must repeat is counted in each of them. Equal arguments give
    equal splits. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, must be at least 1")
    groups = [group for group in groups if group]
    size = max(1, len(groups) // (_CHUNKS_PER_SHARD * n))
    chunks = [[unit for group in groups[start : start + size] for unit in group]
              for start in range(0, len(groups), size)]
    bounds = _bounds([shard_cost().load(chunk) for chunk in chunks], n, shard_cost)
    return [[unit for chunk in chunks[start:stop] for unit in chunk] for start, stop in zip(bounds, bounds[1:])]


def _bounds(loads: list[Any], n: int, shard_cost: Callable[[], ShardCost]) -> list[int]:
    """Return the cuts 0 = c_0 < c_1 < ... < c_m = len(loads), m <= n, that minimise the largest cost of a shard.

    They are found by bisection.
    """
    if n == 1 or len(loads) < 2:
        return [0, len(loads)] if loads else [0]
    whole = shard_cost()
    for load in loads:
        whole.add(load)
    low, high, best = 0.0, whole.total, [0, len(loads)]
    for _ in range(_STEPS):
        limit = (low + high) / 2
        bounds = _fill(loads, limit, n, shard_cost)
        if bounds is None:
            low = limit
        else:
            best, high = bounds, limit
    return best


def _fill(loads: list[Any], limit: float, n: int, shard_cost: Callable[[], ShardCost]) -> list[int] | None:
    """Return the cuts if each shard takes as many loads as cost `limit` at most, or None if more than `n` shards are
    needed for that."""
    bounds, shard = [0], shard_cost()
    for i, load in enumerate(loads):
        if i > bounds[-1] and shard.total + shard.of(load) > limit:
            bounds.append(i)
            shard = shard_cost()
        shard.add(load)
        if len(bounds) > n or shard.total > limit:
            return None
    return [*bounds, len(loads)]
