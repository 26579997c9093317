"""The units of the description of components: one for every matrix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.engine.manifest import MANIFEST, manifest_there
from harness.engine.plan import canonical, digest, folder_of, run_id
from harness.errors import InputError
from harness.evaluation.requests import DirectTask, PreparedTask, ScoredTask, TaskContext, task_digest
from harness.measurements.components.forecast import price_lines
from harness.measurements.components.plan import ComponentsPlan, Unit
from harness.measurements.components.settings import ComponentsSettings
from harness.models.decompositions import experts_key
from harness.models.families import matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer, pick_device
from harness.models.reference import describe_reference
from harness.models.targets import choose_matrices
from harness.tasks.registry import check_kinds, prepare_tasks

NUMBERS_VERSION = 1  # must be raised when a change of the code changes numbers in the tables


def plan(settings: ComponentsSettings) -> ComponentsPlan:
    """Return the matrices and tasks that the settings mean. No weights are loaded.

    Raises InputError if the model or the data cannot be found, or do not fit each other, and for a model that is not a
    causal language model.
    """
    description = describe_model(settings.model)
    if description.family.kind != "causal":
        raise InputError(f"model.name: {settings.model.name!r} is no causal language model; harness components derives"
                         " log-probabilities of next tokens")
    check_kinds(settings.tasks, description.config, description.family.kind)
    matrices = matrices_of(skeleton(description.config, description.family), description.family)
    chosen = choose_matrices(matrices, settings.layer_types, settings.blocks)
    tokenizer = load_tokenizer(settings.model, description)
    context = TaskContext.of(description, tokenizer)
    text = settings.region.treatment().prepared(context)
    tasks = {name: _scored(name, task) for name, task in prepare_tasks(settings.tasks, context).items()}
    reference = describe_reference(settings.reference, settings.model, description)
    asked = {name: task_digest(task) for name, task in tasks.items()}
    depends_on: dict[str, Any] = {
        "measurement": "components",
        "version": NUMBERS_VERSION,
        "identity": description.identity,
        "dtype": description.dtype,
        "attn_implementation": settings.model.attn_implementation,
        "metric": settings.region.metric,
        "centred": settings.region.centred,
        "calibration": text and text.digest(),
        "tasks": asked,
        "metrics": settings.metrics,
        "tokens": settings.tokens,
        "stability": sorted(settings.stability),
        "seed": settings.seed if "random" in settings.stability else None,
        "reference": reference and reference.digest,
        **experts_key(description.config),
        **({"of": settings.region.of} if settings.region.of != "weight" else {}),
    }
    if settings.tokens_of is not None:
        depends_on["tokens_of"] = settings.tokens_of
    units = tuple(Unit(digest(canonical({**depends_on, "matrix": matrix.name})), matrix, matrix.layer_type)
                  for matrix in chosen)
    folder = folder_of(settings.output, f"components-{settings.model.stem}-{run_id(unit.id for unit in units)[:8]}")
    _require_same_study(folder, settings.exact)
    return ComponentsPlan(folder=folder, settings=settings, units=units, description=description, tokenizer=tokenizer,
                          text=text, tasks=tasks, reference=reference)


def _require_same_study(folder: Path, exact: str | None) -> None:
    """Raise InputError if a run is there with another study in its manifest, because the report would show that one."""
    there = manifest_there("components", folder)
    if there is not None and there.settings.get("exact") != exact:
        frozen = there.settings.get("exact")
        raise InputError(f"exact: {exact!r} is not the study of {folder}, which is {frozen!r}; write it into"
                         f" settings.exact of {folder / MANIFEST}, or name another output")


def restore(folder: Path, manifest: Mapping[str, Any], settings: ComponentsSettings) -> ComponentsPlan:
    """Return the plan that was frozen in a folder. Raises InputError if weights or data have changed since."""
    pick_device(settings.model.device)
    return plan(settings).restored(folder, manifest)


def describe(plan: ComponentsPlan) -> str:
    """Return the text of `harness plan`."""
    settings = plan.settings
    n = sum(min(unit.matrix.shape) for unit in plan.units)
    lines = [f"components {plan.id}  folder {plan.folder}",
             f"model {settings.model.label} ({plan.description.config.model_type}, {plan.description.dtype}):"
             f" {n} components of {len(plan.units)} matrices"]
    if plan.text is not None:
        lines.append(f"calibration: {len(plan.text.requests)} sequences, {plan.text.n_tokens} tokens; one pass for the"
                     " inputs, one forward and one backward pass for the loss")
    for name, task in plan.tasks.items():
        tokens = sum(len(request.tokens) for request in task.requests)
        lines.append(f"task {name}: {len(task.example_ids)} examples, {tokens} tokens; two forward passes and one"
                     " backward pass")
    return "\n".join([*lines, *price_lines(plan)])


def _scored(name: str, task: PreparedTask) -> ScoredTask:
    if isinstance(task, DirectTask):
        raise InputError(f"tasks.{name}: a task that measures the model directly has no derivative; leave it out")
    return task
