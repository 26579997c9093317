"""The series of a figure of a study, the lines that may join their points, and the labels of regions on an axis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.tables.frames import groups_of
from harness.tables.labels import region_words
from harness.tables.text import is_missing, layer_key

if TYPE_CHECKING:
    import pandas


def by_series(cells: pandas.DataFrame) -> list[tuple[str, pandas.DataFrame]]:
    """Return the rows of each series of a figure by its name: of each block, else of each layer type or target."""
    if (cells["target_kind"] == "block").all():
        return [(f"block {int(block)}", rows) for block, rows in groups_of(cells, "block")]
    by_type = cells["layer_type"].notna()
    groups = sorted(groups_of(cells[by_type], "layer_type"), key=lambda item: layer_key(item[0]))
    return [*groups, *groups_of(cells[~by_type], "target")]


def region_kinds(cells: pandas.DataFrame) -> dict[str, tuple[Any, Any]]:
    """Return by which rule and of which kind each region is, by its label."""
    return dict(zip(cells["region"].tolist(), zip(cells["region_by"].tolist(), cells["region_kind"].tolist())))


def joined(of_region: Mapping[str, tuple[Any, Any]], regions: Sequence[str]) -> list[list[str]]:
    """Return the groups of neighbouring regions that a line may join, because their kind orders them: deciles, sizes.

    of_region: as `region_kinds` returns. regions: labels in the order of `region_order`. Controls are in no order, and
    `above`, `inside` and `below` the bulk are of different kinds.
    """

    def kind(region: str) -> tuple[Any, Any] | str:
        by, kind = of_region[region]
        return region if is_missing(by) or by == "control" else (by, kind)

    groups = [list(group) for _, group in itertools.groupby(regions, kind)]
    return [group for group in groups if len(group) > 1]


def tick(region: str, by: Any) -> str:
    """Return the label of a region on the x axis, which for a decile is only its interval. by: the region's rule."""
    words = region_words(region)
    return words.split("(")[-1].rstrip(")") if by == "decile" else words
