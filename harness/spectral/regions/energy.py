"""Regions by share of the energy, which is the squared Frobenius norm, counted from the largest singular value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.spectral.regions.region import stretch
from harness.spectral.regions.sizes import SizedRule, check_sized, short, size_bounds


def boundary(share: float, sigma: Tensor) -> int:
    """Return the smallest k for which the k largest values of sigma [r] hold at least `share` of the energy."""
    if share <= 0:
        return 0
    if share >= 1:
        return len(sigma)
    held = torch.cumsum(sigma.detach().cpu().to(torch.float64) ** 2, dim=0)
    # The sums are rounded: the margin of 1e-12 lets a share that is reached exactly count as reached.
    return min(int((held < (share - 1e-12) * held[-1]).sum()) + 1, len(sigma))


@dataclass(frozen=True)
class Energy:
    """The values between the shares `start` and `stop` of the energy.

    kind: "large", "bulk", "small" or "interval"; it only changes the label. Raises ValueError unless
    0 <= start < stop <= 1.
    """

    kind: str
    start: float
    stop: float
    by: ClassVar[str] = "energy"
    rank_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sized(self)

    @classmethod
    def of_size(cls, kind: str, size: float) -> Energy:
        """Return the region of a kind and a size, a share of the energy; bounds and errors as in `size_bounds`."""
        return cls(kind, *size_bounds(kind, size))

    @property
    def label(self) -> str:
        size = f"{short(self.start)}:{short(self.stop)}" if self.kind == "interval" else short(self.stop - self.start)
        return f"{self.kind} energy {size}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert sigma is not None
        return stretch(boundary(self.start, sigma), boundary(self.stop, sigma))


@dataclass
class EnergyRule(SizedRule):
    """The largest, middle or smallest values, by share of the squared Frobenius norm."""

    region_type: ClassVar[type] = Energy
