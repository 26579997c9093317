"""A region rule: every n-th singular value, so that what is removed is spread evenly over the spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from harness.errors import wrong
from harness.settings.constraints import at_least


@dataclass(frozen=True)
class EveryNth:
    """The positions first, first + step, first + 2 step, ... of the descending spectrum."""

    step: int
    first: int
    by: ClassVar[str] = "every_nth"
    kind: ClassVar[str] = "every_nth"
    rank_only: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"every {self.step}th from {self.first}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return torch.arange(self.first, min(shape), self.step)


@dataclass
class EveryNthRule:
    """Every n-th singular value, from each of the first n."""

    step: Annotated[int, at_least(2)] = 2
    firsts: list[int] | None = None  # null: 0 to step - 1, which together are everything
    region_type: ClassVar[type] = EveryNth

    def __post_init__(self) -> None:
        for first in self.firsts or ():
            if not 0 <= first < self.step:
                raise wrong("firsts", first, f"it must be within 0..{self.step - 1}")

    def regions(self) -> list[EveryNth]:
        """One region per first position."""
        return [EveryNth(self.step, first) for first in (self.firsts or range(self.step))]
