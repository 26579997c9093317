"""The settings of a study: the model, the matrices, the regions that are removed from them, and the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from harness.engine.settings import ClusterSettings, ReportSettings
from harness.engine.trackers import TrackerSettings
from harness.errors import SettingError, wrong
from harness.evaluation.settings import RuntimeSettings
from harness.measurements.ablation.region_settings import RegionSettings, read_region, region_keys
from harness.models.rotation import ROTATIONS
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.models.targets import TargetSettings
from harness.settings.constraints import ReadBy, at_least
from harness.settings.output import require_folder
from harness.tasks.registry import tasks_of
from harness.tasks.settings import Task

CONFIG = "config"  # conf/config.yaml


@dataclass
class StudySettings:
    """The settings of a study. Each group of YAML files in conf/ fills the field of its name."""

    model: ModelSettings = field(default_factory=ModelSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    region: Annotated[RegionSettings, ReadBy(read_region, region_keys)] = field(default_factory=RegionSettings)
    tasks: Annotated[dict[str, Task], ReadBy(tasks_of)] = field(default_factory=dict)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    tracker: TrackerSettings = field(default_factory=TrackerSettings)
    output: str | None = None  # folder of the study; null: results/<model>-<study id>
    seed: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        if self.runtime.compile and self.model.device_map is not None:
            raise wrong("runtime.compile", True, "it needs the whole model on one device; leave model.device_map unset")
        if self.runtime.compile and self.region.treatment.calibration is not None:
            right = "the inputs of the matrices are seen by hooks, which compiled blocks leave out"
            raise wrong("runtime.compile", True, right)
        if self.runtime.cuda_graphs is True and self.model.device_map is not None:
            right = "a graph is of one device; leave model.device_map unset, or use auto"
            raise wrong("runtime.cuda_graphs", True, right)
        if self.runtime.cuda_graphs is True and self.region.treatment.replace == "mean":
            right = "biases are hooks, which differ from cell to cell; use auto"
            raise wrong("runtime.cuda_graphs", True, right)
        of = self.region.treatment.of
        if of != "weight" and self.reference.of(self.model) is None:
            raise SettingError("reference.name", f"must be set, because region.of={of} is about the change from it")
        if of != "weight" and self.runtime.edit == "branch":
            raise wrong("runtime.edit", "branch", f"region.of={of} edits the weights; use weight")
        drawn = [control for control in ROTATIONS if control in self.region.controls]
        if drawn and self.runtime.edit == "branch":
            raise wrong("runtime.edit", "branch", f"the control {drawn[0]} edits the weights; use weight")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error if there is a reference that no region is about, or a target without a region."""
        if self.region.by == "none" and self.target != TargetSettings():
            right = "region=none edits no matrix; leave target=... out"
            yield wrong("target.kind", self.target.kind, right)
        if self.reference.name is not None and self.region.treatment.of == "weight":
            yield wrong("reference.name", self.reference.name,
                        "only region.of=change and region.of=reference read it (and harness spectra)")


Settings = StudySettings


def check(settings: StudySettings) -> None:
    """Raise InputError if settings that are to be run lack a model or a task, or their folder cannot be written."""
    settings.model.require_name()
    settings.model.require_attention()
    if not settings.tasks:
        raise SettingError("task", "[] is wrong; choose at least one, for example task=wikitext or task=[ioi,lambada]")
    require_folder(settings.output)
