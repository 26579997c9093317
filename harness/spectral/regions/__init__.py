"""Regions: rules that say which singular values of a matrix are meant, and the controls.

    >>> from harness.spectral import regions
    >>> regions.small(0.1).label
    'small 0.1'
    >>> regions.select(regions.Decile(1), None, (20, 30)).tolist()
    [0, 1]

Position 0 is the largest singular value. Each rule has one file in this folder, which holds its settings, their
validation, the choice of positions, and the label. Another package adds a rule by an entry point of the group
"harness.regions".
"""

from harness.spectral.regions.component import Component
from harness.spectral.regions.compression import Compression
from harness.spectral.regions.controls import (
    CONTROLS,
    OF_REFERENCE,
    EnergyMatched,
    LowerBulk,
    Nothing,
    OtherOrder,
    Random,
    ReferenceMatrices,
    ReferenceModel,
    Rotated,
    RotatedOutput,
    Shuffled,
    SwapValues,
    SwapVectors,
)
from harness.spectral.regions.decile import Decile
from harness.spectral.regions.energy import Energy
from harness.spectral.regions.fraction import Fraction
from harness.spectral.regions.gavish_donoho import GavishDonoho
from harness.spectral.regions.index import Index
from harness.spectral.regions.laser import Laser
from harness.spectral.regions.marchenko_pastur import MarchenkoPastur
from harness.spectral.regions.named_components import Named
from harness.spectral.regions.region import (
    Region,
    by_factors,
    by_loss,
    factors_of,
    fraction_interval,
    per_matrix,
    select,
)
from harness.spectral.regions.reweight import Reweight
from harness.spectral.regions.rules import RULES, RegionRule, from_plain, to_plain


def large(size: float, by: str = "fraction") -> Fraction | Energy:
    """The largest values: [0, size) of the rank, or of the squared Frobenius norm if `by` is "energy".

    Raises ValueError unless 0 < size <= 1, and for another `by` than "fraction" or "energy".
    """
    return _sized("large", size, by)


def bulk(size: float, by: str = "fraction") -> Fraction | Energy:
    """The values in the middle: [0.5 - size / 2, 0.5 + size / 2) of the rank or the energy; otherwise as `large`."""
    return _sized("bulk", size, by)


def small(size: float, by: str = "fraction") -> Fraction | Energy:
    """The smallest values: [1 - size, 1) of the rank or the energy; otherwise as `large`."""
    return _sized("small", size, by)


def interval(start: float, stop: float, by: str = "fraction") -> Fraction | Energy:
    """The values in [start, stop) of the rank, or of the squared Frobenius norm if `by` is "energy".

    Raises ValueError unless 0 <= start < stop <= 1, and for another `by`.
    """
    return _of(by)("interval", float(start), float(stop))


def _sized(kind: str, size: float, by: str) -> Fraction | Energy:
    return _of(by).of_size(kind, size)


def _of(by: str) -> type[Fraction] | type[Energy]:
    if by not in ("fraction", "energy"):
        raise ValueError(f"a size is taken by fraction or by energy, not by {by!r}")
    return Fraction if by == "fraction" else Energy


__all__ = [
    "CONTROLS",
    "OF_REFERENCE",
    "RULES",
    "Component",
    "Compression",
    "Decile",
    "Energy",
    "EnergyMatched",
    "Fraction",
    "GavishDonoho",
    "Index",
    "Laser",
    "LowerBulk",
    "MarchenkoPastur",
    "Named",
    "Nothing",
    "OtherOrder",
    "Random",
    "ReferenceMatrices",
    "ReferenceModel",
    "Region",
    "RegionRule",
    "Reweight",
    "Rotated",
    "RotatedOutput",
    "Shuffled",
    "SwapValues",
    "SwapVectors",
    "bulk",
    "by_factors",
    "by_loss",
    "factors_of",
    "fraction_interval",
    "from_plain",
    "interval",
    "large",
    "per_matrix",
    "select",
    "small",
    "to_plain",
]
