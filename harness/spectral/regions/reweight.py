"""Singular values that get a factor each, by the derivative of a loss to them: Spectral Surgery (arXiv 2603.03995).

The paper decomposes the change that a LoRA adapter makes, D = sum_i s_i u_i v_i^T, derives a loss on a few examples to
every s_i, and multiplies each s_i by a factor while the directions stay. The factors of a matrix are divided by one
number in the end, so that the sum of its values (the nuclear norm) is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import wrong
from harness.spectral.regions.region import stretch
from harness.spectral.regions.sizes import short
from harness.spectral.seeding import generator_of

WEIGHTS = ("sensitivity", "smooth", "descent")
BUDGETS = ("nuclear", "energy")
TEMPERATURE = 0.35  # of the sigmoid of "smooth", in units of the spread of the derivatives


@dataclass(frozen=True)
class Reweight:
    """The largest values of each matrix, each multiplied by a factor that the derivative g of a loss to it decides.

    weights: "sensitivity": the `share` of the values with the largest |g| (at least one) is multiplied by `amplify`,
        and that with the smallest by `damp`. "smooth": the factor rises from `damp` to `amplify` with |g| by a sigmoid
        around the median. "descent": exp(-step g / mean |g|), so that values whose increase lowers the loss grow.
    budget: what of the values stays as it was: "nuclear", their sum; "energy", the sum of their squares.
    rank: so many of the largest values are meant, such as the rank of an adapter; None for all.
    share, amplify, damp, step: None where `weights` does not read them.
    Raises ValueError for other weights or another budget.
    """

    weights: str
    budget: str = "nuclear"
    rank: int | None = None
    share: float | None = None
    amplify: float | None = None
    damp: float | None = None
    step: float | None = None
    by: ClassVar[str] = "reweight"
    rank_only: ClassVar[bool] = False
    per_matrix: ClassVar[bool] = True
    by_loss: ClassVar[bool] = True
    own_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"unknown weights {self.weights!r}: use {', '.join(WEIGHTS)}")
        if self.budget not in BUDGETS:
            raise ValueError(f"unknown budget {self.budget!r}: use {', '.join(BUDGETS)}")

    @property
    def kind(self) -> str:
        """The way in which the factors follow from the derivatives."""
        return self.weights

    @property
    def label(self) -> str:
        if self.step is not None:
            how = f"step {short(self.step)}"
        else:
            assert self.share is not None and self.amplify is not None and self.damp is not None
            how = f"{short(self.share)} x{short(self.damp)} to x{short(self.amplify)}"
        of = "" if self.rank is None else f" of {self.rank}"
        return f"reweight {self.weights} {how}{of}" + " energy" * (self.budget == "energy")

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        """Raises ValueError, because the factors depend on the derivatives to the values of one matrix."""
        raise ValueError(f"the factors of {self.label!r} depend on a loss")

    def resolved(self, losses: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Weighted]:
        """Return the region of each matrix. losses: as for all regions that depend on a loss."""
        return {name: Weighted(self, name, losses[name]) for name in shapes}


@dataclass(frozen=True, eq=False)
class Weighted:
    """What `Reweight` is for one matrix.

    matrix: its name. losses: float64 [r], the first-order change of the loss if each value is removed, -s_i g_i.
    """

    rule: Reweight
    matrix: str
    losses: Tensor
    by: ClassVar[str] = "reweight"
    rank_only: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        """That of the rule."""
        return self.rule.kind

    @property
    def label(self) -> str:
        return self.rule.label

    def positions(self, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
        rank = min(shape)
        return stretch(0, rank if self.rule.rank is None else min(rank, self.rule.rank))

    def factors(self, sigma: Tensor, seed: int | None = None) -> Tensor:
        """Return the factor of the value at each position, float64 [n].

        sigma: the singular values, float64 [r]. seed: None, or that of a random order in which the factors of the
        matrix are given to its values before the budget is kept. Where all values are zero the factors are 1.
        """
        values = sigma.cpu()[self.positions(None, (len(sigma), len(sigma)))]
        slope = torch.where(values > 0, -self.losses.cpu()[: len(values)] / values.clamp(min=1e-300), 0.0)
        found = _factors(self.rule, slope)
        if seed is not None:
            found = found[torch.randperm(len(found), generator=generator_of(f"{seed}:{self.matrix}"))]
        power = 1 if self.rule.budget == "nuclear" else 2
        before, after = (values**power).sum(), ((values * found) ** power).sum()
        return found * (before / after) ** (1 / power) if before > 0 else torch.ones_like(found)


def _factors(rule: Reweight, slope: Tensor) -> Tensor:
    """Return the factors before the budget is kept, float64 [n]. slope: the derivatives to the values, float64 [n]."""
    n, size = len(slope), slope.abs()
    if size.sum() == 0:
        return torch.ones_like(slope)
    if rule.step is not None:
        exponent = -rule.step * slope / size.mean()
        return torch.exp(exponent - exponent.max())  # the budget undoes any common factor
    assert rule.share is not None and rule.amplify is not None and rule.damp is not None
    if rule.weights == "sensitivity":
        n_core = max(1, round(n * rule.share))
        n_rest = min(n - n_core, round(n * rule.share))
        order = size.argsort(descending=True, stable=True)
        found = torch.ones_like(slope)
        found[order[:n_core]] = rule.amplify
        found[order[n - n_rest :]] = rule.damp
        return found
    low, centre, high = torch.quantile(size, size.new_tensor([rule.share, 0.5, 1 - rule.share]))
    if high == low:
        return torch.ones_like(slope)
    gate = torch.sigmoid((size - centre) / (TEMPERATURE * (high - low)))
    return rule.damp + (rule.amplify - rule.damp) * gate


@dataclass
class ReweightRule:
    """A factor for each singular value of a change, by the derivative of the calibration task's loss to it."""

    weights: list[Literal["sensitivity", "smooth", "descent"]] = field(default_factory=lambda: ["sensitivity"])
    budget: Literal["nuclear", "energy"] = "nuclear"  # what of the values of a matrix stays: their sum, or its squares
    rank: int | None = None  # so many of the largest values of each matrix, such as the rank of an adapter; null: all
    share: float = 0.2  # of the values, so many are amplified and as many damped
    amplify: float = 1.25  # factor of the values with the largest derivatives
    damp: float = 0.8  # factor of the values with the smallest derivatives
    step: float = 0.2  # of descent: the exponent of a value whose derivative is the mean one
    region_type: ClassVar[type] = Reweight

    def __post_init__(self) -> None:
        if not self.weights:
            raise wrong("weights", [], "region.by=reweight needs at least one, for example [sensitivity]")
        if self.rank is not None and self.rank < 2:
            raise wrong("rank", self.rank, "it must be at least 2, because one value alone keeps its norm")
        if not 0 < self.share < 0.5:
            raise wrong("share", self.share, "it must be above 0 and below 0.5")
        if not 0 <= self.damp < self.amplify:
            raise wrong("damp", self.damp, f"it must be at least 0 and below region.amplify, which is {self.amplify}")
        if not self.step > 0:
            raise wrong("step", self.step, "it must be above 0")
        if self.step != 0.2 and "descent" not in self.weights:
            raise wrong("step", self.step, "only region.weights=[descent] reads it")
        for key, usual in (("share", 0.2), ("amplify", 1.25), ("damp", 0.8)):
            if getattr(self, key) != usual and self.weights == ["descent"]:
                right = "region.weights=[descent] reads neither share nor amplify nor damp"
                raise wrong(key, getattr(self, key), right)

    def regions(self) -> list[Reweight]:
        """Return one region for each way to choose the factors."""
        return [
            Reweight(way, self.budget, self.rank, step=self.step) if way == "descent"
            else Reweight(way, self.budget, self.rank, self.share, self.amplify, self.damp)
            for way in self.weights
        ]
