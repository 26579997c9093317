"""The settings of `harness search`: those of a study, and those of the choice, the controls and the composition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from harness.errors import SettingError, wrong
from harness.measurements.ablation import settings as study_settings
from harness.measurements.ablation.settings import StudySettings
from harness.settings.constraints import Bounds, at_least
from harness.tasks.settings import SplitTask

CONFIG = "config"  # conf/config.yaml

# Name of a setting -> the values of `choice` that read it.
_READ_BY_CHOICE = {"keep": ("gradient",), "gradient_examples": ("gradient", "compare")}


@dataclass
class SearchChoices:
    """What a search does with its grid, which holds every target with every region.

    metrics: the metrics that are optimised, for each task those of them that it has.
    choice: the cells that are measured. "exhaustive": all. "gradient": those of the targets that gradients predict to
        be best. "compare": all, and the predictions are compared with the measurements.
    keep: the share of the targets that choice "gradient" measures; with region=component, of the single components.
    gradient_examples: the number of examples of each task for the gradients of "gradient" and "compare".
    report_limit: the largest number of examples in the report part of each task (BLiMP: of each paradigm); null: all.
    control_seeds: the seeds of the draws of each control of each best cell. The p-value against a control is that of a
        new draw and needs at least two.
    compose: "greedy" adds ablations block after block if they help on examples that did not choose them; with
        region=component the best components, of any matrix, one after the other.
    """

    metrics: list[str] = field(default_factory=lambda: ["accuracy", "logprob", "perplexity"])
    choice: Literal["exhaustive", "gradient", "compare"] = "exhaustive"
    keep: Annotated[float, Bounds(above=0, at_most=1)] = 0.1
    gradient_examples: Annotated[int, at_least(1)] = 100
    report_limit: Annotated[int, at_least(2)] | None = None
    control_seeds: list[Annotated[int, at_least(0)]] = field(default_factory=lambda: list(range(10)))
    compose: Literal["none", "greedy"] = "none"

    def __post_init__(self) -> None:
        if not self.metrics:
            raise wrong("metrics", [], "name at least one, for example [accuracy]")
        if len(set(self.control_seeds)) < max(2, len(self.control_seeds)):
            right = "name at least two different ones, for example [0,1,2]; how much draws differ needs two"
            raise wrong("control_seeds", self.control_seeds, right)

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for each setting that is not the default and that this choice does not read."""
        default = {one.name: one.default for one in fields(SearchChoices)}
        for key, read_by in _READ_BY_CHOICE.items():
            value = getattr(self, key)
            if self.choice not in read_by and value != default[key]:
                yield wrong(key, value, f"only search.choice={' or '.join(read_by)} reads it")


@dataclass
class SearchSettings(StudySettings):
    """The settings of a study, and those of the search in the field `search`."""

    search: SearchChoices = field(default_factory=SearchChoices)

    def searched(self) -> list[str]:
        """Return the names of the tasks that are searched, which are those that can be split into parts."""
        return [name for name, task in self.tasks.items() if isinstance(task, SplitTask)]

    def beside(self) -> list[str]:
        """Return the names of the tasks without parts, on which the best cells are only measured."""
        return [name for name, task in self.tasks.items() if not isinstance(task, SplitTask)]


Settings = SearchSettings


def check(settings: SearchSettings) -> None:
    """Raise InputError if settings that are to be run do not make a search.

    This is so if no task can be split, a task has a part already, the precision is not exact, there is no table of
    examples, or a greedy composition has targets that span several blocks.
    """
    study_settings.check(settings)
    if settings.region.treatment.of != "weight":
        raise wrong("region.of", settings.region.treatment.of, "a search is over parts of the weights; use harness run")
    if settings.region.by == "none":
        raise wrong("region.by", "none", "a search needs regions; for the baseline alone use harness run")
    settings.runtime.require_batch_tokens("search")
    for name, task in settings.tasks.items():
        if isinstance(task, SplitTask) and task.part is not None:
            raise SettingError(f"tasks.{name}.part", "leave it unset; a search uses both parts")
    if not settings.searched():
        raise SettingError("task", (
            f"none of {', '.join(settings.tasks)} can be split into a selection and a report part; add one such as ioi,"
            " factual, blimp, lambada or epistemic_reasoning"
        ))
    if not settings.runtime.examples:
        raise wrong("runtime.examples", False, "a search compares cells example by example")
    if settings.runtime.precision != "exact":
        right = "use exact for a search, because adaptive cells use different examples"
        raise wrong("runtime.precision", settings.runtime.precision, right)
    if settings.search.choice != "exhaustive" and settings.region.treatment.replace == "mean":
        right = "a gradient to singular values does not know the biases of region.replace=mean; use exhaustive"
        raise wrong("search.choice", settings.search.choice, right)
    if settings.search.compose == "greedy" and settings.target.kind not in ("matrix", "block"):
        raise wrong("search.compose", "greedy", "it goes block by block; use target=matrix or target=block")
    if settings.search.compose == "greedy" and settings.region.by == "component" and settings.target.kind != "matrix":
        raise wrong("search.compose", "greedy", "components are composed matrix by matrix; use target=matrix")
