"""Low ranks by a budget of parameters: all but the largest values are removed, so that factors take less room.

A matrix [out, in] of which k values are kept takes k (out + in) parameters as two factors, and out in parameters whole.
In the metric of the activations this is SVD-LLM (arXiv 2403.07378), which gives each matrix the same share of its
parameters. ZS-SVD (arXiv 2602.02848) shares one budget among all matrices by the first-order changes of the loss.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.index import Index
from harness.spectral.regions.region import stretch
from harness.spectral.regions.sizes import short

RANKS = ("uniform", "zero_sum")


@dataclass(frozen=True)
class Compression:
    """All but so many of the largest values that the factors have (1 - ratio) of the parameters of the matrices.

    ranks: "uniform": the ratio is that of each matrix, of which the floor((1 - ratio) out in / (out + in)) largest
    values are kept. "zero_sum": the ratio is that of all matrices of a target together, and `zero_sum_ranks` says how
    many values of each are kept. Raises ValueError unless 0 < ratio < 1, and for other ranks.
    """

    ratio: float
    ranks: str = "uniform"
    by: ClassVar[str] = "compression"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"the share of parameters that is removed must lie in (0, 1), got {self.ratio}")
        if self.ranks not in RANKS:
            raise ValueError(f"unknown ranks {self.ranks!r}: use {', '.join(RANKS)}")

    @property
    def kind(self) -> str:
        """The way in which ranks are chosen."""
        return self.ranks

    @property
    def label(self) -> str:
        return f"compression {short(self.ratio)}" + " zero_sum" * (self.ranks == "zero_sum")

    @property
    def rank_only(self) -> bool:
        return not self.by_loss

    @property
    def by_loss(self) -> bool:
        """Whether the ranks depend on the changes of a loss, see `resolved`."""
        return self.ranks == "zero_sum"

    @property
    def per_matrix(self) -> bool:
        """Whether the ranks depend on the matrix, which they do if they depend on a loss."""
        return self.by_loss

    def resolved(self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Index]:
        """Return the region of each matrix, of which so many values are kept as `zero_sum_ranks` says."""
        return {name: keeping(kept) for name, kept in zero_sum_ranks(losses, shapes, self.ratio).items()}

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Return the positions of a matrix. Raises ValueError for zero_sum, whose ranks depend on other matrices."""
        if self.by_loss:
            raise ValueError(f"the ranks of {self.label!r} depend on all matrices of a target")
        out, width = shape
        # With the 1e-9, 0.6 of 100 is 60 in spite of rounding.
        return stretch(math.floor((1 - self.ratio) * out * width / (out + width) + 1e-9), min(shape))


def keeping(kept: int) -> Index:
    """Return the region of all but the `kept` largest values of one matrix."""
    return Index(kept, None)


def zero_sum_ranks(
    losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], ratio: float
) -> dict[str, int]:
    """Return how many of the largest values of each matrix are kept: the zero-sum rule of ZS-SVD (arXiv 2602.02848).

    losses: matrix -> the first-order change of the loss if each of its values is removed, float64 [r]. shapes: matrix
    -> (out, in). ratio: the share of the parameters of all matrices that is removed.

    Of every matrix the smallest value that is left is a candidate. If the sum of the changes so far is positive, the
    candidate with the smallest negative change goes next, else the one with the smallest positive change, until the
    matrices take no more than the budget. At least one value of each matrix stays. A matrix whose factors would take no
    less room than itself is kept whole in the end.
    """
    kept = {name: min(shapes[name]) for name in losses}
    changes = {name: one.tolist() for name, one in losses.items()}

    def size(name: str) -> int:
        out, width = shapes[name]
        return min(out * width, kept[name] * (out + width))

    total = sum(size(name) for name in kept)
    budget = (1 - ratio) * total
    order = {name: i for i, name in enumerate(kept)}
    candidates: dict[bool, list[tuple[float, int, str]]] = {True: [], False: []}  # by whether the change is positive

    def offer(name: str) -> None:
        if kept[name] > 1:
            change = changes[name][kept[name] - 1]
            heapq.heappush(candidates[change > 0], (abs(change), order[name], name))

    for name in kept:
        offer(name)
    drift = 0.0
    while total > budget and any(candidates.values()):
        wanted = drift <= 0
        _, _, name = heapq.heappop(candidates[wanted] or candidates[not wanted])
        before = size(name)
        kept[name] -= 1
        drift += changes[name][kept[name]]
        total += size(name) - before
        offer(name)
    return {name: k if k * sum(shapes[name]) < math.prod(shapes[name]) else min(shapes[name])
            for name, k in kept.items()}


@dataclass
class CompressionRule:
    """Low ranks by the share of the parameters that is removed: the same share of each matrix, or a shared budget."""

    ratios: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6])  # share of the parameters that is removed
    ranks: list[Literal["uniform", "zero_sum"]] = field(default_factory=lambda: ["uniform"])
    region_type: ClassVar[type] = Compression

    def __post_init__(self) -> None:
        for key, example in (("ratios", "[0.2]"), ("ranks", "[uniform]")):
            if not getattr(self, key):
                raise wrong(key, [], f"region.by=compression needs at least one, for example {example}")
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise wrong("ratios", ratio, "a share of the parameters that is removed must be above 0 and below 1")

    def regions(self) -> list[Compression]:
        """Return one region for each way to choose ranks and each ratio."""
        return [Compression(ratio, ranks) for ranks in self.ranks for ratio in self.ratios]
