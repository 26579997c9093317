"""The interface of a region, and the positions that a region picks in the spectrum of one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor


class Region(Protocol):
    """A rule that picks singular values of any matrix: a frozen dataclass whose fields are its parameters."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def by(self) -> str:
        """The name of the rule, or "control"."""
        ...

    @property
    def kind(self) -> str:
        """Which of the rule's regions this is, for example "large"."""
        ...

    @property
    def label(self) -> str:
        """A short name; different regions have different labels."""
        ...

    @property
    def rank_only(self) -> bool:
        """Whether the choice depends only on the shape of the matrix, so that it is known before weights are loaded."""
        ...

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Return the chosen positions in the descending spectrum: int64 [n] on the CPU, in ascending order.

        shape: (out, in) of the matrix. sigma: its singular values, float64 [min(shape)]; None is allowed if
        `rank_only`.
        """
        ...


@runtime_checkable
class PerMatrix(Protocol):
    """A region whose positions may depend on which matrix is meant, and not on its values and shape alone.

    per_matrix: whether they do. `positions` then raises ValueError, and `resolved` tells the region of each matrix.
    by_loss: whether they depend on the first-order changes of a loss in all matrices of a target.
    """

    @property
    def per_matrix(self) -> bool: ...

    @property
    def by_loss(self) -> bool: ...

    def resolved(self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, Region]:
        """Return the region of each matrix by its name.

        losses: matrix -> the first-order change of the loss if each of its values is removed, float64 [r]; empty if not
        `by_loss`. shapes: matrix -> (out, in).
        """
        ...


def per_matrix(region: Region) -> PerMatrix | None:
    """Return the region itself, or the reference of a control, if its positions depend on the matrix."""
    region = getattr(region, "reference", None) or region
    return region if isinstance(region, PerMatrix) and region.per_matrix else None


@runtime_checkable
class Weighing(Protocol):
    """A region that gives each of its values a factor of its own."""

    def factors(self, sigma: Tensor) -> Tensor:
        """Return the factor of the value at each position, float64 [n]. sigma: the singular values, float64 [r]."""
        ...


def by_factors(region: Region) -> bool:
    """Return whether a region, or the reference of a control, gives each of its values a factor of its own."""
    return any(getattr(one, "own_factors", False) for one in (region, getattr(region, "reference", None)))


def factors_of(region: Region, sigma: Tensor) -> Tensor | None:
    """Return the factors of a region, or of the reference of a control: float64 [n]; None if all have the same one."""
    for one in (region, getattr(region, "reference", None)):
        if isinstance(one, Weighing):
            return one.factors(sigma)
    return None


def by_loss(region: Region) -> bool:
    """Return whether the positions of a region, or of the reference of a control, depend on the changes of a loss."""
    found = per_matrix(region)
    return found is not None and found.by_loss


def select(region: Region, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return the positions that a region picks, as `Region.positions` does, after a check of the arguments.

    sigma: the singular values, float64 [min(shape)], in descending order; None is allowed if `region.rank_only`. Raises
    ValueError if sigma is needed but missing, or if it has a wrong length.
    """
    rank = min(shape)
    if sigma is None and not region.rank_only:
        raise ValueError(f"region {region.label!r} depends on the singular values")
    if sigma is not None and tuple(sigma.shape) != (rank,):
        raise ValueError(f"a {shape[0]}x{shape[1]} matrix has {rank} singular values, got shape {tuple(sigma.shape)}")
    return region.positions(sigma, shape)


def stretch(start: int, stop: int) -> Tensor:
    """Return the positions start, ..., stop - 1: int64 [stop - start], empty if stop <= start."""
    return torch.arange(start, max(start, stop))


def fraction_interval(indices: Tensor, rank: int) -> tuple[float, float] | tuple[None, None]:
    """Return the half-open interval of the rank that contiguous positions cover, as fractions (start, stop).

    indices: int64 [n], in ascending order. (None, None) if there are none, or if they have gaps.
    """
    n = len(indices)
    if n == 0 or int(indices[-1]) - int(indices[0]) + 1 != n:
        return None, None
    return int(indices[0]) / rank, (int(indices[-1]) + 1) / rank
