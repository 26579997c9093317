"""Tenths of the rank. Decile 1 holds the largest values here; arXiv 2410.17770 counts from the other end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.fraction import boundary
from harness.spectral.regions.region import stretch


@dataclass(frozen=True)
class Decile:
    """One tenth of the rank: number 1 holds the largest values, 10 the smallest. Raises ValueError for others."""

    number: int
    by: ClassVar[str] = "decile"
    kind: ClassVar[str] = "decile"
    rank_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.number not in range(1, 11):
            raise ValueError(f"a decile is a whole number from 1 (largest) to 10 (smallest), got {self.number}")

    @property
    def start(self) -> float:
        """The fraction of the rank at which the decile begins."""
        return (self.number - 1) / 10

    @property
    def stop(self) -> float:
        """The fraction of the rank at which the decile ends."""
        return self.number / 10

    def key(self) -> dict[str, float]:
        """Return what a removal depends on, for the ids of cells: the interval, as for other regions by fraction."""
        return {"start": self.start, "stop": self.stop}

    @property
    def label(self) -> str:
        return f"decile {self.number} ({self.start:.1f}-{self.stop:.1f})"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return stretch(boundary(self.start, min(shape)), boundary(self.stop, min(shape)))


@dataclass
class DecileRule:
    """Tenths of the rank; decile 1 is the largest tenth."""

    deciles: list[int] = field(default_factory=lambda: list(range(1, 11)))
    region_type: ClassVar[type] = Decile

    def __post_init__(self) -> None:
        if not self.deciles:
            raise wrong("deciles", [], "region.by=decile needs at least one, for example [10]")
        for number in self.deciles:
            if not 1 <= number <= 10:
                raise wrong("deciles", number, "deciles are 1 (the largest tenth) to 10 (the smallest)")

    def regions(self) -> list[Decile]:
        """Return one region for each decile."""
        return [Decile(number) for number in self.deciles]
