"""Regions by random matrix theory: above, inside and below the bulk of Marchenko and Pastur (1967)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from harness.errors import wrong
from harness.spectral.random_matrix import NOISE_ESTIMATORS, mp_region_bounds
from harness.spectral.regions.region import stretch

KINDS = ("above", "inside", "below")


@dataclass(frozen=True)
class MarchenkoPastur:
    """The values above, inside or below the Marchenko-Pastur bulk of a matrix of i.i.d. entries.

    kind: "above", "inside" or "below"; every singular value is in exactly one of the three. estimator: how the noise is
    estimated, a name in NOISE_ESTIMATORS. tracy_widom: move the edges outwards by the margin for a finite matrix, see
    `mp_edges`. Raises ValueError for another kind or estimator.
    """

    kind: str
    estimator: str = "gavish_donoho"
    tracy_widom: bool = False
    by: ClassVar[str] = "mp"
    rank_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown region kind {self.kind!r} by mp: use {', '.join(KINDS)}")
        if self.estimator not in NOISE_ESTIMATORS:
            raise ValueError(f"unknown noise estimator {self.estimator!r}: use {', '.join(NOISE_ESTIMATORS)}")

    @property
    def label(self) -> str:
        return f"mp {self.kind} {self.estimator}" + " tracy_widom" * self.tracy_widom

    def bulk(self, sigma: Tensor, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the positions at which the bulk begins and ends, see `mp_region_bounds`."""
        return mp_region_bounds(sigma, shape, self.estimator, self.tracy_widom)

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert sigma is not None
        start, stop = self.bulk(sigma, shape)
        return stretch(*{"above": (0, start), "inside": (start, stop), "below": (stop, min(shape))}[self.kind])


@dataclass
class MarchenkoPasturRule:
    """Values above, inside or below the bulk of a random matrix (Marchenko and Pastur)."""

    mp: list[Literal["above", "inside", "below"]] = field(default_factory=lambda: ["above", "inside", "below"])
    estimator: str = "gavish_donoho"  # of the noise: gavish_donoho | usvt | bulk_fit
    tracy_widom: bool = False  # widen the edges by the Tracy-Widom margin
    region_type: ClassVar[type] = MarchenkoPastur

    def __post_init__(self) -> None:
        if not self.mp:
            raise wrong("mp", [], "region.by=mp needs at least one, for example [above]")
        if self.estimator not in NOISE_ESTIMATORS:
            raise wrong("estimator", self.estimator, f"use one of {', '.join(NOISE_ESTIMATORS)}")

    def regions(self) -> list[MarchenkoPastur]:
        """Return one region for each of the chosen kinds."""
        return [MarchenkoPastur(kind, self.estimator, self.tracy_widom) for kind in self.mp]
