"""Regions by fraction of the rank: the largest, the middle or the smallest values, or any interval.

A fraction f of the rank r stands for the position `boundary(f, r)`, whether a region begins or ends there. Adjacent
regions therefore neither overlap nor leave a gap. The positions are symmetric, boundary(1 - f) = r - boundary(f), so
that "large" and "small" of one size have equally many values. The one exception is half of an odd rank, of which the
smaller values get one more. "bulk" may have one value more or fewer than "large" and "small" of its size, because it
leaves equally many at both ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness.spectral.regions.region import stretch
from harness.spectral.regions.sizes import SizedRule, check_sized, short, size_bounds

TIE = 1e-9  # distances from a half that are smaller than this are due to the rounding of floating-point numbers


def boundary(fraction: float, rank: int) -> int:
    """Return the position at a fraction of the rank, which is the whole number nearest to fraction * rank.

    A half is rounded towards the nearer end of the spectrum. A region of a size of at least one value is therefore
    never empty, not even in the middle. Half of an odd rank is rounded down.
    """
    exact = fraction * rank
    return math.ceil(exact - 0.5 - TIE) if exact <= rank / 2 + TIE else math.floor(exact + 0.5 + TIE)


@dataclass(frozen=True)
class Fraction:
    """The values in [start, stop) of the rank, counted from the largest value.

    kind: "large", "bulk", "small" or "interval"; it only changes the label. Raises ValueError unless
    0 <= start < stop <= 1.
    """

    kind: str
    start: float
    stop: float
    by: ClassVar[str] = "fraction"
    rank_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sized(self)

    @classmethod
    def of_size(cls, kind: str, size: float) -> Fraction:
        """Return the region of a kind and a size, a fraction of the rank; bounds and errors as in `size_bounds`."""
        return cls(kind, *size_bounds(kind, size))

    @property
    def label(self) -> str:
        size = f"{short(self.start)}:{short(self.stop)}" if self.kind == "interval" else short(self.stop - self.start)
        return f"{self.kind} {size}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return stretch(*(boundary(fraction, min(shape)) for fraction in (self.start, self.stop)))


@dataclass
class FractionRule(SizedRule):
    """The largest, middle or smallest values, by fraction of the rank."""

    region_type: ClassVar[type] = Fraction
