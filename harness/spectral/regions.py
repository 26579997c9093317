"""Which singular values a region means: half-open intervals of the descending spectrum, and the controls.

Position 0 is the largest value. Adjacent regions partition the rank: a fraction f of rank r is the boundary
floor(f r + 1e-9), the same from both sides.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.random_matrix import NOISE_ESTIMATORS, hard_threshold, mp_region_bounds

SIZED_KINDS = ("large", "bulk", "small", "interval")
KINDS: dict[str, tuple[str, ...]] = {
    "fraction": SIZED_KINDS,
    "energy": SIZED_KINDS,
    "decile": ("decile",),
    "index": ("index",),
    "mp": ("above", "inside", "below"),
    "gavish_donoho": ("above", "below"),
    "control": ("none", "random", "energy_matched", "lower_bulk"),
}


@dataclass(frozen=True)
class Region:
    """A rule that picks singular values of any matrix; make one with the functions below.

    start, stop: fractions of the rank (fraction, decile), shares of the squared Frobenius norm (energy) or positions
        with the meaning of a Python slice (index).
    seed and reference: of the controls: the region whose count or removed energy is matched.
    estimator, tracy_widom: of the Marchenko-Pastur regions: a name in NOISE_ESTIMATORS, and whether the edges carry
        the margin of a finite matrix.
    Raises ValueError where the combination means nothing.
    """

    kind: str
    by: str
    start: float | int | None = None
    stop: float | int | None = None
    seed: int | None = None
    reference: Region | None = None
    estimator: str = "gavish_donoho"
    tracy_widom: bool = False

    def __post_init__(self) -> None:
        if self.by not in KINDS:
            raise ValueError(f"unknown region rule {self.by!r}: use {', '.join(KINDS)}")
        if self.kind not in KINDS[self.by]:
            raise ValueError(f"unknown region kind {self.kind!r} by {self.by}: use {', '.join(KINDS[self.by])}")
        if self.by in ("fraction", "energy", "decile"):
            if self.start is None or self.stop is None or not 0 <= self.start < self.stop <= 1:
                raise ValueError(f"region {self.kind} by {self.by} needs 0 <= start < stop <= 1, got "
                                 f"{self.start}:{self.stop}")
        if self.by == "index":
            _check_index(self.start, self.stop)
        if self.kind in ("random", "energy_matched") and (self.reference is None or self.seed is None):
            raise ValueError(f"control {self.kind!r} needs a seed and a reference region")
        if self.kind == "lower_bulk" and (self.reference is None or self.reference.by != "mp"):
            raise ValueError("control 'lower_bulk' needs a reference region by mp")
        if self.estimator not in NOISE_ESTIMATORS:
            raise ValueError(f"unknown noise estimator {self.estimator!r}: use {', '.join(NOISE_ESTIMATORS)}")

    @property
    def label(self) -> str:
        """Short name, different for different regions."""
        if self.by == "decile":
            return f"decile {round(self.stop * 10)} ({self.start:.1f}-{self.stop:.1f})"
        if self.by == "index":
            return f"index {_open(self.start)}:{_open(self.stop)}"
        if self.by == "mp":
            return f"mp {self.kind} {self.estimator}" + " tracy_widom" * self.tracy_widom
        if self.by == "gavish_donoho":
            return f"gavish_donoho {self.kind}"
        if self.by == "control":
            matched = "" if self.reference is None else f" ({self.reference.label})"
            return self.kind + matched + ("" if self.seed is None else f" seed {self.seed}")
        size = f"{_short(self.start)}:{_short(self.stop)}"
        if self.kind != "interval":
            size = _short(self.stop - self.start)
        return f"{self.kind} {size}" if self.by == "fraction" else f"{self.kind} {self.by} {size}"


def _open(bound: int | None) -> str:
    return "" if bound is None else str(bound)


def _short(value: float) -> str:
    return f"{value:.10g}"


def _check_index(start: int | None, stop: int | None) -> None:
    if any(bound is not None and int(bound) != bound for bound in (start, stop)):
        raise ValueError(f"an index region needs whole numbers, got {_open(start)}:{_open(stop)}")
    low = 0 if start is None else start
    # 5:3, -3:-5, 4:4 and -8:0 are empty for every matrix, and -8:-0 is -8:0 by the time it is a number.
    if stop is not None and stop <= low and (stop >= 0) == (low >= 0) or stop == 0:
        raise ValueError(f"index region {_open(start)}:{_open(stop)} is empty; leave the end open ('-8:') to mean the "
                         "smallest value")


def sized_region(kind: str, size: float, by: str = "fraction") -> Region:
    """large [0, f), small [1-f, 1) or bulk [0.5-f/2, 0.5+f/2) of the rank, or of the energy; 0 < size <= 1."""
    if not 0 < size <= 1:
        raise ValueError(f"the size of a region must lie in (0, 1], got {size}")
    starts = {"large": 0.0, "bulk": 0.5 - size / 2, "small": 1 - size}
    stops = {"large": size, "bulk": 0.5 + size / 2, "small": 1.0}
    if kind not in starts:
        raise ValueError(f"unknown region kind {kind!r}: use large, bulk, small")
    return Region(kind, by, float(starts[kind]), float(min(stops[kind], 1.0)))


def interval_region(start: float, stop: float, by: str = "fraction") -> Region:
    """[start, stop) of the rank (by fraction) or of the energy (by energy)."""
    return Region("interval", by, float(start), float(stop))


def decile_region(decile: int) -> Region:
    """One tenth of the rank; 1 holds the LARGEST values, 10 the smallest."""
    if decile not in range(1, 11):
        raise ValueError(f"a decile is a whole number from 1 (largest) to 10 (smallest), got {decile}")
    return Region("decile", "decile", (decile - 1) / 10, decile / 10)


def index_region(start: int | None, stop: int | None) -> Region:
    """Positions start:stop as in a Python slice: negative ones count from the small end, None is open."""
    return Region("index", "index", start, stop)


def parse_interval(text: str, by: str) -> Region:
    """The region of a config's "a:b": by index "0:16", "1:", "-8:"; by fraction or energy "0.2:0.5", "0.9:".

    Raises ValueError naming the text. "-8:-0" means up to the end, as the writer intended.
    """
    start, colon, stop = (part.strip() for part in text.partition(":"))
    number = int if by == "index" else float
    try:
        if not colon:
            raise ValueError
        low = number(start) if start else None
        high = None if stop in ("", "-0") else number(stop)
    except ValueError:
        raise ValueError(f"interval {text!r} is not start:stop with {'whole ' * (by == 'index')}numbers") from None
    if by == "index":
        return index_region(low, high)
    return interval_region(0.0 if low is None else low, 1.0 if high is None else high, by)


def none_region() -> Region:
    """The control "decompose, remove nothing"."""
    return Region("none", "control")


def random_region(reference: Region, seed: int) -> Region:
    """As many values as `reference` picks, at random positions. The draw depends on seed, shape and count only."""
    return Region("random", "control", seed=seed, reference=reference)


def energy_matched_region(reference: Region, seed: int) -> Region:
    """Random values whose removed squared Frobenius norm is as near to the reference's as a greedy draw gets."""
    return Region("energy_matched", "control", seed=seed, reference=reference)


def mp_region(kind: str, estimator: str = "gavish_donoho", tracy_widom: bool = False) -> Region:
    """Values above, inside or below the Marchenko-Pastur bulk of i.i.d. entries; the three partition the rank."""
    return Region(kind, "mp", estimator=estimator, tracy_widom=tracy_widom)


def gavish_donoho_region(kind: str) -> Region:
    """Values above or below the optimal hard threshold of Gavish and Donoho (noise unknown)."""
    return Region(kind, "gavish_donoho")


def lower_bulk_region(reference: Region) -> Region:
    """As many values as `reference` (by mp) picks, from the lower end of the inside of the same bulk.

    The count-matched control for outliers: small values that the null model explains. Fewer where the bulk is smaller.
    """
    return Region("lower_bulk", "control", reference=reference)


def rank_only(region: Region) -> bool:
    """Whether the choice depends on the rank alone, so that an empty one can be told before weights are loaded."""
    if region.by == "control":
        return region.kind == "none" or region.kind == "random" and rank_only(region.reference)
    return region.by in ("fraction", "decile", "index")


def select(region: Region, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Positions to remove: int64 [n] on the CPU, ascending, of a matrix of `shape` with singular values sigma [r].

    sigma may be None where `rank_only(region)`. Raises ValueError where it is needed and missing, or of wrong length.
    """
    rank = min(shape)
    if sigma is None and not rank_only(region):
        raise ValueError(f"region {region.label!r} depends on the singular values")
    if sigma is not None and tuple(sigma.shape) != (rank,):
        raise ValueError(f"a {shape[0]}x{shape[1]} matrix has {rank} singular values, got shape {tuple(sigma.shape)}")
    if region.by == "control":
        return _control(region, sigma, shape)
    start, stop = _bounds(region, sigma, shape)
    return torch.arange(start, max(start, stop))


def fraction_interval(indices: Tensor, rank: int) -> tuple[float, float] | tuple[None, None]:
    """Half-open (start / rank, stop / rank) of contiguous positions; (None, None) if empty or with holes."""
    n = len(indices)
    if n == 0 or int(indices[-1]) - int(indices[0]) + 1 != n:
        return None, None
    return int(indices[0]) / rank, (int(indices[-1]) + 1) / rank


def _bounds(region: Region, sigma: Tensor | None, shape: tuple[int, int]) -> tuple[int, int]:
    rank = min(shape)
    if region.by == "index":
        return slice(region.start, region.stop).indices(rank)[:2]
    if region.by == "energy":
        return tuple(_energy_boundary(sigma, share) for share in (region.start, region.stop))
    if region.by == "mp":
        start, stop = mp_region_bounds(sigma, shape, region.estimator, region.tracy_widom)
        return {"above": (0, start), "inside": (start, stop), "below": (stop, rank)}[region.kind]
    if region.by == "gavish_donoho":
        n_above = int((sigma > hard_threshold(sigma, shape)).sum())
        return (0, n_above) if region.kind == "above" else (n_above, rank)
    return tuple(math.floor(fraction * rank + 1e-9) for fraction in (region.start, region.stop))


def _energy_boundary(sigma: Tensor, share: float) -> int:
    """The smallest k whose k leading values hold at least `share` of the squared Frobenius norm."""
    if share <= 0:
        return 0
    if share >= 1:
        return len(sigma)
    held = torch.cumsum(sigma.detach().cpu().to(torch.float64) ** 2, dim=0)
    # 1e-12: a share that is exactly reached must count as reached after rounding of the sums.
    return min(int((held < (share - 1e-12) * held[-1]).sum()) + 1, len(sigma))


def _control(region: Region, sigma: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if region.kind == "none":
        return torch.arange(0)
    reference = select(region.reference, sigma, shape)
    if region.kind == "lower_bulk":
        start, stop = mp_region_bounds(sigma, shape, region.reference.estimator, region.reference.tracy_widom)
        return torch.arange(max(start, stop - len(reference)), stop)
    order = _shuffled(region.seed, shape, len(reference))
    if region.kind == "random":
        return order[: len(reference)].sort().values
    return _match_energy(sigma.detach().cpu().to(torch.float64) ** 2, reference, order)


def _shuffled(seed: int, shape: tuple[int, int], count: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{shape[0]}x{shape[1]}:{count}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(min(shape), generator=generator)


def _match_energy(energies: Tensor, reference: Tensor, order: Tensor) -> Tensor:
    """Take values in random order while they fit under the target, then one more if that lands nearer."""
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
