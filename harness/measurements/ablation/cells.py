"""The cells of a study, and their ids, which are hashes of everything that the number of a cell depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.engine.plan import canonical, digest
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask, task_digest
from harness.measurements.ablation.region_settings import (
    NO_REGION,
    OF_NO_TARGET,
    OTHER_ORDER,
    REFERENCE_MATRICES,
    REFERENCE_MODEL,
    SWAPS,
    RegionSettings,
)
from harness.measurements.ablation.settings import StudySettings
from harness.models.decompositions import experts_key
from harness.models.description import ModelDescription
from harness.models.editing import Ablation
from harness.models.targets import BASELINE, UNEDITED, Target, control_target
from harness.models.treatment import REMOVE, Treatment
from harness.spectral.regions import Region, select
from harness.spectral.regions.named_components import NamedRule, parse_name

NUMBERS_VERSION = 4  # must be raised when a change of the code changes the numbers of cells
ADAPTIVE_VERSION = 2  # the same for those that only adaptive cells have


Chosen = Callable[[Target, Region], bool]


@dataclass(frozen=True)
class Cell:
    """One ablation measured on one task of one model. task: the name of the task in the study."""

    id: str
    ablation: Ablation
    task: str

    @property
    def part(self) -> str:
        """The task, because `harness status` counts the cells of each task."""
        return self.task

    @property
    def is_baseline(self) -> bool:
        """Whether this is a cell of the unedited model."""
        return self.ablation.target.kind == "baseline"

    @property
    def in_other_order(self) -> bool:
        """Whether this is the control that measures the noise floor."""
        return self.ablation.region.kind == OTHER_ORDER.kind

    @property
    def of_reference_model(self) -> bool:
        """Whether this is the control that measures the reference model itself."""
        return self.ablation.region.kind == REFERENCE_MODEL.kind

    @property
    def exactly(self) -> bool:
        """Whether it is measured on every example, also where the precision is adaptive."""
        return self.in_other_order or self.of_reference_model

    @property
    def of_grid(self) -> bool:
        """Whether the target is one of the study's, and not the baseline or a control that removes nothing."""
        return self.ablation.target.kind not in ("baseline", "control")


def expand_ablations(
    targets: Sequence[Target], regions: Sequence[Region], shapes: Mapping[str, tuple[int, int]],
    treatment: Treatment = REMOVE, chosen: Chosen | None = None,
) -> list[Ablation]:
    """Return all ablations of a study: the baseline, the controls that remove nothing, then those of each target.

    shapes: matrix -> (out, in). treatment: what is done with every region. chosen: which regions each target has; None:
    all. Raises InputError if a region is empty for one of the matrices that should have it, without `chosen`, or if it
    is kept and holds all values.
    """
    if chosen is None:
        _check_not_empty(targets, regions, shapes, treatment.keep)
    ablations = [Ablation(BASELINE, NO_REGION)]
    if NO_REGION in regions:
        # One control over all edited matrices is enough: it decomposes them, removes nothing and casts them back.
        ablations.append(Ablation(control_target(targets), NO_REGION, treatment.removing_nothing()))
    if OTHER_ORDER in regions:
        ablations.append(Ablation(UNEDITED, OTHER_ORDER))
    if REFERENCE_MATRICES in regions:
        whole = Target("control", "control", tuple(shapes), 0)
        ablations.append(Ablation(whole, REFERENCE_MATRICES, treatment.removing_nothing()))
    if REFERENCE_MODEL in regions:
        ablations.append(Ablation(UNEDITED, REFERENCE_MODEL, treatment.removing_nothing()))
    regions = [region for region in regions if region not in OF_NO_TARGET]
    for target in targets:
        distinct = {shapes[name] for name in target.matrices}
        there = [region for region in regions if chosen is None or chosen(target, region)]
        own = _without_equivalent_controls(there, *distinct) if len(distinct) == 1 else there
        ablations += [
            Ablation(target, region, treatment.removing_nothing() if region.kind in SWAPS else treatment)
            for region in own
        ]
    return ablations


def chosen_regions(settings: RegionSettings, shapes: Mapping[str, tuple[int, int]]) -> Chosen | None:
    """Return which regions each target has, or None if it has all. shapes: matrix -> (out, in)."""
    if isinstance(settings.rule, NamedRule) and settings.rule.each:
        return _alone(settings.rule.names)
    return _anywhere(shapes) if getattr(settings.rule, "all", False) else None


def _anywhere(shapes: Mapping[str, tuple[int, int]]) -> Chosen:
    """Choose the regions of which a matrix of the target has values, as far as that is known beforehand."""

    def chosen(target: Target, region: Region) -> bool:
        distinct = {shapes[name] for name in target.matrices}
        return not region.rank_only or any(len(select(region, None, shape)) for shape in distinct)

    return chosen


def _alone(names: Iterable[str]) -> Chosen:
    """Choose single components and their controls by name, such as "28.up_proj:573"."""
    wanted = {parse_name(name) for name in names}

    def chosen(target: Target, region: Region) -> bool:
        component = getattr(region, "reference", None) or region
        return (target.label, getattr(component, "position", None)) in wanted

    return chosen


def _without_equivalent_controls(regions: Sequence[Region], shape: tuple[int, int]) -> list[Region]:
    """Return the regions without random controls that remove as many values as another, or all values.

    The draw of a random control depends only on its seed, the shape and the count. One that removes all values would
    repeat the removal of the whole matrix.
    """
    kept, counts = [], set()
    for region in regions:
        if region.kind == "random" and region.rank_only:
            count = (getattr(region, "seed", None), len(select(region, None, shape)))
            if count in counts or count[1] == min(shape):
                continue
            counts.add(count)
        kept.append(region)
    return kept


def _check_not_empty(
    targets: Sequence[Target], regions: Sequence[Region], shapes: Mapping[str, tuple[int, int]], keep: bool
) -> None:
    example = {shapes[name]: name for target in reversed(targets) for name in reversed(target.matrices)}
    for region in regions:
        if region in OF_NO_TARGET or not region.rank_only:
            continue
        for shape, name in example.items():
            picked = len(select(region, None, shape))
            if keep and picked == min(shape) and region.by != "control":
                raise InputError(
                    f"region.keep: {region.label} is all of matrix {name}, so that nothing is removed; keep a smaller"
                    " region, or leave that matrix out of the target"
                )
            if picked == 0:
                rank = min(shape)
                right = f"use at least {1 / rank:.4g} of them"
                if region.by == "index":
                    right = f"positions are 0 to {rank - 1}"
                raise InputError(
                    f"region: {region.label} is empty for matrix {name}, which has {rank} singular values;"
                    f" {right}, or leave that matrix out of the target"
                )


# Fields that the id of a cell hashes for every region, also where its class lacks them. Ids of earlier versions, which
# had one class for all regions, stay valid in this way.
_REGION_KEY = {"start": None, "stop": None, "seed": None, "reference": None, "estimator": "gavish_donoho",
               "tracy_widom": False}  # fmt: skip


def region_key(region: Region, treatment: Treatment = REMOVE) -> dict[str, Any]:
    """Return everything of a region and its treatment that a number depends on. The default treatment adds nothing."""
    found = {key: value for key, value in _whole_key(region).items() if value is not None}
    return {**found, "treatment": treatment.key()} if treatment.key() else found


def _whole_key(region: Any) -> dict[str, Any]:
    own = {field.name: getattr(region, field.name) for field in dataclasses.fields(region)}
    if hasattr(region, "key"):
        own = region.key()
    if own.get("reference") is not None:
        own = {**own, "reference": _whole_key(own["reference"])}
    return {"kind": region.kind, "by": region.by, **_REGION_KEY, **own}


def numeric_settings(settings: StudySettings, description: ModelDescription) -> dict[str, Any]:
    """Return the settings on which the numbers of cells depend, apart from target, region and task."""
    runtime = settings.runtime
    found: dict[str, Any] = {
        "numbers_version": NUMBERS_VERSION,
        "model": description.identity,
        "dtype": description.dtype,
        "attn_implementation": settings.model.attn_implementation,
        "edit": runtime.edit,
        "seed": settings.seed,
        **experts_key(description.config),
    }
    if has_noise_floor(description):
        found |= {"batch_tokens": runtime.batch_tokens, "share_context": runtime.share_context}
    if runtime.compile:
        found["compile"] = "blocks and head"
    if runtime.tree_attention != "mask":
        found["tree_attention"] = runtime.tree_attention
    if runtime.precision == "adaptive":
        # An adaptive cell may stop after each batch, so the size of batches changes its number.
        adaptive = {**dataclasses.asdict(runtime.adaptive), "version": ADAPTIVE_VERSION}
        found |= {"adaptive": adaptive, "batch_tokens": runtime.batch_tokens}
    return found


def has_noise_floor(description: ModelDescription) -> bool:
    """Return whether a study of the model measures its noise floor, because its numbers depend on the batches."""
    return description.dtype != "float32"


def distinct_digests(tasks: Mapping[str, PreparedTask]) -> dict[str, str]:
    """Return the digest of each task by name. Raises InputError if two tasks ask the same."""
    digests = {name: task_digest(task) for name, task in tasks.items()}
    first: dict[str, str] = {}
    for name, found in digests.items():
        if first.setdefault(found, name) != name:
            raise InputError(f"tasks.{name}: it asks exactly what tasks.{first[found]} asks; leave one of them out")
    return digests


def cell_ids(settings: dict[str, Any], ablations: Iterable[Ablation], tasks: Iterable[str]) -> Iterator[str]:
    """Yield the ids of the cells, ablation by ablation and for each ablation task by task.

    settings: as `numeric_settings` returns. tasks: the digests of the tasks.
    """
    first, tasks = canonical(settings), [canonical(task) for task in tasks]
    regions: dict[tuple[Region, Treatment], str] = {}
    for ablation in ablations:
        target, region = ablation.target, (ablation.region, ablation.treatment)
        if region not in regions:
            regions[region] = canonical(region_key(*region))
        what = f"{canonical(sorted(target.matrices))},{'null' if target.kind == 'baseline' else regions[region]}"
        for task in tasks:
            yield digest(f"[{first},{what},{task}]")


def cell_id(settings: dict[str, Any], ablation: Ablation, task: str) -> str:
    """Return the id of one cell. settings: as `numeric_settings` returns. task: the digest of the task."""
    return next(cell_ids(settings, [ablation], [task]))


def group_by_ablation(cells: Sequence[Cell]) -> list[tuple[Ablation, list[Cell]]]:
    """Return each ablation with its cells, in the order in which the frontier moves."""
    groups: dict[Ablation, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.ablation, []).append(cell)
    order = {ablation: i for i, ablation in enumerate(groups)}
    return sorted(groups.items(), key=lambda item: (item[0].target.first_block, order[item[0]]))
