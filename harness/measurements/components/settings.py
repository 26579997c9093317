"""The settings of `harness components`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from harness.engine.settings import ClusterSettings, ReportSettings
from harness.errors import SettingError, wrong
from harness.measurements.ablation.treatment_settings import TreatmentSettings, calibration_of
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.settings.constraints import ReadBy, at_least
from harness.settings.output import require_folder
from harness.tasks.registry import tasks_of
from harness.tasks.settings import Task

CONFIG = "components"  # conf/components.yaml


@dataclass
class SpectrumSettings:
    """Of which spectrum the components are. The keys are those of the same group of a study.

    of: "weight", or "change": the components of W - W_reference, to whose values the metrics of tasks are derived.
    metric: that of the weights, W, or of the activations, W C^(1/2). centred: C is the covariance of the inputs, and
    not their second moment. calibration: the text over which the inputs are measured, and whose loss is derived.
    """

    of: Literal["weight", "change"] = "weight"
    metric: Literal["weight", "activations"] = "weight"
    centred: bool = False
    calibration: Annotated[Task | None, ReadBy(calibration_of)] = None

    def __post_init__(self) -> None:
        if self.of == "change" and self.calibration is not None:
            right = "it is for the components of weights; give what is derived for a change as a task"
            raise SettingError("calibration", right)
        self.treatment()

    def treatment(self) -> TreatmentSettings:
        """Return the settings of a study with this spectrum. Raises SettingError if a text is lacking."""
        return TreatmentSettings(self.metric, centred=self.centred, calibration=self.calibration, of=self.of)


@dataclass
class ComponentsSettings:
    """The matrices, the tasks whose metrics are derived, the calibration text, and what is said of each component.

    tasks: those of which one metric each is derived, by one backward pass over its examples.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    blocks: list[int] | None = None  # null: every block
    region: SpectrumSettings = field(default_factory=SpectrumSettings)
    tasks: Annotated[dict[str, Task], ReadBy(tasks_of)] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)  # of each task the first that it has; []: the first that it can
    tokens: Annotated[int, at_least(0)] = 5  # so many promoted and suppressed tokens; 0: none
    tokens_of: Annotated[int, at_least(1)] | None = None  # of so many components that matter most; null: of all
    stability: list[Literal["random", "rounded"]] = field(default_factory=lambda: ["random", "rounded"])
    exact: str | None = None  # folder of a study with region=component, whose effects the report shows
    cache_dir: str | None = None  # of decompositions; null: spectral-harness in the user's cache
    threads: Annotated[int, at_least(1)] | None = None  # CPU threads; null: as torch decides
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    output: str | None = None  # folder of the run; null: results/components-<model>-<id>
    seed: Annotated[int, at_least(0)] = 0  # of newly initialised weights

    def __post_init__(self) -> None:
        if not self.layer_types:
            raise wrong("layer_types", [], "name at least one, for example [mlp]")
        if self.blocks == []:
            raise wrong("blocks", [], "name at least one, for example [0]; null: every block")
        if len(set(self.stability)) < len(self.stability):
            raise wrong("stability", self.stability, "each may be named once")
        if self.region.of == "change" and self.reference.of(self.model) is None:
            raise SettingError("reference.name", "must be set, because region.of=change is about the change from it")

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for each setting that nothing reads."""
        for error in self.region.treatment().unread():
            yield error.below("region")
        if self.tokens_of is not None and not self.tokens:
            yield wrong("tokens_of", self.tokens_of, "tokens=0 names no tokens")
        if self.metrics and not self.tasks:
            yield wrong("metrics", self.metrics, "they are those of tasks; choose one with task=...")


Settings = ComponentsSettings


def check(settings: ComponentsSettings) -> None:
    """Raise InputError if settings that are to be run lack a model, or name a study or a folder that cannot be used."""
    settings.model.require_name()
    settings.model.require_attention()
    require_folder(settings.output)
    if settings.exact is not None and not Path(settings.exact).is_dir():
        raise wrong("exact", settings.exact, "there is no such folder; name that of a study with region=component")
