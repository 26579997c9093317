"""Access to the rows of a pandas.DataFrame, whose types are known from the schema of its table alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def rows_of(frame: pandas.DataFrame) -> Iterable[Any]:
    """Return the rows as named tuples."""
    return frame.itertuples()


def dicts_of(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """Return the rows as dictionaries from column to value."""
    rows: list[Any] = frame.to_dict("records")
    return rows


def groups_of(frame: pandas.DataFrame, column: str) -> Iterable[tuple[Any, pandas.DataFrame]]:
    """Return (value, rows) for every value of a column, in the order of the values."""
    return frame.groupby(column, sort=True)
