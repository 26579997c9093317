"""Control regions: removals that show how much of an effect any other removal would have had.

A control whose effect is compared with that of one region has this region as its reference. The controls of a reference
model (`OF_REFERENCE`) are for studies of the change from that model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.spectral.regions.marchenko_pastur import MarchenkoPastur
from harness.spectral.regions.region import Region, select, stretch
from harness.spectral.regions.reweight import Weighted
from harness.spectral.seeding import generator_of


@dataclass(frozen=True)
class Nothing:
    """Decompose every matrix and remove nothing: any change of a metric is then an error of the harness."""

    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "none"
    label: ClassVar[str] = "none"
    rank_only: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[Nothing]:
        """Return one control for all regions."""
        return [cls()]

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return stretch(0, 0)


@dataclass(frozen=True)
class OtherOrder:
    """Remove nothing, and score the model with another order of additions: the noise floor of low precision.

    share: the size of its batches, relative to those of the baseline.
    """

    share: float = 0.25
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "other_order"
    label: ClassVar[str] = "other order"
    rank_only: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[OtherOrder]:
        """Return one control for all regions."""
        return [cls()]

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return stretch(0, 0)


@dataclass(frozen=True)
class Random:
    """As many values as the reference picks, at random positions.

    The draw depends only on the seed, the shape of the matrix and the number of values. disjoint: whether the values of
    the reference itself are never drawn, so that an effect of the control cannot be that of the reference's own values.
    All other values are drawn if there are no more of them than the reference picks.
    """

    reference: Region
    seed: int
    disjoint: bool = False
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "random"
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[Random]:
        """Return one control for each seed and region."""
        return [cls(region, seed) for seed in seeds for region in regions]

    @property
    def label(self) -> str:
        return f"random {'outside ' * self.disjoint}({self.reference.label}) seed {self.seed}"

    @property
    def rank_only(self) -> bool:
        return self.reference.rank_only

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        reference = select(self.reference, sigma, shape)
        order = _drawn_from(_shuffled(self.seed, shape, len(reference)), reference, self.disjoint)
        return order[: len(reference)].sort().values


@dataclass(frozen=True)
class EnergyMatched:
    """Values at random positions that hold about as much of the squared Frobenius norm as those of the reference.

    A greedy draw finds them: see `_match_energy`. disjoint: as in Random. The energy is then smaller than that of the
    reference if the other values hold less.
    """

    reference: Region
    seed: int
    disjoint: bool = False
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "energy_matched"
    rank_only: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[EnergyMatched]:
        """Return one control for each seed and region."""
        return [cls(region, seed) for seed in seeds for region in regions]

    @property
    def label(self) -> str:
        return f"energy_matched {'outside ' * self.disjoint}({self.reference.label}) seed {self.seed}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert sigma is not None
        reference = select(self.reference, sigma, shape)
        energies = sigma.detach().cpu().to(torch.float64) ** 2
        order = _drawn_from(_shuffled(self.seed, shape, len(reference)), reference, self.disjoint)
        return _match_energy(energies, reference, order)


@dataclass(frozen=True)
class LowerBulk:
    """As many values as the reference picks, from the lower end of the Marchenko-Pastur bulk of the same matrix.

    The reference is a region of outliers by mp. This control removes equally many small values that the null model
    explains, or the whole bulk where that has fewer. Raises ValueError for a reference by another rule.
    """

    reference: Region
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "lower_bulk"
    rank_only: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.reference, MarchenkoPastur):
            raise ValueError("control 'lower_bulk' needs a reference region by mp")

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[LowerBulk]:
        """Return one control for each region of outliers."""
        return [cls(region) for region in regions if region.kind in ("above", "below")]

    @property
    def label(self) -> str:
        return f"lower_bulk ({self.reference.label})"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        assert sigma is not None and isinstance(self.reference, MarchenkoPastur)
        start, stop = self.reference.bulk(sigma, shape)
        return stretch(max(start, stop - len(select(self.reference, sigma, shape))), stop)


@dataclass(frozen=True)
class Rotated:
    """The reference's positions, with random directions in the place of those of the spectrum.

    Of a weight or of a change these are random directions of both sides with its singular values: a part with them is
    subtracted. Of the reference's directions they are as many random ones. The draw depends on the seed and on the
    matrix, and not on the region.
    """

    reference: Region
    seed: int
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "rotated"
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[Rotated]:
        """Return one control for each seed and region."""
        return [cls(region, seed) for seed in seeds for region in regions]

    @property
    def label(self) -> str:
        return f"rotated ({self.reference.label}) seed {self.seed}"

    @property
    def rank_only(self) -> bool:
        return self.reference.rank_only

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return select(self.reference, sigma, shape)


@dataclass(frozen=True)
class RotatedOutput(Rotated):
    """As `Rotated`, for weights alone: random directions whose outputs have the mean squares of those of the spectrum.

    The outputs are those over the calibration text. The singular values of the part are chosen so.
    """

    kind: ClassVar[str] = "rotated_output"

    @property
    def label(self) -> str:
        return f"rotated_output ({self.reference.label}) seed {self.seed}"


@dataclass(frozen=True)
class Shuffled:
    """The factors of the reference, given to the values of each matrix in a random order.

    The reference gives each value a factor of its own by a loss. The draw depends on the seed and the matrix.
    """

    reference: Region
    seed: int
    by: ClassVar[str] = "control"
    kind: ClassVar[str] = "shuffled"
    rank_only: ClassVar[bool] = False
    draws: ClassVar[bool] = True

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[Shuffled]:
        """Return one control for each seed and region."""
        return [cls(region, seed) for seed in seeds for region in regions]

    @property
    def label(self) -> str:
        return f"shuffled ({self.reference.label}) seed {self.seed}"

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return select(self.reference, sigma, shape)

    def factors(self, sigma: Tensor) -> Tensor:
        """Return the factor of the value at each position, float64 [n]. sigma: the singular values, float64 [r].

        Raises ValueError if the reference is not that of one matrix.
        """
        if not isinstance(self.reference, Weighted):
            raise ValueError(f"the factors of {self.label!r} depend on a loss")
        return self.reference.factors(sigma, self.seed)


@dataclass(frozen=True)
class _Whole:
    """A control that puts something else in the place of whole matrices."""

    by: ClassVar[str] = "control"
    rank_only: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    @classmethod
    def of(cls, regions: Sequence[Region], seeds: Sequence[int]) -> list[Any]:
        """Return one control for all regions."""
        return [cls()]

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        return stretch(0, min(shape))


@dataclass(frozen=True)
class SwapValues(_Whole):
    """The singular vectors of the matrix with the singular values of the reference model's matrix."""

    kind: ClassVar[str] = "swap_values"
    label: ClassVar[str] = "own vectors, reference values"


@dataclass(frozen=True)
class SwapVectors(_Whole):
    """The singular vectors of the reference model's matrix with the singular values of the matrix."""

    kind: ClassVar[str] = "swap_vectors"
    label: ClassVar[str] = "reference vectors, own values"


@dataclass(frozen=True)
class ReferenceMatrices(_Whole):
    """All matrices of the reference model in the model, which keeps its own norms, embeddings and head."""

    kind: ClassVar[str] = "reference_matrices"
    label: ClassVar[str] = "matrices of the reference"


@dataclass(frozen=True)
class ReferenceModel(_Whole):
    """All parameters of the reference model: what differs from `reference_matrices` is what the others contribute."""

    kind: ClassVar[str] = "reference_model"
    label: ClassVar[str] = "reference"


# Controls that need the matrices of a reference model.
OF_REFERENCE = ("swap_values", "swap_vectors", "reference_matrices", "reference_model")
# Name in region.controls -> its class. A study measures them after its regions, in this order.
CONTROLS: dict[str, Any] = {
    "random": Random, "energy_matched": EnergyMatched, "lower_bulk": LowerBulk, "rotated": Rotated,
    "rotated_output": RotatedOutput, "shuffled": Shuffled, "swap_values": SwapValues, "swap_vectors": SwapVectors,
    "reference_matrices": ReferenceMatrices, "reference_model": ReferenceModel, "none": Nothing,
    "other_order": OtherOrder,
}  # fmt: skip


def _shuffled(seed: int, shape: tuple[int, int], count: int) -> Tensor:
    return torch.randperm(min(shape), generator=generator_of(f"{seed}:{shape[0]}x{shape[1]}:{count}"))


def _drawn_from(order: Tensor, reference: Tensor, disjoint: bool) -> Tensor:
    """Return the positions of a random order, without those of the reference if the draw is to be disjoint."""
    return order[~torch.isin(order, reference)] if disjoint else order


def _match_energy(energies: Tensor, reference: Tensor, order: Tensor) -> Tensor:
    """Take values in the given random order as long as they fit, then one more if the sum is then nearer to the target.

    energies: float64 [r], the squared singular values. The target is the sum of those at `reference`.
    """
    target = float(energies[reference].sum())
    chosen, rest, total = [], [], 0.0
    for index, energy in zip(order.tolist(), energies[order].tolist()):
        if total + energy <= target:
            chosen.append(index)
            total += energy
        else:
            rest.append(index)
    if rest and chosen != reference.tolist():
        nearest = min(rest, key=lambda index: abs(target - total - float(energies[index])))
        if abs(target - total - float(energies[nearest])) < target - total:
            chosen.append(nearest)
    return torch.tensor(sorted(chosen), dtype=torch.int64)
