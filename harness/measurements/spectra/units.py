"""The units of spectra: one for every matrix of every set of weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.engine.plan import Plan, ShardCost, SumOfCosts, digest, folder_of, run_id
from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ScoredTask, TaskContext
from harness.measurements.spectra.settings import SpectraSettings
from harness.models.description import ModelDescription
from harness.models.families import matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer, pick_device, train_embedded
from harness.models.matrices import Matrix
from harness.models.reference import Reference, describe_reference
from harness.models.settings import ModelSettings
from harness.models.targets import choose_matrices
from harness.spectral.decomposition import decomposition_flops

# They must be raised when a change of the code changes numbers in the tables; the second is of the tables of changes.
NUMBERS_VERSION, CHANGES_VERSION = 3, 1


@dataclass(frozen=True)
class Weights:
    """One set of weights of a run: the model of the settings, a checkpoint of its training, or new weights.

    matrices: the chosen matrices. init: "trained" or "random". checkpoint, index: the name of the checkpoint in the
    revisions, and its position there; None without revisions. seed: the seed of new weights; None for trained ones.
    reference: with what the matrices are compared; None for new weights, and without a reference in the settings.
    """

    model: ModelSettings
    description: ModelDescription
    matrices: tuple[Matrix, ...]
    init: str
    checkpoint: str | None = None
    index: int | None = None
    seed: int | None = None
    reference: Reference | None = None

    @property
    def label(self) -> str:
        """The name of the checkpoint, "trained" or "random"."""
        return "random" if self.init == "random" else self.checkpoint or "trained"


@dataclass(frozen=True)
class Spectrum:
    """One matrix of one set of weights.

    weights_index: the position of the weights in the plan. part: their label, because `harness status` counts the
    matrices of each set of weights.
    """

    id: str
    weights_index: int
    matrix: Matrix
    part: str


@dataclass(frozen=True, kw_only=True)
class SpectraPlan(Plan):
    """The plan of spectra. weights: all sets of weights. task: the text of the activation covariance, or None."""

    settings: SpectraSettings
    units: tuple[Spectrum, ...]
    weights: tuple[Weights, ...]
    task: ScoredTask | None

    def shard_cost(self) -> ShardCost:
        """Return the cost of an empty shard: of its decompositions, in floating-point operations."""
        return SumOfCosts(lambda unit: decomposition_flops(*unit.matrix.shape))

    def before_jobs(self) -> None:
        """Train the embedded model once, so that not every job trains it."""
        train_embedded(weights.model for weights in self.weights if weights.init == "trained")


def plan(settings: SpectraSettings) -> SpectraPlan:
    """Return the spectra that the settings mean. No weights are loaded.

    Raises InputError if the model, a checkpoint or the data of the task cannot be found, or do not fit each other.
    """
    weights = tuple(_weight_sets(settings))
    task = _prepare_task(settings, weights[0])
    units = tuple(
        Spectrum(_spectrum_id(settings, weights[: index + 1], matrix, task), index, matrix, one.label)
        for index, one in enumerate(weights) for matrix in one.matrices
    )
    folder = folder_of(settings.output, f"spectra-{settings.model.stem}-{run_id(unit.id for unit in units)[:8]}")
    return SpectraPlan(folder=folder, settings=settings, units=units, weights=weights, task=task)


def restore(folder: Path, manifest: Mapping[str, Any], settings: SpectraSettings) -> SpectraPlan:
    """Return the plan that was frozen in a folder. Raises InputError if weights or data have changed since."""
    pick_device(settings.model.device)
    return plan(settings).restored(folder, manifest)


def describe(plan: SpectraPlan) -> str:
    """Return the text of `harness plan`."""
    flops = sum(decomposition_flops(*unit.matrix.shape) for unit in plan.units)
    lines = [f"spectra {plan.id}  folder {plan.folder}"]
    for weights in plan.weights:
        description = weights.description
        lines.append(
            f"weights {weights.label}: {weights.model.label} ({description.config.model_type}, {description.dtype}),"
            f" {len(weights.matrices)} matrices"
            + (f", changes from {weights.reference.settings.label}" if weights.reference else "")
        )
    if plan.task is not None:
        tokens = sum(len(request.tokens) for request in plan.task.requests)
        lines.append(f"covariance over task {plan.task.name}: {len(plan.task.requests)} sequences, {tokens} tokens")
    return "\n".join([*lines, f"cost {flops:.3g} floating-point operations for {len(plan.units)} decompositions"])


def _weight_sets(settings: SpectraSettings) -> Iterator[Weights]:
    trained = []
    for index, revision in enumerate(settings.revisions):
        model = checkpoint_settings(settings.model, revision)
        trained.append(_trained(settings, model, revision, index))
    if not settings.revisions:
        trained.append(_trained(settings, settings.model))
    if settings.init != "random":
        yield from trained
    if settings.init != "trained":
        first = trained[0]  # one control is enough, because all checkpoints have the same architecture
        seed = settings.model.recall.seed if settings.model.embedded else settings.seed
        yield Weights(first.model, first.description, first.matrices, "random", seed=seed)


def _trained(
    settings: SpectraSettings, model: ModelSettings, checkpoint: str | None = None, index: int | None = None
) -> Weights:
    description, matrices = _described(settings, model)
    reference = describe_reference(settings.reference, model, description)
    return Weights(model, description, matrices, "trained", checkpoint, index, reference=reference)


def checkpoint_settings(model: ModelSettings, revision: str) -> ModelSettings:
    """Return the settings of one checkpoint of a training.

    For the embedded model, the revision is a number of training steps. For a model in a local folder it is a folder
    below that one, or the path of a folder. For a model of the hub it is a revision there, or the path of a folder that
    begins with ".", "/" or "~". For a model with an adapter it is the folder of an adapter, below that of the settings
    or anywhere. Raises InputError if there is no such checkpoint.
    """
    if model.embedded:
        if not revision.isdigit() or int(revision) > model.recall.steps:
            raise InputError(
                f"revisions: {revision!r} is not a checkpoint of the embedded model; give steps, "
                f"0 to {model.recall.steps} (model.recall.steps)"
            )
        return dataclasses.replace(model, recall=dataclasses.replace(model.recall, checkpoint=int(revision)))
    name = model.name if model.adapter is None else model.adapter
    folder = Path(name).expanduser()
    path_like = revision.startswith((".", "/", "~"))
    # a revision on the hub may have the name of a folder in the current one
    if folder.is_dir() or path_like or model.adapter is not None:
        for candidate in (folder / revision, Path(revision).expanduser()):
            if candidate.is_dir() and model.adapter is not None:
                return dataclasses.replace(model, adapter=str(candidate))
            if candidate.is_dir():
                return dataclasses.replace(model, name=str(candidate))
        raise InputError(f"revisions: no folder {revision!r}, neither below {name} nor as a path")
    return dataclasses.replace(model, revision=revision)


def _described(settings: SpectraSettings, model: ModelSettings) -> tuple[ModelDescription, tuple[Matrix, ...]]:
    description = describe_model(model)
    matrices = matrices_of(skeleton(description.config, description.family), description.family)
    return description, tuple(choose_matrices(matrices, settings.layer_types, settings.blocks))


def _prepare_task(settings: SpectraSettings, weights: Weights) -> ScoredTask | None:
    if not settings.tasks:
        return None
    name, task = next(iter(settings.tasks.items()))
    description = weights.description
    if description.family.kind == "seq2seq":
        raise InputError(f"tasks.{name}: the covariance of an encoder-decoder's activations is not supported; leave out"
                         " the task")
    tokenizer = load_tokenizer(weights.model, description)
    context = TaskContext.of(description, tokenizer)
    prepared = task.prepare(name, context)
    assert not isinstance(prepared, DirectTask)  # the settings accept only the kinds text and recall
    return prepared


def _spectrum_id(
    settings: SpectraSettings, of_run: Sequence[Weights], matrix: Matrix, task: ScoredTask | None
) -> str:
    """Return the id of a matrix. of_run: the sets of weights up to its own, whose changes it is compared with."""
    weights = of_run[-1]
    depends_on: dict[str, Any] = {
        "version": NUMBERS_VERSION,
        "identity": weights.description.identity,
        "dtype": weights.description.dtype,
        "init": weights.init,
        "checkpoint": weights.checkpoint,
        "seed": weights.seed,
        "matrix": matrix.name,
        "estimator": settings.estimator,
        "tracy_widom": settings.tracy_widom,
        "vectors": settings.vectors,
        "covariance": task and {"task": task.name, **task.protocol},
    }
    if weights.reference is not None:
        depends_on |= {
            "changes_version": CHANGES_VERSION,
            "reference": weights.reference.description.identity,
            "changes": dataclasses.asdict(settings.changes),
            "before": [[one.checkpoint, one.description.identity, one.description.dtype] for one in of_run[:-1]],
        }
    return digest(json.dumps(depends_on, sort_keys=True, default=str))
