"""Targets: the matrices that one ablation edits together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from harness.errors import InputError, wrong
from harness.models.families import GROUPS, expand_layer_types
from harness.models.matrices import Matrix
from harness.registry import nearest
from harness.spectral.regions.named_components import parse_name


@dataclass
class TargetSettings:
    """Which matrices a study edits, and which of them together.

    kind: "matrix", each alone; "type", each layer type in all blocks; "block", each block; "all" together;
    "type_and_matrix", the first two in one study.
    """

    kind: Literal["matrix", "type", "block", "all", "type_and_matrix"] = "matrix"
    layer_types: list[str] = field(default_factory=lambda: ["all"])
    blocks: list[int] | None = None  # null: every block

    def __post_init__(self) -> None:
        if not self.layer_types:
            raise wrong("layer_types", [], "name at least one, for example [mlp]")
        if self.blocks == []:
            raise wrong("blocks", [], "name at least one, for example [0]; null: every block")


@dataclass(frozen=True)
class Target:
    """The matrices that one ablation edits together.

    kind: "matrix", "type", "block" or "all"; "baseline" for no matrix, "control" for all matrices that a study edits,
        or for none of them.
    matrices: their names. first_block: the first block that is edited. block, layer_type: those of the matrices; None
    if they have several.
    """

    kind: str
    label: str
    matrices: tuple[str, ...]
    first_block: int
    block: int | None = None
    layer_type: str | None = None


BASELINE = Target("baseline", "baseline", (), 0)
# The control of the noise floor edits no matrix, so that none is decomposed for it.
UNEDITED = Target("control", "control", (), 0)


def choose_matrices(
    matrices: Sequence[Matrix], layer_types: Sequence[str], blocks: Sequence[int] | None, key: str = ""
) -> list[Matrix]:
    """Return the matrices of some layer types or groups of them in some blocks, in the order of `matrices`.

    blocks: None for all. key: the text before `layer_types` and `blocks` in messages, such as "target.". Raises
    InputError for a block or a layer type that the model does not have.
    """
    wanted = expand_layer_types(layer_types, f"{key}layer_types")
    n_blocks = 1 + max(matrix.block for matrix in matrices)
    chosen_blocks = range(n_blocks) if blocks is None else blocks
    for block in chosen_blocks:
        if not 0 <= block < n_blocks:
            raise InputError(f"{key}blocks: {block} is not a block of this model; blocks are 0 to {n_blocks - 1}")
    there = {matrix.layer_type for matrix in matrices}
    chosen = [matrix for matrix in matrices if matrix.block in set(chosen_blocks) and matrix.layer_type in wanted]
    absent = [name for name in wanted if name not in there]
    if not chosen or (absent and not set(layer_types) & set(GROUPS)):
        known = ", ".join(dict.fromkeys(matrix.layer_type for matrix in matrices))
        raise InputError(f"{key}layer_types: this model has no {', '.join(absent or wanted)}; it has {known}")
    return chosen


def expand_targets(settings: TargetSettings, matrices: Sequence[Matrix]) -> list[Target]:
    """Return the targets of a study, in the order of their first block. Raises InputError as `choose_matrices` does."""
    chosen = choose_matrices(matrices, settings.layer_types, settings.blocks, "target.")
    if settings.kind == "matrix":
        return [Target("matrix", m.name, (m.name,), m.block, m.block, m.layer_type) for m in chosen]
    where = "" if settings.blocks is None else f"blocks {','.join(map(str, settings.blocks))} "
    if settings.kind == "type":
        of_type: dict[str, list[Matrix]] = {}
        for matrix in chosen:
            of_type.setdefault(matrix.layer_type, []).append(matrix)
        return [_joint("type", where + name, members, layer_type=name) for name, members in of_type.items()]
    what = "" if set(settings.layer_types) == {"all"} else " " + "+".join(settings.layer_types)
    if settings.kind == "type_and_matrix":
        kinds: tuple[Literal["type"], Literal["matrix"]] = ("type", "matrix")
        found = [one for kind in kinds for one in expand_targets(replace(settings, kind=kind), matrices)]
        return sorted(found, key=lambda target: target.first_block)
    if settings.kind == "block":
        of_block: dict[int, list[Matrix]] = {}
        for matrix in chosen:
            of_block.setdefault(matrix.block, []).append(matrix)
        return [_joint("block", f"block {b}{what}", members, block=b) for b, members in sorted(of_block.items())]
    return [_joint("all", (where + "all" + what).strip(), chosen)]


def named_target(names: Sequence[str], matrices: Sequence[Matrix]) -> Target:
    """Return the target of components by name, "matrix:position": the matrices that have them.

    Raises InputError for a matrix that the model does not have, and for a position that a matrix does not have.
    """
    by_name = {matrix.name: matrix for matrix in matrices}
    chosen = {}
    for name in names:
        matrix, position = parse_name(name)
        if matrix not in by_name:
            there = nearest(matrix, list(by_name))
            raise InputError(f"region.names: {matrix!r} is no matrix of this model; {there}"
                             f"it has {next(iter(by_name))} to {list(by_name)[-1]}")
        rank = min(by_name[matrix].shape)
        if not -rank <= position < rank:
            raise InputError(f"region.names: {name!r} is wrong; {matrix} has positions 0 to {rank - 1}")
        chosen[matrix] = by_name[matrix]
    members = sorted(chosen.values(), key=lambda matrix: list(by_name).index(matrix.name))
    if len(members) == 1:
        return Target("matrix", members[0].name, (members[0].name,), members[0].block, members[0].block,
                      members[0].layer_type)
    return _joint("all", "+".join(matrix.name for matrix in members), members)


def control_target(targets: Sequence[Target]) -> Target:
    """Return one target with the matrices of all these targets, for the control that decomposes and removes nothing."""
    names = dict.fromkeys(name for target in targets for name in target.matrices)
    return Target("control", "control", tuple(names), min(target.first_block for target in targets))


def _joint(
    kind: str, label: str, members: list[Matrix], block: int | None = None, layer_type: str | None = None
) -> Target:
    return Target(kind, label, tuple(m.name for m in members), min(m.block for m in members), block, layer_type)
