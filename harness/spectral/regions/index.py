"""Regions by position in the descending spectrum, written as Python slices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from harness.errors import SettingError, wrong
from harness.spectral.regions.region import stretch


@dataclass(frozen=True)
class Index:
    """The positions start:stop of a Python slice: negative ones count from the smallest value, None is an open end.

    Raises ValueError for a bound that is not a whole number, and for a slice that is empty for every matrix.
    """

    start: int | None
    stop: int | None
    by: ClassVar[str] = "index"
    kind: ClassVar[str] = "index"
    rank_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if any(bound is not None and int(bound) != bound for bound in (self.start, self.stop)):
            raise ValueError(f"an index region needs whole numbers, got {self._slice}")
        low, stop = self.start or 0, self.stop
        # Slices such as 5:3, -3:-5, 4:4 and -8:0 are empty for every matrix. The number in -8:-0 is 0, as in -8:0.
        if stop is not None and stop <= low and (stop >= 0) == (low >= 0) or stop == 0:
            raise ValueError(
                f"index region {self._slice} is empty; leave the end open ('-8:') to mean the smallest value"
            )

    @property
    def _slice(self) -> str:
        return ":".join("" if bound is None else str(bound) for bound in (self.start, self.stop))

    @property
    def label(self) -> str:
        return f"index {self._slice}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        start, stop, _ = slice(self.start, self.stop).indices(min(shape))
        return stretch(start, stop)


def parse_slice(text: str) -> Index:
    """Return the region of a text such as "0:16", "1:" or "-8:"; "-8:-0" means the same as "-8:".

    Raises a ValueError that names the text if it is no slice, and as `Index` does.
    """
    start, colon, stop = (part.strip() for part in text.partition(":"))
    try:
        if not colon:
            raise ValueError
        bounds = int(start) if start else None, None if stop in ("", "-0") else int(stop)
    except ValueError:
        raise ValueError(f"interval {text!r} is not start:stop with whole numbers") from None
    return Index(*bounds)


@dataclass
class IndexRule:
    """Singular values by their position, 0 = the largest, as Python slices."""

    intervals: list[str] = field(default_factory=list)  # "0:16", "1:", "-8:"
    region_type: ClassVar[type] = Index

    def __post_init__(self) -> None:
        if not self.intervals:
            raise wrong("intervals", [], 'region.by=index needs at least one, for example ["0:16"]')
        self.regions()

    def regions(self) -> list[Index]:
        """Return one region for each interval. Raises SettingError."""
        try:
            return [parse_slice(text) for text in self.intervals]
        except ValueError as error:
            raise SettingError("intervals", str(error)) from error
