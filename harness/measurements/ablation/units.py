"""The planning of a study: from settings, from objects in memory, or from the manifest in which it was frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.engine.manifest import MANIFEST, reading
from harness.engine.plan import folder_of, run_id
from harness.errors import InputError
from harness.evaluation.requests import task_digest
from harness.evaluation.tree_attention import check_flex
from harness.measurements.ablation.cells import (
    Cell,
    cell_id,
    cell_ids,
    chosen_regions,
    distinct_digests,
    expand_ablations,
    has_noise_floor,
    numeric_settings,
)
from harness.measurements.ablation.forecast import describe_study
from harness.measurements.ablation.preparation import Prepared, prepare
from harness.measurements.ablation.region_settings import OTHER_ORDER, REFERENCE_MODEL
from harness.measurements.ablation.settings import StudySettings
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.treatment_settings import KEY
from harness.models.branches import check_biasable, check_branchable
from harness.models.editing import Ablation
from harness.models.families import skeleton
from harness.models.loading import pick_device
from harness.models.targets import Target
from harness.models.treatment import Treatment
from harness.spectral.regions import Region, by_loss, from_plain
from harness.tasks.recall import EmbeddedTask


def plan(settings: StudySettings) -> Study:
    """Return the study that the settings mean, with tokenised tasks and all cells. No weights are loaded.

    Raises InputError if the model, the data or the settings do not fit each other.
    """
    _require_own_task(settings)
    study = study_of(settings, prepare(settings))
    if any(by_loss(cell.ablation.region) for cell in study.units) and study.description.family.kind != "causal":
        key, other = {"component": ("top", "all or ends"), "reweight": ("by", "region=change")}.get(
            settings.region.by, ("ranks", "uniform"))
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


def study_of(settings: StudySettings, prepared: Prepared, folder: Path | None = None) -> Study:
    """Return the study that the settings mean for a model and tasks that are prepared already.

    folder: as in `build`. Raises InputError as `build` does, and if a target or a region does not fit the model.
    """
    targets = settings.region.targets(settings.target, prepared.matrices)
    touched = {name for target in targets for name in target.matrices}
    shapes = [matrix.shape for matrix in prepared.matrices if matrix.name in touched]
    return build(settings, prepared, targets, settings.region.regions(shapes), folder)
