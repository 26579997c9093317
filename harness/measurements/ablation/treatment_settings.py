"""The settings of what is done with a region: its metric, whether it is kept, by what it is scaled, the calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from harness.errors import InputError, SettingError, wrong
from harness.evaluation.calibration import MOST_COMMON, CalibrationText
from harness.evaluation.requests import DirectTask, PreparedTask, TaskContext
from harness.models.reference import Reference
from harness.models.treatment import Treatment
from harness.settings.constraints import ReadBy
from harness.settings.validation import plain
from harness.tasks.registry import prepare_task, task_of
from harness.tasks.settings import Task

KEY = "region.calibration"
KINDS = ("text", "recall")  # the kinds of tasks over whose tokens the inputs of matrices can be measured


def calibration_of(values: Any) -> Task | None:
    """Return the settings of a calibration text, or None if nothing is given. Raises SettingError."""
    if values is None:
        return None
    if isinstance(values, Mapping) and values.get("kind") is None:
        right = "choose one with calibration=text and region.calibration.data_files=..., or calibration=wikitext"
        raise SettingError("", f"no kind; {right}")
    return task_of(values, "calibration")


@dataclass
class TreatmentSettings:
    """What is done with the region of each matrix. By default its singular values are removed.

    metric: in which the spectrum is taken: of the weights, W, or of the activations, W C^(1/2).
    keep: keep the region, and remove (or scale) everything else.
    scale: by what the part is multiplied; 0 removes it, 2 doubles it.
    replace: "mean" puts the mean of the part's output over the calibration text in its place, as a bias.
    centred: C is the covariance of the matrix's inputs, and not their second moment.
    calibration: the text over which the inputs are measured, as the settings of a task of kind text (or recall). With
        metric=weight it may be given, too: every row then says what the part contributes to the outputs. For parts of
        a change it is a task of any kind, whose loss chooses them.
    of: what the region is a part of: the weight W; the change D = W - W_reference, by the spectrum of D; or the change
        in directions of the reference, by the spectrum of W_reference.
    """

    metric: Literal["weight", "activations"] = "weight"
    keep: bool = False
    scale: float = 0.0
    replace: Literal["zero", "mean"] = "zero"
    centred: bool = False
    calibration: Annotated[Task | None, ReadBy(calibration_of)] = None
    of: Literal["weight", "change", "reference"] = "weight"

    def __post_init__(self) -> None:
        if self.scale == 1:
            raise wrong("scale", self.scale, "a scale of 1 changes nothing; 0 removes the region")
        if self.of != "weight" and self.metric == "activations":
            raise wrong("of", self.of, "a change is taken in the metric of the weights; use region.metric=weight")
        if self.of != "weight" and (self.centred or self.replace == "mean"):
            key, value = ("centred", True) if self.centred else ("replace", "mean")
            raise wrong(key, value, f"the inputs of matrices are not measured for region.of={self.of}")
        kind = None if self.calibration is None else self.calibration.kind
        if self.of == "weight" and kind not in (None, *KINDS):
            raise wrong("calibration.kind", kind, f"a calibration text is of kind {' or '.join(KINDS)}")
        for key, value, needs in (("metric", self.metric, "activations"), ("replace", self.replace, "mean")):
            if self.calibration is None and value == needs:
                right = "it needs a text: calibration=wikitext, or calibration=text region.calibration.data_files=..."
                raise wrong(key, value, right)

    def plain(self) -> dict[str, Any]:
        """Return the settings that are not the default, in the form of a config."""
        return {one.name: plain(getattr(self, one.name)) for one in fields(self)
                if getattr(self, one.name) != one.default}

    def unread(self) -> Iterator[SettingError]:
        """Yield an error for each setting that nothing reads."""
        if self.centred and self.calibration is None:
            yield wrong("centred", True, "only a calibration text is centred; choose one with calibration=...")
        column = getattr(self.calibration, "cluster_column", None)
        if column is not None:
            yield wrong("calibration.cluster_column", column, "a calibration has no p-value, which clusters are for")

    def prepared(self, context: TaskContext) -> CalibrationText | None:
        """Return the calibration text prepared for one model; None without one. Raises InputError as a task does."""
        if self.calibration is None:
            return None
        if context.kind == "seq2seq":
            raise InputError(f"{KEY}: the inputs of an encoder-decoder's matrices cannot be measured; leave it out")
        try:
            task = prepare_task("calibration", self.calibration, context)
        except InputError as error:
            raise InputError(str(error).replace("tasks.calibration", KEY)) from error
        if isinstance(task, DirectTask):  # no task of the kinds for a weight measures the model itself
            raise InputError(f"{KEY}: a task that measures the model directly has no loss; use another")
        of_change = task if self.of != "weight" else None
        windows = task.protocol.get("window") is not None
        return CalibrationText(task.requests, windows or of_change is not None, self.centred, task.protocol, of_change)

    def treatment(self, text: CalibrationText | None, reference: Reference | None = None) -> Treatment:
        """Return the treatment of the regions of a study.

        text: the prepared calibration text. reference: the reference model if the regions are parts of a change.
        """
        return Treatment(
            self.metric, self.keep, self.scale, self.replace, self.centred, None if text is None else text.digest(),
            self.of, None if reference is None else reference.digest,
        )


def refuse_common_text(text: CalibrationText | None, tasks: Mapping[str, PreparedTask]) -> None:
    """Raise InputError if a task asks about the calibration text itself, whole or in part."""
    if text is None:
        return
    for name, task in tasks.items():
        share = text.share_in(task)
        if share > MOST_COMMON:
            raise InputError(
                f"{KEY}: it and tasks.{name} have {share:.0%} of one of the two texts in common, and a metric must not"
                " be measured on the text that it is judged by; take another text, such as the train split"
            )
