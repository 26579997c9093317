"""The low ranks of LASER (Sharma, Ash and Misra 2024, arXiv 2312.13558): all but the largest values are removed.

LASER keeps the floor(rho r) largest of r values. The rule "fraction" rounds to the nearest position instead, so that it
may keep one value more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.region import stretch
from harness.spectral.regions.sizes import short


@dataclass(frozen=True)
class Laser:
    """All but the floor(keep * r) largest values of a spectrum of r values. Raises ValueError unless 0 <= keep < 1."""

    keep: float
    by: ClassVar[str] = "laser"
    kind: ClassVar[str] = "small"
    rank_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise ValueError(f"the share of the rank that is kept must lie in [0, 1), got {self.keep}")

    @property
    def label(self) -> str:
        return f"laser {short(self.keep)}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rank = min(shape)
        # With the 1e-9, 0.29 of 100 is 29 in spite of rounding.
        return stretch(math.floor(self.keep * rank + 1e-9), rank)


@dataclass
class LaserRule:
    """The low ranks of LASER, by the share of the rank that is kept."""

    keep: list[float] = field(default_factory=lambda: [0.9, 0.8, 0.6, 0.2, 0.1, 0.05, 0.01])  # rho of its Table 5
    region_type: ClassVar[type] = Laser

    def __post_init__(self) -> None:
        if not self.keep:
            raise wrong("keep", [], "region.by=laser needs at least one, for example [0.1]")
        for share in self.keep:
            if not 0 <= share < 1:
                raise wrong("keep", share, "a share of the rank that is kept must be at least 0 and below 1")

    def regions(self) -> list[Laser]:
        """Return one region for each share."""
        return [Laser(share) for share in self.keep]
