"""Single singular values: one region, and so one cell, for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.index import Index
from harness.spectral.regions.region import Region, stretch

BY_LOSS = "loss"


@dataclass(frozen=True)
class Component:
    """One singular value: position 0 is the largest, -1 the smallest. A matrix of too small a rank has none.

    order: None, or "loss": the position is then one in the order of the first-order changes of a loss, over all values
    of all matrices of a target. The removal of 0 is predicted to lower the loss most, that of -1 to raise it most.
    Raises ValueError for another order.
    """

    position: int
    order: str | None = None
    by: ClassVar[str] = "component"
    kind: ClassVar[str] = "component"

    def __post_init__(self) -> None:
        if self.order not in (None, BY_LOSS):
            raise ValueError(f"unknown order {self.order!r} of components: use {BY_LOSS}")

    @property
    def label(self) -> str:
        return f"component {self.position}" + " by loss" * (self.order == BY_LOSS)

    @property
    def by_loss(self) -> bool:
        """Whether the position is known only from the changes of a loss, see `resolved`."""
        return self.order == BY_LOSS

    @property
    def per_matrix(self) -> bool:
        """Whether the position depends on the matrix, which it does if it depends on a loss."""
        return self.by_loss

    @property
    def rank_only(self) -> bool:
        return not self.by_loss

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Return the position in one matrix. Raises ValueError if it depends on a loss."""
        if self.by_loss:
            raise ValueError(f"the position of {self.label!r} depends on all matrices of a target")
        rank = min(shape)
        start = self.position if self.position >= 0 else rank + self.position
        return stretch(start, start + 1) if 0 <= start < rank else stretch(0, 0)

    def resolved(self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Region]:
        """Return for each matrix the component that is meant, which one matrix has, or a region of none.

        losses: matrix -> the first-order change of the loss if each of its values is removed, float64 [r]. Equal
        changes keep the order of the matrices and of their values. Raises ValueError if there are fewer values.
        """
        names = list(losses)
        starts = [0]
        for name in names:
            starts.append(starts[-1] + len(losses[name]))
        if not -starts[-1] <= self.position < starts[-1]:
            raise ValueError(f"{self.label}: the matrices have {starts[-1]} singular values together")
        order = torch.cat([losses[name] for name in names]).argsort(stable=True)
        place = int(order[self.position])
        found: dict[str, Region] = {}
        for name, start, stop in zip(names, starts, starts[1:]):
            rank = min(shapes[name])
            found[name] = Component(place - start) if start <= place < stop else Index(rank, None)
        return found


@dataclass
class ComponentRule:
    """Single singular values: so many of either end of the spectrum, others by their positions, or those that the
    first-order change of a loss predicts to matter."""

    ends: int = 8  # so many of the largest, and as many of the smallest values
    components: list[int] = field(default_factory=list)  # further positions: 0 is the largest value, -1 the smallest
    all: bool = False  # every singular value of every matrix, instead of `ends` and `components`
    top: int = 0  # so many of a target whose removal is predicted to lower the loss most, and as many to raise it
    region_type: ClassVar[type] = Component

    def __post_init__(self) -> None:
        for key in ("ends", "top"):
            if getattr(self, key) < 0:
                raise wrong(key, getattr(self, key), "it must be at least 0")
        if self.all and self.components:
            raise wrong("components", self.components, "region.all=true has every position already; leave them out")
        if not (self.ends or self.components or self.all or self.top):
            right = "region.by=component needs at least 1, or positions in region.components, region.all or region.top"
            raise wrong("ends", self.ends, right)

    def regions(self, shapes: Iterable[tuple[int, int]] = ()) -> list[Component]:
        """Return one region for each position: those of the large end, the further ones, those of the small end, and
        then those by the loss. shapes: (out, in) of the matrices, among whose ranks `all` takes the largest."""
        if self.all:
            positions = [*range(max((min(shape) for shape in shapes), default=0))]
        else:
            positions = list(dict.fromkeys([*range(self.ends), *self.components, *range(-self.ends, 0)]))
        by_loss = [*range(self.top), *range(-self.top, 0)]
        return [*map(Component, positions), *(Component(place, BY_LOSS) for place in by_loss)]
