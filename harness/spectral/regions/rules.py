"""The registry of region rules, and the conversion of regions to plain values for manifests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, ClassVar, Protocol

from harness.errors import InputError
from harness.registry import Registry
from harness.spectral.regions.controls import CONTROLS
from harness.spectral.regions.region import Region


class RegionRule(Protocol):
    """The settings of a rule: a dataclass with one field for each of its keys in the config group `region`.

    All fields have defaults. `__post_init__` raises SettingError for wrong values. region_type: the class of the
    regions of this rule.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    region_type: ClassVar[type]

    def regions(self) -> Sequence[Region]:
        """Return the regions that the settings describe. Raises SettingError."""
        ...


RULES: Registry[type[RegionRule]] = Registry("harness.regions", "a region rule", {
    "fraction": "harness.spectral.regions.fraction:FractionRule",
    "decile": "harness.spectral.regions.decile:DecileRule",
    "index": "harness.spectral.regions.index:IndexRule",
    "laser": "harness.spectral.regions.laser:LaserRule",
    "energy": "harness.spectral.regions.energy:EnergyRule",
    "mp": "harness.spectral.regions.marchenko_pastur:MarchenkoPasturRule",
    "gavish_donoho": "harness.spectral.regions.gavish_donoho:GavishDonohoRule",
    "component": "harness.spectral.regions.component:ComponentRule",
    "named": "harness.spectral.regions.named_components:NamedRule",
    "compression": "harness.spectral.regions.compression:CompressionRule",
    "reweight": "harness.spectral.regions.reweight:ReweightRule",
    "none": "harness.spectral.regions.unedited:UneditedRule",
})  # fmt: skip


def to_plain(region: Region) -> dict[str, Any]:
    """Return the region as plain values, from which `from_plain` makes an equal region."""
    values = {field.name: getattr(region, field.name) for field in fields(region)}
    if values.get("reference") is not None:
        values["reference"] = to_plain(values["reference"])
    return {"by": region.by, "kind": region.kind, **values}


def from_plain(values: Mapping[str, Any]) -> Region:
    """Return the region that `to_plain` wrote. Raises InputError for an unknown control or rule."""
    by, kind = values["by"], values["kind"]
    if by == "control" and kind not in CONTROLS:
        raise InputError(f"region: {kind!r} is not a control; known are {', '.join(CONTROLS)}")
    region_type = CONTROLS[kind] if by == "control" else RULES[by].region_type
    own = {field.name for field in fields(region_type)}
    arguments = {key: value for key, value in values.items() if key in own}
    if arguments.get("reference") is not None:
        arguments["reference"] = from_plain(arguments["reference"])
    return region_type(**arguments)
