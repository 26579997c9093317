"""Constraints on settings beside their types: marks for `typing.Annotated` that validation reads.

This module imports no library, so that settings can be declared in folders that run with torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number. None means that there is no such bound. NaN is outside of all bounds."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def words(self) -> str:
        """Return what would be right, for a message."""
        named = ((self.at_least, "at least"), (self.above, "above"), (self.at_most, "at most"), (self.below, "below"))
        return "it must be " + " and ".join(f"{word} {bound:g}" for bound, word in named if bound is not None)

    def check(self, value: float) -> float:
        """Return the value. Raises ValueError if it is outside of the bounds."""
        inside = (
            (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        )
        if not inside or value != value:
            raise ValueError(self.words())
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


@dataclass(frozen=True)
class ReadBy:
    """A mark for settings that a function makes from plain values.

    It is used where a name chooses among several kinds of settings, to which other packages may add.
    read: a function from plain values to the settings; it returns settings unchanged, and may raise SettingError.
    keys: a function that returns every key that a config may have here, with the value that means "not given". None if
        any name may be a key.
    """

    read: Callable[[Any], Any]
    keys: Callable[[], dict[str, Any]] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self.read)


def at_least(least: float) -> Bounds:
    """Return the bounds of a number that is at least `least`."""
    return Bounds(at_least=least)
