"""What is known of a model without its weights, and the tasks prepared for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.evaluation.calibration import CalibrationText
from harness.evaluation.requests import PreparedTask, TaskContext
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.treatment_settings import refuse_common_text
from harness.models.description import ModelDescription
from harness.models.families import family_of, matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer
from harness.models.matrices import Matrix
from harness.models.reference import Reference, describe_reference
from harness.tasks.registry import check_kinds, prepare_tasks, wants_classifier


@dataclass(frozen=True)
class Prepared:
    """What is known of a model without its weights, and the tasks prepared for it by name.

    calibration: the text over which the inputs of the matrices are measured, or None. reference: the reference model,
    or None if no region is a part of a change.
    """

    description: ModelDescription
    matrices: tuple[Matrix, ...]
    tokenizer: Any
    tasks: dict[str, PreparedTask]
    calibration: CalibrationText | None = None
    reference: Reference | None = None


def prepare(settings: StudySettings) -> Prepared:
    """Return the model without weights and the tasks prepared for it. Raises InputError if they do not fit it."""
    description = describe_model(settings.model, wants_classifier(settings.tasks))
    check_kinds(settings.tasks, description.config, family_of(description.config).kind)
    matrices = matrices_of(skeleton(description.config, description.family), description.family)
    tokenizer = load_tokenizer(settings.model, description)
    context = TaskContext.of(description, tokenizer, settings.runtime)
    tasks = prepare_tasks(settings.tasks, context)
    text = settings.region.treatment.prepared(context)
    refuse_common_text(text, tasks)
    of_change = settings.region.treatment.of != "weight"
    reference = describe_reference(settings.reference, settings.model, description) if of_change else None
    return Prepared(description, matrices, tokenizer, tasks, text, reference)
