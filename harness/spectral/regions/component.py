"""Single singular values: one region, and so one cell, for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.region import stretch


@dataclass(frozen=True)
class Component:
    """One singular value: position 0 is the largest, -1 the smallest. A matrix of too small a rank has none."""

    position: int
    by: ClassVar[str] = "component"
    kind: ClassVar[str] = "component"
    rank_only: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"component {self.position}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rank = min(shape)
        start = self.position if self.position >= 0 else rank + self.position
        return stretch(start, start + 1) if 0 <= start < rank else stretch(0, 0)


@dataclass
class ComponentRule:
    """Single singular values: so many of either end of the spectrum, and others by their positions."""

    ends: int = 8  # so many of the largest, and as many of the smallest values
    components: list[int] = field(default_factory=list)  # further positions: 0 is the largest value, -1 the smallest
    region_type: ClassVar[type] = Component

    def __post_init__(self) -> None:
        if self.ends < 0:
            raise wrong("ends", self.ends, "it must be at least 0")
        if not self.ends and not self.components:
            raise wrong("ends", self.ends, "region.by=component needs at least 1, or positions in region.components")

    def regions(self) -> list[Component]:
        """Return one region for each position: those of the large end, the further ones, those of the small end."""
        small = range(-self.ends, 0)
        return [Component(position) for position in dict.fromkeys([*range(self.ends), *self.components, *small])]
