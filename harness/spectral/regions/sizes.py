"""What the rules "fraction" and "energy" have in common: kinds, sizes and intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from harness.errors import SettingError, wrong

KINDS = ("large", "bulk", "small")


def size_bounds(kind: str, size: float) -> tuple[float, float]:
    """Return where a region of a kind and a size begins and ends, as fractions.

    These are (0, size) for "large", (0.5 - size / 2, 0.5 + size / 2) for "bulk" and (1 - size, 1) for "small". Raises
    ValueError for another kind, and for a size outside (0, 1].
    """
    if not 0 < size <= 1:
        raise ValueError(f"the size of a region must lie in (0, 1], got {size}")
    bounds = {"large": (0.0, size), "bulk": (0.5 - size / 2, 0.5 + size / 2), "small": (1 - size, 1.0)}
    if kind not in bounds:
        raise ValueError(f"unknown region kind {kind!r}: use {', '.join(KINDS)}")
    start, stop = bounds[kind]
    return float(start), float(min(stop, 1.0))


def parse_interval(text: str) -> tuple[float, float]:
    """Return the bounds in a text such as "0.2:0.5" or "0.9:". Raises a ValueError that names the text."""
    start, colon, stop = (part.strip() for part in text.partition(":"))
    try:
        if not colon:
            raise ValueError
        return float(start) if start else 0.0, float(stop) if stop not in ("", "-0") else 1.0
    except ValueError:
        raise ValueError(f"interval {text!r} is not start:stop with numbers") from None


def check_sized(region: Any) -> None:
    """Raise ValueError unless 0 <= start < stop <= 1 and the kind is known."""
    if region.kind not in (*KINDS, "interval"):
        raise ValueError(f"unknown region kind {region.kind!r} by {region.by}: use {', '.join(KINDS)}, interval")
    if region.start is None or region.stop is None or not 0 <= region.start < region.stop <= 1:
        raise ValueError(
            f"region {region.kind} by {region.by} needs 0 <= start < stop <= 1, got {region.start}:{region.stop}"
        )


def short(value: float) -> str:
    """Return a number as text, without the digits that are due to rounding."""
    return f"{value:.10g}"


@dataclass
class SizedRule:
    """Settings of regions with a size: every kind in every size of `values`, and the intervals "start:stop"."""

    kinds: list[Literal["large", "bulk", "small"]] = field(default_factory=lambda: ["large", "bulk", "small"])
    values: list[float] = field(default_factory=lambda: [0.1])  # size of the region, above 0 and at most 1
    intervals: list[str] = field(default_factory=list)  # "0.2:0.5", "0.9:"
    region_type: ClassVar[type]

    def __post_init__(self) -> None:
        for value in self.values:
            if not 0 < value <= 1:
                raise wrong("values", value, "a fraction must be above 0 and at most 1")
        if not self.intervals:
            for key, example in (("kinds", "[small]"), ("values", "[0.1]")):
                if not getattr(self, key):
                    right = f"name at least one, for example {example}, or set region.intervals"
                    raise wrong(key, [], right)
        self.regions()

    def regions(self) -> list[Any]:
        """Return the regions of every kind in every size, then those of the intervals. Raises SettingError."""
        region_type: Any = self.region_type
        found = [region_type.of_size(kind, value) for kind in self.kinds for value in self.values]
        for text in self.intervals:
            try:
                found.append(region_type("interval", *parse_interval(text)))
            except ValueError as error:
                raise SettingError("intervals", str(error)) from error
        return found
