"""Regions above and below the optimal hard threshold of Gavish and Donoho (2014, IEEE Trans. Inf. Theory 60(8))."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from harness.errors import wrong
from harness.spectral.random_matrix import hard_threshold
from harness.spectral.regions.region import stretch


@dataclass(frozen=True)
class GavishDonoho:
    """The values above or below the optimal hard threshold, for noise that is estimated from the same matrix.

    kind: "above" or "below"; raises ValueError for another one.
    """

    kind: str
    by: ClassVar[str] = "gavish_donoho"
    rank_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in ("above", "below"):
            raise ValueError(f"unknown region kind {self.kind!r} by gavish_donoho: use above, below")

    @property
    def label(self) -> str:
        return f"gavish_donoho {self.kind}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert sigma is not None
        n_above = int((sigma > hard_threshold(sigma, shape)).sum())
        return stretch(0, n_above) if self.kind == "above" else stretch(n_above, min(shape))


@dataclass
class GavishDonohoRule:
    """Values above or below the optimal hard threshold of Gavish and Donoho."""

    gavish_donoho: list[Literal["above", "below"]] = field(default_factory=lambda: ["above", "below"])
    region_type: ClassVar[type] = GavishDonoho

    def __post_init__(self) -> None:
        if not self.gavish_donoho:
            raise wrong("gavish_donoho", [], "region.by=gavish_donoho needs at least one, for example [below]")

    def regions(self) -> list[GavishDonoho]:
        """Return one region for each of the chosen sides of the threshold."""
        return [GavishDonoho(kind) for kind in self.gavish_donoho]
