"""The units of `harness tune`: a fine-tuning of one seed, with one region removed before or after it, or none."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine.plan import Plan, canonical, digest, folder_of, run_id
from harness.engine.ranks import Ranks
from harness.errors import InputError
from harness.evaluation.requests import PreparedTask, TaskContext, task_digest
from harness.measurements.ablation.cells import chosen_regions, expand_ablations, region_key
from harness.measurements.ablation.region_settings import NO_REGION, OTHER_ORDER
from harness.measurements.tuning.settings import TuneSettings
from harness.models.decompositions import experts_key
from harness.models.description import ModelDescription
from harness.models.editing import Ablation
from harness.models.families import family_of, matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer, pick_device
from harness.models.matrices import Matrix
from harness.models.targets import BASELINE
from harness.tasks.labelled_texts import LabelledText, Trainable
from harness.tasks.registry import check_kinds, prepare_tasks, wants_classifier
from harness.tasks.settings import RowsTask

NUMBERS_VERSION = 1  # must be raised when a change of the code changes numbers in the tables
# Settings of `tune` that change no number of a unit, or that the unit states itself.
_NOT_IN_ID = ("data_files", "split", "task", "order", "seeds", "checkpoint_every", "keep_models")


@dataclass(frozen=True)
class Tuning:
    """One fine-tuning and its removal.

    training: the id of its training. All units with the order tune or tune_prune of one seed share it.
    """

    id: str
    order: str
    ablation: Ablation
    seed: int
    training: str

    @property
    def part(self) -> str:
        """The order, because `harness status` counts the fine-tunings of each order."""
        return self.order


@dataclass(frozen=True, kw_only=True)
class TunePlan(Plan):
    """The plan of `harness tune`. examples: the training examples. tasks: what is measured, prepared for the model."""

    settings: TuneSettings
    units: tuple[Tuning, ...]
    description: ModelDescription
    matrices: tuple[Matrix, ...]
    tokenizer: Any
    tasks: dict[str, PreparedTask]
    examples: list[LabelledText]

    def groups(self, units: Sequence[Tuning]) -> list[list[Tuning]]:
        """Return the units of each training as one group, so that no shard trains what another trains."""
        groups: dict[str, list[Tuning]] = {}
        for unit in units:
            groups.setdefault(unit.training, []).append(unit)
        return list(groups.values())

    def together(self, n_missing: int, n_ranks: int) -> bool:
        """Return False. Raises InputError for several processes, which transformers' Trainer would join into one."""
        if n_ranks > 1:
            raise InputError("tune: it runs in one process; start it without a launcher, or divide it into shards with"
                             " harness submit tune")
        return False


def plan(settings: TuneSettings) -> TunePlan:
    """Return the fine-tunings that the settings mean. No weights are loaded.

    Raises InputError if the model, the data and the settings do not fit each other, and for weights that are not in
    float32.
    """
    trained = settings.trained_task()
    description = describe_model(settings.model, wants_classifier(settings.tasks))
    if description.dtype != "float32":
        raise InputError(f"model.dtype: {description.dtype} is wrong; weights are trained in float32"
                         " (model.dtype=float32), and tune.bf16=true computes in bfloat16")
    check_kinds(settings.tasks, description.config, family_of(description.config).kind)
    matrices = matrices_of(skeleton(description.config, description.family), description.family)
    tokenizer = load_tokenizer(settings.model, description)
    context = TaskContext.of(description, tokenizer)
    tasks = prepare_tasks(settings.tasks, context)
    examples = _examples(settings, trained, context)
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    regions = [region for region in settings.region.regions(shapes.values()) if region not in (NO_REGION, OTHER_ORDER)]
    treatment = settings.region.treatment.treatment(None)
    targets, chosen = settings.region.targets(settings.target, matrices), chosen_regions(settings.region, shapes)
    ablations = expand_ablations(targets, regions, shapes, treatment, chosen)
    base = {
        "version": NUMBERS_VERSION, "model": description.identity, "trained": trained,
        "attn_implementation": settings.model.attn_implementation, "examples": _digest(examples),
        "tune": {key: value for key, value in dataclasses.asdict(settings.tune).items() if key not in _NOT_IN_ID},
        **experts_key(description.config),
    }
    asked = {name: task_digest(task) for name, task in tasks.items()}
    units = tuple(_units(settings, ablations, base, asked))
    folder = folder_of(settings.output, f"tune-{settings.model.stem}-{run_id(u.id for u in units)[:8]}")
    return TunePlan(folder=folder, settings=settings, units=units, description=description, matrices=matrices,
                    tokenizer=tokenizer, tasks=tasks, examples=examples)


def restore(folder: Path, manifest: Mapping[str, Any], settings: TuneSettings) -> TunePlan:
    """Return the plan that was frozen in a folder. Raises InputError if weights or data have changed since."""
    pick_device(settings.model.device)
    return plan(settings).restored(folder, manifest)


def describe(plan: TunePlan) -> str:
    """Return the text of `harness plan`."""
    tune, trainings = plan.settings.tune, len({unit.training for unit in plan.units})
    longest = max(len(text.tokens) for text in plan.examples)
    measured = ", ".join(f"{name} {len(task.example_ids)}" for name, task in plan.tasks.items())
    return "\n".join([
        f"tune {plan.id}  folder {plan.folder}",
        f"model {plan.settings.model.name} ({plan.description.config.model_type}), {len(plan.matrices)} matrices",
        f"fine-tunings {trainings} ({tune.method}), each of {tune.steps} steps of {tune.batch_size} examples",
        f"training on {plan.settings.trained_task()}: {len(plan.examples)} examples of at most {longest} tokens",
        f"units {len(plan.units)}: " + ", ".join(
            f"{order} {sum(unit.order == order for unit in plan.units)}" for order in tune.order),
        f"measured after each: {measured} examples",
    ])


def _examples(settings: TuneSettings, name: str, context: TaskContext) -> list[LabelledText]:
    tune, task = settings.tune, settings.tasks[name]
    changes: dict[str, Any] = {"data_files": tune.data_files, "split": tune.split, "limit": tune.n_examples}
    assert isinstance(task, RowsTask)  # as every kind that can be trained on is
    of_training = dataclasses.replace(task, **changes, part=None)
    assert isinstance(of_training, Trainable)  # `trained_task` has found it
    most = tune.max_tokens
    if most is None:
        return of_training.labelled(name, context)
    if context.kind != "classification":
        return [dataclasses.replace(text, tokens=text.tokens[-most:]) for text in of_training.labelled(name, context)]
    shorter = dataclasses.replace(context, context_length=min(most, context.context_length))
    found = of_training.labelled(name, shorter)  # of a pair the tokenizer shortens the longer sentence
    if any(len(text.tokens) > most for text in found):
        raise InputError(f"tune.max_tokens: {most} is too small; the marks of the sentences leave no room for text")
    return found


def _digest(examples: Sequence[LabelledText]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in examples:
        for array in (text.tokens, text.segments, text.words, [text.label]):
            content = np.asarray([] if array is None else array, dtype="<i8")
            found.update(len(content).to_bytes(8, "little") + content.tobytes())
    return found.hexdigest()


def _units(
    settings: TuneSettings, ablations: Sequence[Ablation], base: Mapping[str, Any], asked: Mapping[str, str]
) -> Iterator[Tuning]:
    """Yield the units without removal for all seeds, then both orders of one region after the other for all seeds.

    So an unfinished run has all seeds of its first regions.
    """
    orders, seeds = settings.tune.order, settings.tune.seeds
    edits = [ablation for ablation in ablations if ablation.target.kind not in ("baseline", "control")]
    planned = [("tune", Ablation(BASELINE, NO_REGION), seed) for seed in seeds if "tune" in orders]
    planned += [(order, edit, seed) for edit in edits for order in ("tune_prune", "prune_tune") if order in orders
                for seed in seeds]
    for order, ablation, seed in planned:
        edit = None if order == "tune" else region_key(ablation.region, ablation.treatment)
        what = [sorted(ablation.target.matrices), edit]
        pruned = what if order == "prune_tune" else None
        training = digest(canonical({**base, "seed": seed, "pruned": pruned}))
        unit_id = digest(canonical({"training": training, "order": order, "ablation": what, "tasks": asked}))
        yield Tuning(unit_id, order, ablation, seed, training)


def require_one_process(ranks: Ranks) -> None:
    """Raise InputError for several processes."""
    if ranks.n > 1:
        raise InputError("tune: it runs in one process; start it without a launcher, or divide it into shards with"
                         " harness submit tune")
