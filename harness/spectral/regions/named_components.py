"""Chosen components by name: singular values of several matrices that are removed together, or one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import SettingError, wrong
from harness.spectral.regions.component import Component


def parse_name(text: str) -> tuple[str, int]:
    """Return the matrix and the position of a name such as "28.up_proj:573". Raises ValueError for another text."""
    matrix, colon, position = str(text).rpartition(":")
    try:
        if not (matrix and colon):
            raise ValueError
        return matrix, int(position)
    except ValueError:
        raise ValueError(f"{text!r} is no name of a component, such as 28.up_proj:573") from None


@dataclass(frozen=True)
class Positions:
    """The values at given positions of one matrix. It is what `Named` is for one of its matrices."""

    chosen: tuple[int, ...]
    by: ClassVar[str] = "named"
    kind: ClassVar[str] = "named"
    rank_only: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return "positions " + "+".join(map(str, self.chosen))

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return torch.tensor(sorted({one % min(shape) for one in self.chosen}), dtype=torch.int64)


@dataclass(frozen=True)
class Named:
    """Components by name, which are removed together: "matrix:position", where 0 is the largest value of the matrix.

    The order of the names and repetitions mean nothing. Raises ValueError without names, and for one of another form.
    """

    names: tuple[str, ...]
    by: ClassVar[str] = "named"
    kind: ClassVar[str] = "named"
    rank_only: ClassVar[bool] = False
    per_matrix: ClassVar[bool] = True
    by_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no component is named")
        parsed = sorted({parse_name(name) for name in self.names})
        object.__setattr__(self, "names", tuple(f"{matrix}:{position}" for matrix, position in parsed))

    @property
    def label(self) -> str:
        return "named " + "+".join(self.names)

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Raises ValueError, because the positions depend on the name of the matrix."""
        raise ValueError(f"the positions of {self.label!r} depend on the matrix")

    def resolved(self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Positions]:
        """Return the positions in each matrix of `shapes`. losses: not read."""
        chosen: dict[str, list[int]] = {name: [] for name in shapes}
        for name in self.names:
            matrix, position = parse_name(name)
            chosen[matrix].append(position)
        return {name: Positions(tuple(positions)) for name, positions in chosen.items()}


@dataclass
class NamedRule:
    """Components by name, all of which one cell removes, or of which each has a cell of its own.

    They say which matrices are edited; the target is not read.
    """

    names: list[str] = field(default_factory=list)  # "28.up_proj:573": matrix and position, 0 = the largest value
    each: bool = False  # one cell for each, as region.by=component has it, instead of one for all
    region_type: ClassVar[type] = Named

    def __post_init__(self) -> None:
        if not self.names:
            raise wrong("names", [], "region.by=named needs at least one, for example [28.up_proj:573]")
        self.regions()

    def regions(self) -> list[Named | Component]:
        """Return the one region of all names, or the components at their positions. Raises SettingError."""
        try:
            together = Named(tuple(self.names))
        except ValueError as error:
            raise SettingError("names", str(error)) from error
        if not self.each:
            return [together]
        return [Component(position) for position in dict.fromkeys(parse_name(name)[1] for name in self.names)]

    def of_matrix(self) -> dict[str, list[str]]:
        """Return the names by matrix, in the order in which they are given."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(parse_name(name)[0], []).append(name)
        return found
