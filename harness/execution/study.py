"""From settings to a study: the frozen list of cells (the manifest), with ids that hash what each depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Config, RegionConfig, TargetConfig
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask
from harness.models.families import expand_layer_types
from harness.models.loading import ModelDescription
from harness.models.matrices import Matrix
from harness.spectral.regions import (
    Region,
    decile_region,
    energy_matched_region,
    gavish_donoho_region,
    lower_bulk_region,
    mp_region,
    none_region,
    parse_interval,
    random_region,
    rank_only,
    select,
    sized_region,
)

NUMBERS_VERSION = 1  # raise when a change of the code changes what a cell's number is


@dataclass(frozen=True)
class Target:
    """The matrices that one ablation touches together; `block` and `layer_type` are None where there are several."""

    kind: str
    label: str
    matrices: tuple[str, ...]
    first_block: int
    block: int | None = None
    layer_type: str | None = None


BASELINE = Target("baseline", "baseline", (), 0)
NO_REGION = none_region()


@dataclass(frozen=True)
class Ablation:
    target: Target
    region: Region


@dataclass(frozen=True)
class Cell:
    """One ablation measured on one task of one model."""

    cell_id: str
    ablation: Ablation
    task: str

    @property
    def is_baseline(self) -> bool:
        return self.ablation.target.kind == "baseline"


@dataclass(frozen=True)
class Study:
    """study_id: a hash of the ids of all cells. Cells are in the order in which they run: the baseline, then by first
    edited block, then by target, so that the frontier only ever moves forward."""

    study_id: str
    config: Config
    tasks: dict[str, dict[str, Any]]
    cells: tuple[Cell, ...]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def expand_targets(config: TargetConfig, matrices: tuple[Matrix, ...]) -> list[Target]:
    """The targets of a study, in the order of their first block."""
    wanted = expand_layer_types(config.layer_types)
    n_blocks = 1 + max(matrix.block for matrix in matrices)
    blocks = list(range(n_blocks)) if config.blocks is None else config.blocks
    for block in blocks:
        if not 0 <= block < n_blocks:
            raise InputError(f"target.blocks: {block} is not a block of this model; blocks are 0 to {n_blocks - 1}")
    chosen = [matrix for matrix in matrices if matrix.block in set(blocks) and matrix.layer_type in wanted]
    absent = [name for name in wanted if name not in {matrix.layer_type for matrix in matrices}]
    if not chosen or (absent and not set(config.layer_types) & {"all", "attn", "mlp"}):
        there = ", ".join(dict.fromkeys(matrix.layer_type for matrix in matrices))
        raise InputError(f"target.layer_types: this model has no {', '.join(absent or wanted)}; it has {there}")
    if config.kind == "matrix":
        return [Target("matrix", m.name, (m.name,), m.block, m.block, m.layer_type) for m in chosen]
    if config.kind == "type":
        of_type: dict[str, list[Matrix]] = {}
        for matrix in chosen:
            of_type.setdefault(matrix.layer_type, []).append(matrix)
        where = _where(config.blocks)
        return [_joint("type", where + name, members, layer_type=name) for name, members in of_type.items()]
    what = "" if set(config.layer_types) == {"all"} else " " + "+".join(config.layer_types)
    if config.kind == "block":
        of_block: dict[int, list[Matrix]] = {}
        for matrix in chosen:
            of_block.setdefault(matrix.block, []).append(matrix)
        return [_joint("block", f"block {b}{what}", members, block=b) for b, members in sorted(of_block.items())]
    return [_joint("all", (_where(config.blocks) + "all" + what).strip(), chosen)]


def _where(blocks: list[int] | None) -> str:
    return "" if blocks is None else f"blocks {','.join(map(str, blocks))} "


def _joint(
    kind: str, label: str, members: list[Matrix], block: int | None = None, layer_type: str | None = None
) -> Target:
    return Target(kind, label, tuple(m.name for m in members), min(m.block for m in members), block, layer_type)


def expand_regions(config: RegionConfig) -> list[Region]:
    """The regions of a study without duplicates, controls last."""
    regions: list[Region] = []
    try:
        if config.by in ("fraction", "energy"):
            regions += [sized_region(kind, value, config.by) for kind in config.kinds for value in config.values]
        if config.by in ("fraction", "energy", "index"):
            regions += [parse_interval(text, config.by) for text in config.intervals]
        if config.by == "decile":
            regions += [decile_region(decile) for decile in config.deciles]
        if config.by == "mp":
            regions += [mp_region(kind, config.estimator, config.tracy_widom) for kind in config.mp]
        if config.by == "gavish_donoho":
            regions += [gavish_donoho_region(side) for side in config.gavish_donoho]
    except ValueError as error:
        raise InputError(f"region: {error}") from error
    controlled = list(regions)
    for control, make in (("random", random_region), ("energy_matched", energy_matched_region)):
        if control in config.controls:
            regions += [make(region, seed) for seed in config.random_seeds for region in controlled]
    if "lower_bulk" in config.controls:
        regions += [lower_bulk_region(region) for region in controlled if region.kind in ("above", "below")]
    if "none" in config.controls:
        regions.append(NO_REGION)
    return list(dict.fromkeys(regions))


def _drop_equivalent_controls(regions: list[Region], rank: int, shape: tuple[int, int]) -> list[Region]:
    """A random control per distinct count is enough, and one of the full count would repeat the full removal."""
    kept, counts = [], set()
    for region in regions:
        if region.kind == "random" and rank_only(region):
            count = (region.seed, len(select(region, None, shape)))
            if count in counts or count[1] == rank:
                continue
            counts.add(count)
        kept.append(region)
    return kept


def _check_not_empty(targets: list[Target], regions: list[Region], shapes: Mapping[str, tuple[int, int]]) -> None:
    example = {shapes[name]: name for target in reversed(targets) for name in reversed(target.matrices)}
    for region in regions:
        if region.kind == "none" or not rank_only(region):
            continue
        for shape, name in example.items():
            if len(select(region, None, shape)) == 0:
                rank = min(shape)
                right = f"use at least {1 / rank:.4g} of them"
                if region.by == "index":
                    right = f"positions are 0 to {rank - 1}"
                raise InputError(
                    f"region: {region.label} is empty for matrix {name}, which has {rank} singular values;"
                    f" {right}, or leave that matrix out of the target"
                )


def region_key(region: Region) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(region).items() if value is not None}


def numeric_settings(config: Config, description: ModelDescription) -> dict[str, Any]:
    """The settings, beside target, region and task, on which a cell's number depends."""
    settings: dict[str, Any] = {
        "numbers_version": NUMBERS_VERSION,
        "model": description.identity,
        "dtype": description.dtype,
        "attn_implementation": config.model.attn_implementation,
        "edit": config.runtime.edit,
        "seed": config.seed,
    }
    if description.dtype != "float32":
        settings |= {"batch_tokens": config.runtime.batch_tokens, "share_context": config.runtime.share_context}
    runtime = config.runtime
    if runtime.compile:
        settings["compile"] = True
    if runtime.precision == "adaptive":
        # the batches decide when one looks at a cell
        settings |= {"adaptive": dataclasses.asdict(runtime.adaptive), "batch_tokens": runtime.batch_tokens}
    return settings


def task_digest(task: PreparedTask) -> str:
    """Digest of what the task asks: its protocol and every token and position of its requests."""
    digest = hashlib.blake2b(json.dumps(dict(task.protocol), sort_keys=True, default=str).encode(), digest_size=16)
    for request in task.requests:
        optional = [array for array in (request.source, request.segments) if array is not None]
        for array in (request.tokens, request.positions, request.targets, *optional):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def build_study(
    config: Config, description: ModelDescription, matrices: tuple[Matrix, ...], tasks: Mapping[str, PreparedTask]
) -> Study:
    """Expand settings into cells. Raises InputError for targets or regions that this model does not have."""
    targets = expand_targets(config.target, matrices)
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    regions = expand_regions(config.region)
    _check_not_empty(targets, regions, shapes)
    settings = numeric_settings(config, description)
    task_info = {name: {"digest": task_digest(task), "protocol": dict(task.protocol)} for name, task in tasks.items()}
    ablations = [Ablation(BASELINE, NO_REGION)]
    if NO_REGION in regions:
        # one control over everything that the study edits: decompose, remove nothing, cast back
        names = dict.fromkeys(name for target in targets for name in target.matrices)
        control = Target("control", "control", tuple(names), min(target.first_block for target in targets))
        ablations.append(Ablation(control, NO_REGION))
        regions = [region for region in regions if region != NO_REGION]
    for target in targets:
        distinct = {shapes[name] for name in target.matrices}
        own = regions
        if len(distinct) == 1:
            (shape,) = distinct
            own = _drop_equivalent_controls(regions, min(shape), shape)
        ablations += [Ablation(target, region) for region in own]
    digests = _distinct({name: info["digest"] for name, info in task_info.items()})
    ids = cell_ids(settings, ablations, digests.values())
    cells = [Cell(next(ids), ablation, name) for ablation in ablations for name in digests]
    study_id = _digest(_canonical(sorted(cell.cell_id for cell in cells)))[:12]
    return Study(study_id, config, task_info, tuple(cells))


def _distinct(digests: dict[str, str]) -> dict[str, str]:
    first: dict[str, str] = {}
    for name, digest in digests.items():
        if first.setdefault(digest, name) != name:
            raise InputError(f"tasks.{name}: it asks exactly what tasks.{first[digest]} asks; leave one of them out")
    return digests


def cell_ids(settings: dict[str, Any], ablations: Iterable[Ablation], tasks: Iterable[str]) -> Iterator[str]:
    """For each ablation, for each task (its digest): a hash of all that the cell's number depends on."""
    first, tasks = _canonical(settings), [_canonical(task) for task in tasks]
    regions: dict[Region, str] = {}
    for ablation in ablations:
        matrices, region = sorted(ablation.target.matrices), ablation.region
        if region not in regions:
            regions[region] = _canonical(region_key(region))
        what = f"{_canonical(matrices)},{regions[region] if matrices else 'null'}"
        for task in tasks:
            yield _digest(f"[{first},{what},{task}]")


def cell_id(settings: dict[str, Any], ablation: Ablation, task: str) -> str:
    """Hash of all that the cell's number depends on; task: its digest."""
    return next(cell_ids(settings, [ablation], [task]))


def group_by_ablation(cells: list[Cell]) -> list[tuple[Ablation, list[Cell]]]:
    """Cells that share an edit, together, in the order in which the frontier moves."""
    groups: dict[Ablation, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.ablation, []).append(cell)
    order = {ablation: i for i, ablation in enumerate(groups)}
    return sorted(groups.items(), key=lambda item: (item[0].target.first_block, order[item[0]]))


def study_folder(config: Config, study: Study) -> Path:
    if config.output is not None:
        return Path(config.output).expanduser()
    name = Path(config.model.name).name
    return Path("results") / f"{name}-{study.study_id[:8]}"
