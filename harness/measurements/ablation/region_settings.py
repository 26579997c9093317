"""The settings of the regions of a study: a rule with its own settings, the treatment, and the controls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from harness.errors import SettingError, wrong
from harness.measurements.ablation.treatment_settings import TreatmentSettings
from harness.models.matrices import Matrix
from harness.models.rotation import ROTATIONS
from harness.models.targets import Target, TargetSettings, expand_targets, named_target
from harness.settings.validation import chosen, plain, validated
from harness.spectral.regions import (
    CONTROLS,
    OF_REFERENCE,
    RULES,
    Nothing,
    OtherOrder,
    ReferenceMatrices,
    ReferenceModel,
    Region,
    RegionRule,
)
from harness.spectral.regions.component import ComponentRule
from harness.spectral.regions.fraction import FractionRule
from harness.spectral.regions.named_components import NamedRule
from harness.spectral.regions.reweight import ReweightRule

NO_REGION = Nothing()
OTHER_ORDER = OtherOrder()
REFERENCE_MATRICES, REFERENCE_MODEL = ReferenceMatrices(), ReferenceModel()
# Controls that are measured once in a study, and not for each target.
OF_NO_TARGET = (NO_REGION, OTHER_ORDER, REFERENCE_MATRICES, REFERENCE_MODEL)
SWAPS = ("swap_values", "swap_vectors")  # controls that replace whole matrices of a target


@dataclass
class RegionSettings:
    """The singular values that are removed, and what is done with them instead of a removal.

    by: the name of the rule in RULES. rule: its settings. A config has them in one group, such as
        {by: decile, deciles: [1, 10], controls: [none]}.
    controls: names in CONTROLS. random_seeds: the seeds of the controls that draw at random.
    """

    by: str = "fraction"
    rule: RegionRule = field(default_factory=FractionRule)
    controls: list[str] = field(default_factory=lambda: ["none"])
    random_seeds: list[int] = field(default_factory=lambda: [0])
    treatment: TreatmentSettings = field(default_factory=TreatmentSettings)

    def __post_init__(self) -> None:
        for control in self.controls:
            if not isinstance(control, str) or control not in CONTROLS:
                raise wrong("controls", control, f"use one of {', '.join(CONTROLS)}")
        of_reference = [control for control in self.controls if control in OF_REFERENCE]
        if of_reference and self.treatment.of == "weight":
            raise wrong("controls", of_reference[0], "it needs region.of=change or region.of=reference")
        self._check_rotations()
        if self.by == "mp" and self.treatment.metric == "activations":
            right = "the law of Marchenko and Pastur is not that of W C^(1/2), whose entries are not independent"
            raise wrong("metric", self.treatment.metric, right)
        if "zero_sum" in getattr(self.rule, "ranks", ()) and self.treatment.calibration is None:
            right = "it needs a text for the loss: calibration=wikitext, or uniform without one"
            raise wrong("ranks", "zero_sum", right)
        if isinstance(self.rule, ComponentRule) and self.rule.top and self.treatment.calibration is None:
            right = "it needs a text for the loss: calibration=wikitext, or use region.all or region.ends without one"
            raise wrong("top", self.rule.top, right)
        self._check_derived()
        useless = [control for control in self.controls if control not in ("none", "other_order")]
        if self.by == "none" and useless:
            raise wrong("controls", useless[0], "region=none has no region for which it could be a control")
        if "lower_bulk" in self.controls and self.by != "mp":
            raise wrong("controls", "lower_bulk", "it is matched to the outliers of region.by=mp")
        if self._draws() and not self.random_seeds:
            drawn = ", ".join(name for name, control in CONTROLS.items() if control.draws)
            right = f"the controls that draw ({drawn}) need at least one, for example [0]"
            raise wrong("random_seeds", [], right)
        for seed in self.random_seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise wrong("random_seeds", seed, "it must be at least 0")

    def _check_derived(self) -> None:
        """Check what depends on the loss of a calibration."""
        treatment, reweights = self.treatment, isinstance(self.rule, ReweightRule)
        by_loss = reweights or isinstance(self.rule, ComponentRule) and self.rule.top > 0
        if treatment.of != "weight" and treatment.calibration is not None and not by_loss:
            right = "for a part of a change only region=reweight and region.top read it; leave it out"
            raise SettingError("calibration", right)
        if "shuffled" in self.controls and not reweights:
            raise wrong("controls", "shuffled", "it is the control of the factors of region=reweight")
        if not reweights:
            return
        if treatment.of != "change":
            raise wrong("of", treatment.of, "region=reweight gives factors to the values of a change; use change")
        if treatment.calibration is None:
            right = "must be set, because region=reweight derives its loss; for example calibration=label_words"
            raise SettingError("calibration", right)
        for key, value in (("keep", treatment.keep), ("scale", treatment.scale)):
            if value:
                raise wrong(key, value, "region=reweight has a factor for each value; leave it out")
        drawn = [control for control in ("random", "energy_matched", "lower_bulk") if control in self.controls]
        if drawn:
            raise wrong("controls", drawn[0], "the controls of region=reweight are none, shuffled and rotated")

    def _check_rotations(self) -> None:
        treatment = self.treatment
        for control in ROTATIONS:
            if control not in self.controls:
                continue
            if treatment.of == "weight" and treatment.keep:
                raise wrong("controls", control, "random directions cannot be kept; leave region.keep out")
            if control == "rotated" and treatment.of == "weight" and treatment.metric == "activations":
                right = "in the metric of the activations use rotated_output, whose outputs are as large"
                raise wrong("controls", control, right)
            if control == "rotated_output" and treatment.of != "weight":
                raise wrong("controls", control, "outputs are those of a weight; use rotated for a change")
            if control == "rotated_output" and treatment.calibration is None:
                raise wrong("controls", control, "it needs a text for the outputs: calibration=wikitext")

    def _draws(self) -> bool:
        return any(CONTROLS[control].draws for control in self.controls)

    def plain(self) -> dict[str, Any]:
        """Return the settings in the form of a config."""
        rule, treatment = plain(self.rule), self.treatment.plain()
        return {"by": self.by, **rule, **treatment, "controls": self.controls, "random_seeds": self.random_seeds}

    def unread(self) -> Iterator[SettingError]:
        """Yield an error if there are seeds that no control reads, and those of the treatment."""
        yield from self.treatment.unread()
        if self.by == "none" and self.treatment != TreatmentSettings():
            yield wrong("by", self.by, "it removes nothing, so that metric, keep, scale, replace and of mean nothing")
        if self.random_seeds != [0] and not self._draws():
            right = ("only the controls random, energy_matched, rotated, rotated_output and shuffled read it;"
                     f" region.controls is [{', '.join(self.controls)}]")
            yield wrong("random_seeds", self.random_seeds, right)

    def targets(self, settings: TargetSettings, matrices: Sequence[Matrix]) -> list[Target]:
        """Return the targets of a study, which are those of the settings, or the matrices of named components.

        Raises InputError as `expand_targets` and `named_target` do.
        """
        if isinstance(self.rule, NamedRule):
            if not self.rule.each:
                return [named_target(self.rule.names, matrices)]
            place = {matrix.name: i for i, matrix in enumerate(matrices)}
            found = [named_target(names, matrices) for names in self.rule.of_matrix().values()]
            return sorted(found, key=lambda target: place[target.label])
        return expand_targets(settings, matrices)

    def regions(self, shapes: Iterable[tuple[int, int]] = ()) -> list[Region]:
        """Return the regions of a study without duplicates, with the controls last.

        shapes: (out, in) of the matrices of its targets, which only components need that are all of a matrix.
        """
        rule = self.rule
        regions: list[Region] = list(rule.regions(shapes) if isinstance(rule, ComponentRule) else rule.regions())
        controls = [made for name, control in CONTROLS.items() if name in self.controls
                    for made in control.of(regions, self.random_seeds)]
        # What the norms, the embeddings and the head contribute is a row of every study of a change.
        gap = [] if self.treatment.of == "weight" else [REFERENCE_MATRICES, REFERENCE_MODEL]
        return list(dict.fromkeys([*regions, *controls, *gap]))


def read_region(values: Any) -> RegionSettings:
    """Return the settings of the regions from plain values. RegionSettings are returned unchanged.

    A key of a rule that was not chosen is accepted if its value is null or the default. Raises SettingError.
    """
    if isinstance(values, RegionSettings):
        return values
    if not isinstance(values, Mapping):
        raise wrong("", values, "it must be a group of keys with values, for example {by: decile}")
    given = {key: value for key, value in {"by": "fraction", **values}.items() if value is not None}
    lists = {key: given.pop(key) for key in ("controls", "random_seeds") if key in given}
    treatment = validated(TreatmentSettings, _of_treatment(given))
    if isinstance(given.get("by"), str) and given["by"] in RULES:
        given = _without_other_rules(given)
    rule = chosen(RULES, "by", given)
    return RegionSettings(
        given["by"], rule, treatment=treatment, **{key: _list(key, value) for key, value in lists.items()}
    )


def _of_treatment(given: dict[str, Any]) -> dict[str, Any]:
    """Take the keys of the treatment out of `given` and return them.

    `keep` is true or false for the treatment, and a list for the rule of LASER. Raises SettingError if that rule is
    given true.
    """
    if given.get("by") == "laser" and given.get("keep") is True:
        right = "for region=laser it lists the ranks that are kept; use region=fraction with region.keep=true"
        raise wrong("keep", True, right)
    own = {one.name for one in fields(TreatmentSettings)}
    if isinstance(given.get("keep"), list):
        own.remove("keep")
    return {key: given.pop(key) for key in list(given) if key in own}


def _without_other_rules(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values without the keys that only other rules read. Raises SettingError if one is not the default.

    Keys that no rule reads stay, because `chosen` refuses them with the names of the right ones.
    """
    by, kept = values["by"], {}
    own = {"by", *_defaults(RULES[by])}
    for key, value in values.items():
        readers = [] if key in own else [name for name, rule in RULES.items() if key in _defaults(rule)]
        if not readers:
            kept[key] = value
        elif all(value != _defaults(RULES[name])[key] for name in readers):
            raise wrong(key, value, f"only region.by={' or '.join(readers)} reads it, here it is {by}")
    return kept


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise wrong(key, value, f"it must be a list, for example [{value}]")
    return list(value)


def region_keys() -> dict[str, Any]:
    """Return every key that a config of a region may have, with the value that means "not given"."""
    default = RegionSettings()
    keys = {"by": default.by, "controls": default.controls, "random_seeds": default.random_seeds}
    kinds = [TreatmentSettings, *(rule for _, rule in RULES.items())]
    return {**{key: None for kind in kinds for key in _defaults(kind)}, **keys}


def _defaults(rule: Any) -> dict[str, Any]:
    return {one.name: _default(one) for one in fields(rule)}


def _default(one: Field[Any]) -> Any:
    if one.default is not MISSING:
        return one.default
    assert one.default_factory is not MISSING  # every setting of a rule has a default
    return one.default_factory()
