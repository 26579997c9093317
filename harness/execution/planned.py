"""A study made ready: what can be known without weights, from settings or from the frozen manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Config, require_batch_tokens
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask, TaskContext
from harness.execution.branching import check_branchable
from harness.execution.manifest import read_manifest, study_of
from harness.execution.study import Study, build_study, cell_id, numeric_settings, study_folder, task_digest
from harness.execution.tasks import check_kinds, prepare_tasks, wants_classifier
from harness.models.families import matrices_of, skeleton
from harness.models.loading import ModelDescription, describe, load_tokenizer
from harness.models.matrices import Matrix


@dataclass(frozen=True)
class PlannedStudy:
    study: Study
    folder: Path
    description: ModelDescription
    matrices: tuple[Matrix, ...]
    tokenizer: Any
    tasks: dict[str, PreparedTask]


def _prepare(config: Config) -> tuple[ModelDescription, tuple[Matrix, ...], Any, dict[str, PreparedTask]]:
    description = describe(config.model, wants_classifier(config.tasks))
    check_kinds(config.tasks, description.config)
    matrices = matrices_of(skeleton(description.config, description.family))
    tokenizer = load_tokenizer(config.model, description)
    tasks = prepare_tasks(config.tasks, TaskContext(tokenizer, description.config, description.context_length))
    return description, matrices, tokenizer, tasks


def plan(config: Config) -> PlannedStudy:
    """Everything that can be known without weights: tasks tokenised, cells expanded. Raises InputError."""
    description, matrices, tokenizer, tasks = _prepare(config)
    study = build_study(config, description, matrices, tasks)
    if config.runtime.edit == "branch":
        touched = {name for cell in study.cells for name in cell.ablation.target.matrices}
        bare = skeleton(description.config, description.family)
        check_branchable(bare, [matrix for matrix in matrices if matrix.name in touched])
    return PlannedStudy(study, study_folder(config, study), description, matrices, tokenizer, tasks)


def plan_frozen(folder: str | Path) -> PlannedStudy:
    """The study of a folder, from its manifest alone; changes into the working directory in which it was frozen, so
    that relative paths mean what they meant. Raises InputError, also where weights or data are no longer the same.
    """
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    if Path(manifest["working_directory"]).is_dir():
        os.chdir(manifest["working_directory"])
    study = study_of(manifest)
    require_batch_tokens(study.config.runtime, "work")
    description, matrices, tokenizer, tasks = _prepare(study.config)
    for name, task in tasks.items():
        if task_digest(task) != study.tasks[name]["digest"]:
            raise InputError(f"tasks.{name}: its data changed since {folder} was frozen; restore them or start anew")
    first = study.cells[0]
    settings = numeric_settings(study.config, description)
    if cell_id(settings, first.ablation, study.tasks[first.task]["digest"]) != first.cell_id:
        raise InputError(
            f"model.name: {study.config.model.name!r} (or this harness) is no longer what {folder} was frozen for;"
            " restore it or start anew"
        )
    return PlannedStudy(study, folder, description, matrices, tokenizer, tasks)
