"""The settings of `harness spectra`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from harness.engine.settings import ClusterSettings, ReportSettings
from harness.errors import SettingError, wrong
from harness.models.settings import ModelSettings, ReferenceSettings
from harness.settings.constraints import ReadBy, at_least
from harness.settings.output import require_folder
from harness.tasks.registry import tasks_of
from harness.tasks.settings import Task

CONFIG = "spectra"  # conf/spectra.yaml


@dataclass
class ChangeSettings:
    """The controls beside which a change is measured, each with every seed."""

    controls: list[Literal["rotated", "noise"]] = field(default_factory=lambda: ["rotated", "noise"])
    seeds: list[Annotated[int, at_least(0)]] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        for key, values in (("controls", self.controls), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise wrong(key, values, "each may be named once")
        if self.controls and not self.seeds:
            raise wrong("seeds", [], "the controls need at least one, for example [0]")


@dataclass
class SpectraSettings:
    """The matrices, the weights, and the statistics of singular values and vectors.

    The tasks, at most one, give the text over which the covariance of the activations is computed. With a reference,
    the change of each matrix is measured, too.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    reference: ReferenceSettings = field(default_factory=ReferenceSettings)
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    blocks: list[int] | None = None  # null: every block
    init: Literal["trained", "random", "both"] = "trained"  # random: newly initialised weights, as a control
    revisions: list[str] = field(default_factory=list)  # checkpoints of a training, see units.checkpoint_settings
    estimator: Literal["gavish_donoho", "usvt", "bulk_fit"] = "gavish_donoho"  # estimator of the noise
    tracy_widom: bool = False  # whether the Tracy-Widom margin widens the edges
    vectors: bool = True  # whether the statistics of singular vectors are computed
    tasks: Annotated[dict[str, Task], ReadBy(tasks_of)] = field(default_factory=dict)
    batch_tokens: Annotated[int, at_least(1)] = 8192  # padded tokens of one forward pass over the text
    threads: Annotated[int, at_least(1)] | None = None  # CPU threads; null: as torch decides
    changes: ChangeSettings = field(default_factory=ChangeSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    output: str | None = None  # folder of the run; null: results/spectra-<model>-<id>
    seed: Annotated[int, at_least(0)] = 0  # seed of newly initialised weights

    def __post_init__(self) -> None:
        if not self.layer_types:
            raise wrong("layer_types", [], "name at least one, for example [mlp]")
        if self.blocks == []:
            raise wrong("blocks", [], "name at least one, for example [0]; null: every block")
        if len(set(self.revisions)) < len(self.revisions):
            raise wrong("revisions", self.revisions, "each may be named once")
        if self.revisions and self.model.revision is not None:
            raise wrong("model.revision", self.model.revision, "name it among the revisions")
        if self.tasks and not self.vectors:
            raise wrong("vectors", self.vectors, "the overlap with a task's activations needs vectors=true")
        if len(self.tasks) > 1:
            right = "the covariance is taken over one text; choose one, for example wikitext"
            raise wrong("task", list(self.tasks), right)
        for name, task in self.tasks.items():
            if task.kind not in ("text", "recall"):
                right = "the covariance is taken over a task of kind text or recall"
                raise wrong(f"tasks.{name}.kind", task.kind, right)


    def unread(self) -> Iterator[SettingError]:
        """Yield an error if there are settings of changes without a reference."""
        if self.changes != ChangeSettings() and self.reference.of(self.model) is None:
            yield SettingError("reference.name", "must be set, because changes.controls or changes.seeds is")
        if self.reference.name is not None and self.init == "random":
            yield wrong("init", self.init, "new weights are not compared with a reference; use trained or both")


Settings = SpectraSettings


def check(settings: SpectraSettings) -> None:
    """Raise InputError if settings that are to be run lack a model or a folder that can be written."""
    settings.model.require_name()
    settings.model.require_attention()
    require_folder(settings.output)
