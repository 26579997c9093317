"""Studies, which are frozen lists of cells: planned from settings, built from objects in memory, or restored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.engine.manifest import MANIFEST, reading
from harness.engine.plan import Plan, ShardCost, folder_of, run_id
from harness.engine.ranks import Ranks
from harness.errors import InputError
from harness.evaluation.calibration import CalibrationText
from harness.evaluation.requests import PreparedTask, TaskContext
from harness.evaluation.tree_attention import check_flex
from harness.measurements.ablation.cells import (
    Cell,
    cell_id,
    cell_ids,
    chosen_regions,
    distinct_digests,
    expand_ablations,
    group_by_ablation,
    has_noise_floor,
    numeric_settings,
    task_digest,
)
from harness.measurements.ablation.costs import CostTable, ShardOfCells, costs_of
from harness.measurements.ablation.region_settings import NO_REGION, OTHER_ORDER, REFERENCE_MODEL
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.treatment_settings import KEY, refuse_common_text
from harness.models.branches import check_biasable, check_branchable
from harness.models.description import ModelDescription
from harness.models.editing import Ablation
from harness.models.families import family_of, matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer, pick_device, train_embedded
from harness.models.matrices import Matrix
from harness.models.reference import Reference, describe_reference
from harness.models.targets import BASELINE, UNEDITED, Target
from harness.models.treatment import Treatment
from harness.spectral.regions import Region, by_loss, from_plain, to_plain
from harness.tasks.recall import EmbeddedTask
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


@dataclass(frozen=True, kw_only=True)
class Study(Plan):
    """The plan of a study.

    units: the cells in the order in which they run: first the baselines, then by first edited block, then by target.
        In this order the frontier moves only forward.
    digests: task -> digest of what it asks, as `task_digest` returns.
    """

    settings: StudySettings
    units: tuple[Cell, ...]
    prepared: Prepared
    digests: dict[str, str]

    @property
    def description(self) -> ModelDescription:
        """The description of the model, for which no weights are read."""
        return self.prepared.description

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Every matrix of the model."""
        return self.prepared.matrices

    @property
    def tasks(self) -> dict[str, PreparedTask]:
        """The tasks by name."""
        return self.prepared.tasks

    def frozen(self) -> dict[str, Any]:
        """Return the tasks, and for each cell the indices of its target, its region and its task."""
        targets = list(dict.fromkeys(cell.ablation.target for cell in self.units))
        regions = list(dict.fromkeys((cell.ablation.region, cell.ablation.treatment) for cell in self.units))
        target_index = {target: i for i, target in enumerate(targets)}
        region_index = {region: i for i, region in enumerate(regions)}
        task_index = {name: i for i, name in enumerate(self.tasks)}
        return {
            "tasks": {name: {"digest": self.digests[name], "protocol": dict(task.protocol)}
                      for name, task in self.tasks.items()},
            "targets": [dataclasses.asdict(target) for target in targets],
            # A region that is removed, and no more, is written as ever.
            "regions": [to_plain(region) | ({"treatment": treatment.key()} if treatment.key() else {})
                        for region, treatment in regions],
            "cells": [
                [target_index[c.ablation.target], region_index[c.ablation.region, c.ablation.treatment],
                 task_index[c.task]]
                for c in self.units
            ],
        }

    def settled(self, ranks: Ranks, progress: bool, say: Callable[[str], None]) -> tuple[Study, Any]:
        """Return the study and the loaded model, or None if no model had to be loaded.

        If runtime.batch_tokens is null, the study that is returned has the largest number that fits.
        """
        if self.settings.runtime.batch_tokens is not None:
            return self, None
        from harness.measurements.ablation.measure import with_largest_batch

        return with_largest_batch(self, ranks, progress, say)

    def require_settled(self, command: str) -> None:
        """Raise InputError if runtime.batch_tokens is null. command: the command that needs the number."""
        self.settings.runtime.require_batch_tokens(command)

    def together(self, n_missing: int, n_ranks: int) -> bool:
        """Return whether all processes score each cell together, which they do if there are fewer cells than processes.

        An adaptive cell is never divided, because it decides after each batch whether to go on.
        """
        return n_missing < n_ranks and self.settings.runtime.precision == "exact"

    def groups(self, units: Sequence[Cell]) -> list[list[Cell]]:
        """Return the baselines as one group, then the cells of each ablation as one group."""
        baselines = [cell for cell in units if cell.is_baseline]
        rest = group_by_ablation([cell for cell in units if not cell.is_baseline])
        return [group for group in (baselines, *(cells for _, cells in rest)) if group]

    @cached_property
    def costs(self) -> CostTable:
        """The predicted costs of its passes, moves of the frontier and decompositions."""
        return costs_of(self)

    def shard_cost(self) -> ShardCost:
        """Return the cost of an empty shard."""
        return ShardOfCells(self.costs)

    def before_jobs(self) -> None:
        """Train the embedded model once, so that not every job trains it."""
        train_embedded([self.settings.model])

    def with_settings(self, settings: StudySettings) -> Study:
        """Return the study of other settings for the same model and tasks. Its cells may have other ids."""
        return _from_settings(settings, self.prepared, self.folder)

    def with_cells(self, pairs: Iterable[tuple[Ablation, str]]) -> Study:
        """Return the study of the baselines and of these (ablation, name of a task) only, by first edited block.

        In low precision it measures its noise floor, too.
        """
        numeric = numeric_settings(self.settings, self.description)
        unedited = [Ablation(BASELINE, NO_REGION)]
        if has_noise_floor(self.description):
            unedited.append(Ablation(UNEDITED, OTHER_ORDER))
        baselines = [(ablation, name) for ablation in unedited for name in self.tasks]
        unique = dict.fromkeys([*baselines, *sorted(pairs, key=lambda pair: pair[0].target.first_block)])
        cells = tuple(
            Cell(cell_id(numeric, ablation, self.digests[task]), ablation, task) for ablation, task in unique
        )
        return dataclasses.replace(self, units=cells)


def plan(settings: StudySettings) -> Study:
    """Return the study that the settings mean, with tokenised tasks and all cells. No weights are loaded.

    Raises InputError if the model, the data or the settings do not fit each other.
    """
    _require_own_task(settings)
    study = _from_settings(settings, prepare(settings))
    if any(by_loss(cell.ablation.region) for cell in study.units) and study.description.family.kind != "causal":
        key, other = ("top", "all or ends") if settings.region.by == "component" else ("ranks", "uniform")
        raise InputError(f"region.{key}: the loss of a text is that of a causal language model only; use {other}")
    branch, to_mean = settings.runtime.edit == "branch", settings.region.treatment.replace == "mean"
    flex = settings.runtime.tree_attention == "flex"
    bare = skeleton(study.description.config, study.description.family) if branch or to_mean or flex else None
    if bare is not None and flex:
        check_flex(bare)
    if bare is not None and (branch or to_mean):
        touched = {name for cell in study.units for name in cell.ablation.target.matrices}
        check = check_branchable if branch else check_biasable
        check(bare, [matrix for matrix in study.matrices if matrix.name in touched])
    return study


def _require_own_task(settings: StudySettings) -> None:
    """Raise InputError for a task of the embedded model, which is the default, if the model is another one."""
    found = [name for name, task in settings.tasks.items() if isinstance(task, EmbeddedTask)]
    if found and not settings.model.embedded:
        raise InputError(
            "task: choose what is measured, for example task=wikitext or task=[ioi,lambada] (harness list tasks shows"
            f" all); tasks.{found[0]} is for the embedded model only"
        )


def restore(folder: Path, manifest: Mapping[str, Any], settings: StudySettings) -> Study:
    """Return the study that was frozen in a folder. Raises InputError if weights or data have changed since."""
    settings.runtime.require_batch_tokens("work")
    pick_device(settings.model.device)
    cells, digests = frozen_cells(folder, manifest), frozen_digests(folder, manifest)
    if settings.tasks.keys() != digests.keys():
        raise InputError(f"{folder / MANIFEST}: settings.tasks are {', '.join(settings.tasks)}, and the cells are of"
                         f" {', '.join(digests)}; restore it or run the study anew")
    prepared = prepare(settings)
    for name, task in prepared.tasks.items():
        if task_digest(task) != digests[name]:
            changed = _changed(manifest["tasks"][name]["protocol"], task.protocol)
            raise InputError(
                f"tasks.{name}: its {changed} changed since {folder} was frozen; restore what it was or choose another"
                " output"
            )
    frozen = {cell.ablation.treatment.calibration for cell in cells} - {None}
    if frozen - {None if prepared.calibration is None else prepared.calibration.digest()}:
        raise InputError(f"{KEY}: its text changed since {folder} was frozen; restore what it was or choose another"
                         " output")
    digest = None if prepared.reference is None else prepared.reference.digest
    if {cell.ablation.treatment.reference for cell in cells} - {None, digest}:
        raise InputError(f"reference.name: it is no longer what {folder} was frozen for; restore it or choose another"
                         " output")
    first = cells[0]
    if cell_id(numeric_settings(settings, prepared.description), first.ablation, digests[first.task]) != first.id:
        raise InputError(
            f"model.name: {settings.model.name!r} (or this harness) is no longer what {folder} was frozen for;"
            " restore it or choose another output"
        )
    return Study(folder=folder, settings=settings, units=cells, prepared=prepared, digests=digests)


def _changed(frozen: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """Return the keys of a protocol that have other values now. Without any, only tokens are different."""
    now = json.loads(json.dumps(dict(protocol), default=str))
    return ", ".join(sorted(key for key in {*frozen, *now} if frozen.get(key) != now.get(key))) or "tokens"


def describe(study: Study) -> str:
    """Return the text of `harness plan`."""
    from harness.measurements.ablation.forecast import describe_study

    return describe_study(study)


def frozen_cells(folder: Path, manifest: Mapping[str, Any]) -> tuple[Cell, ...]:
    """Return the cells of the manifest of a folder. Raises InputError if they are not as they were frozen."""
    with reading(folder / MANIFEST, "the list of its cells"):
        return _frozen_cells(manifest)


def frozen_digests(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each task by name. Raises InputError if they are not as they were frozen."""
    with reading(folder / MANIFEST, "the list of its tasks"):
        return {name: str(one["digest"]) for name, one in manifest["tasks"].items()}


def _frozen_cells(manifest: Mapping[str, Any]) -> tuple[Cell, ...]:
    targets = [Target(**{**one, "matrices": tuple(one["matrices"])}) for one in manifest["targets"]]
    regions = [(from_plain(one), Treatment(**one.get("treatment", {}))) for one in manifest["regions"]]
    tasks = list(manifest["tasks"])
    ablations: dict[tuple[int, int], Ablation] = {}
    cells = []
    for (unit_id, _), (target, region, task) in zip(manifest["units"], manifest["cells"], strict=True):
        if (target, region) not in ablations:
            ablations[target, region] = Ablation(targets[target], *regions[region])
        cells.append(Cell(unit_id, ablations[target, region], tasks[task]))
    return tuple(cells)


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


def build(
    settings: StudySettings, prepared: Prepared, targets: Sequence[Target], regions: Sequence[Region],
    folder: Path | None = None,
) -> Study:
    """Return the study of these targets and regions. In low precision it measures its noise floor, too.

    folder: its folder; by default that of the settings, or results/<model>-<study id>.
    Raises InputError if a region is empty for a matrix, or two tasks ask the same.
    """
    shapes = {matrix.name: matrix.shape for matrix in prepared.matrices}
    if has_noise_floor(prepared.description):
        regions = list(dict.fromkeys([*regions, OTHER_ORDER]))
    treatment = settings.region.treatment.treatment(prepared.calibration, prepared.reference)
    if prepared.reference is not None and not prepared.reference.same_parameters:
        regions = [region for region in regions if region != REFERENCE_MODEL]
    ablations = expand_ablations(targets, regions, shapes, treatment, chosen_regions(settings.region, shapes))
    digests = distinct_digests(prepared.tasks)
    ids = cell_ids(numeric_settings(settings, prepared.description), ablations, digests.values())
    cells = tuple(Cell(next(ids), ablation, name) for ablation in ablations for name in digests)
    if folder is None:
        default = f"{settings.model.stem}-{run_id(cell.id for cell in cells)[:8]}"
        folder = folder_of(settings.output, default)
    return Study(folder=folder, settings=settings, units=cells, prepared=prepared, digests=digests)


def _from_settings(settings: StudySettings, prepared: Prepared, folder: Path | None = None) -> Study:
    targets = settings.region.targets(settings.target, prepared.matrices)
    touched = {name for target in targets for name in target.matrices}
    shapes = [matrix.shape for matrix in prepared.matrices if matrix.name in touched]
    return build(settings, prepared, targets, settings.region.regions(shapes), folder)
