"""The settings of `harness coupling`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from harness.engine.settings import ClusterSettings, ReportSettings
from harness.errors import SettingError, wrong
from harness.measurements.ablation.region_settings import RegionSettings, read_region, region_keys
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.models.targets import TargetSettings
from harness.settings.constraints import ReadBy, at_least
from harness.settings.output import require_folder
from harness.tasks.registry import tasks_of
from harness.tasks.settings import Task

CONFIG = "coupling"  # conf/coupling.yaml

Kind = Literal["depth", "self", "context_in", "context_out"]


def read_optional_region(values: Any) -> RegionSettings | None:
    """Return the settings of the regions, or None if nothing is given. Raises SettingError as `read_region` does."""
    if isinstance(values, Mapping):
        given = {key: value for key, value in values.items() if value is not None}
        return read_region({"controls": [], **given}) if given else None
    return None if values is None else read_region(values)


def read_tokens(values: Any) -> list[int] | str:
    """Return "last", or positions of tokens. Raises SettingError for anything else."""
    whole = isinstance(values, (list, tuple)) and all(type(one) is int for one in values)
    if values != "last" and not whole:
        raise wrong("", values, "use last, or positions such as [-1,-2,-9]")
    return values if isinstance(values, str) else list(values)


def _no_region() -> dict[str, Any]:
    return dict.fromkeys(region_keys())


@dataclass
class CouplingSettings:
    """The prompts, the Jacobians and their pairs, the weights, and the ablations whose effect on coupling is measured.

    The one task gives the prompts. target, region: without a region nothing is ablated.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)  # measured beside the model, e.g. its base
    tasks: Annotated[dict[str, Task], ReadBy(tasks_of)] = field(default_factory=dict)
    prompts: Annotated[int, at_least(1)] = 32  # sequences of the task, evenly spread over all of them
    # last, or positions in each prompt; negative ones count from its end
    tokens: Annotated[list[int] | str, ReadBy(read_tokens)] = "last"
    kinds: list[Kind] = field(default_factory=lambda: ["depth"])
    k: list[int] = field(default_factory=lambda: [10, 30])  # numbers of leading singular triples
    orders: list[Literal["ujv", "vju"]] = field(default_factory=lambda: ["ujv"])
    jacobian: Literal["auto", "dense", "whole", "krylov"] = "auto"
    normality: bool = True  # whether the eigenvalues of dense Jacobians are computed
    init: Literal["trained", "random", "both"] = "trained"  # random: newly initialised weights, as a control
    revisions: list[str] = field(default_factory=list)  # checkpoints of a training, as for harness spectra
    target: TargetSettings = field(default_factory=TargetSettings)
    region: Annotated[RegionSettings | None, ReadBy(read_optional_region, _no_region)] = None
    threads: Annotated[int, at_least(1)] | None = None  # CPU threads; null: as torch decides
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    output: str | None = None  # folder of the run; null: results/coupling-<model>-<id>
    seed: Annotated[int, at_least(0)] = 0  # of newly initialised weights and of the first vectors of the Krylov method

    def __post_init__(self) -> None:
        for key, least in (("k", 1), ("kinds", None), ("orders", None), ("tokens", None)):
            values = getattr(self, key)
            if not values:
                raise wrong(key, values, "name at least one")
            if isinstance(values, list) and len(set(values)) < len(values):
                raise wrong(key, values, "each may be named once")
            if least is not None and min(values) < least:
                raise wrong(key, values, f"each must be at least {least}")
        if self.kinds != ["depth"] and self.tokens == "last":
            more = [kind for kind in self.kinds if kind != "depth"]
            raise wrong("kinds", self.kinds, f"{more[0]} compares tokens; name several, for example tokens=[-1,-2,-9]")
        if self.jacobian == "krylov" and {"context_in", "context_out"} & set(self.kinds):
            raise wrong("jacobian", self.jacobian, "Jacobians between different tokens are dense; use auto or whole")
        if len(set(self.revisions)) < len(self.revisions):
            raise wrong("revisions", self.revisions, "each may be named once")
        if self.revisions and self.model.revision is not None:
            raise wrong("model.revision", self.model.revision, "name it among the revisions")
        if self.region is not None and self.region.treatment.of != "weight":
            right = "harness coupling removes parts of the weights; leave it out"
            raise wrong("region.of", self.region.treatment.of, right)
        if self.region is not None and self.region.treatment.calibration is not None:
            right = "harness coupling takes the spectra of weights alone; leave it and region.metric out"
            raise SettingError("region.calibration", right)
        if len(self.tasks) > 1:
            raise wrong("task", list(self.tasks), "the prompts are those of one task; choose one, for example wikitext")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error if there is a target, and no region that would be removed from it."""
        if self.region is None and self.target != TargetSettings():
            yield SettingError("target", "nothing is removed from it; choose a region, for example region=fraction")
        if self.region is not None and self.init == "random":
            yield SettingError("region", "ablations are of trained weights; use init=trained or both")


Settings = CouplingSettings


def check(settings: CouplingSettings) -> None:
    """Raise InputError if settings that are to be run lack a model or a task, or their folder cannot be written."""
    settings.model.require_name()
    settings.model.require_attention()
    if not settings.tasks:
        raise SettingError("task", "[] is wrong; choose one whose texts are the prompts, for example task=wikitext")
    require_folder(settings.output)
