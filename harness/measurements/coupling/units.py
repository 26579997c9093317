"""The units of coupling, which are prompts, for each set of weights and each ablation of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness.engine.plan import Plan, canonical, digest, folder_of, run_id
from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ScoredTask, TaskContext
from harness.measurements.ablation.cells import region_key
from harness.measurements.coupling.settings import CouplingSettings
from harness.measurements.spectra.units import checkpoint_settings
from harness.models.decompositions import experts_key
from harness.models.description import ModelDescription
from harness.models.editing import Ablation
from harness.models.families import blocks_of, matrices_of, skeleton
from harness.models.loading import describe_model, load_tokenizer, pick_device, train_embedded
from harness.models.prefix import takes_cache
from harness.models.reference import describe_reference
from harness.models.settings import ModelSettings
from harness.spectral.regions import select
from harness.tasks.registry import check_kinds, prepare_tasks

NUMBERS_VERSION = 1  # must be raised when a change of the code changes numbers in the tables
NO_ABLATION = ("none", "other_order")  # kinds of regions that remove nothing


@dataclass(frozen=True)
class Weights:
    """One set of weights: the model, a checkpoint of its training, or new weights; unedited, or with one ablation.

    init: "trained", "random", or "reference" for the reference.
    checkpoint, index: the name of the checkpoint in the revisions, and its position there.
    seed: that of new weights; None for trained ones. ablation: None for unedited weights.
    """

    model: ModelSettings
    description: ModelDescription
    init: str
    checkpoint: str | None = None
    index: int | None = None
    seed: int | None = None
    ablation: Ablation | None = None

    @property
    def label(self) -> str:
        """The name of the checkpoint, "trained" or "random", and the ablation."""
        name = self.init if self.init != "trained" else self.checkpoint or "trained"
        return name if self.ablation is None else f"{name}, {self.ablation.target.label}: {self.ablation.label}"

    def same_model(self, other: Weights) -> bool:
        """Return whether the other set differs in its ablation alone."""
        return dataclasses.replace(self, ablation=None) == dataclasses.replace(other, ablation=None)


@dataclass(frozen=True)
class Prompt:
    """One sequence. name: the number of its request in the task. tokens: its ids. positions: of the tokens whose
    Jacobians are taken, in ascending order."""

    name: str
    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """One prompt with one set of weights. weights_index: the position of the weights in the plan. part: their label."""

    id: str
    weights_index: int
    prompt: Prompt
    part: str


@dataclass(frozen=True)
class Way:
    """How Jacobians are computed. method: "dense" or "krylov". path: "one_token" or "whole"."""

    method: str
    path: str


@dataclass(frozen=True, kw_only=True)
class CouplingPlan(Plan):
    """The plan of coupling. weights: all sets of weights. way: how Jacobians from a token to itself are computed.
    n_blocks, width: of the model. task: that of the prompts."""

    settings: CouplingSettings
    units: tuple[Unit, ...]
    weights: tuple[Weights, ...]
    way: Way
    n_blocks: int
    width: int
    task: ScoredTask

    def before_jobs(self) -> None:
        """Train the embedded model once, so that not every job trains it."""
        train_embedded(weights.model for weights in self.weights if weights.init == "trained")


def plan(settings: CouplingSettings) -> CouplingPlan:
    """Return the prompts and weights that the settings mean. No weights are loaded.

    Raises InputError if the model, a checkpoint or the data of the task cannot be found, or do not fit each other.
    """
    models = list(_models(settings))
    first = models[0]
    bare = skeleton(first.description.config, first.description.family)
    if first.description.family.kind != "causal":
        raise InputError(f"model.name: {settings.model.name!r} is no causal language model; coupling needs one")
    weights = tuple(_with_ablations(settings, models, matrices_of(bare, first.description.family)))
    n_blocks = len(blocks_of(bare, first.description.family))
    width = first.description.config.get_text_config().hidden_size
    if max(settings.k) > width:
        raise InputError(f"k: {max(settings.k)} is wrong; a Jacobian of this model has {width} singular values")
    way = way_of(settings, n_blocks, width, takes_cache(bare))
    task = _prepare_task(settings, first)
    prompts = prompts_of(settings, task)
    units = tuple(
        Unit(_unit_id(settings, one, prompt, way), index, prompt, one.label)
        for index, one in enumerate(weights) for prompt in prompts
    )
    folder = folder_of(settings.output, f"coupling-{settings.model.stem}-{run_id(unit.id for unit in units)[:8]}")
    return CouplingPlan(folder=folder, settings=settings, units=units, weights=weights, way=way, n_blocks=n_blocks,
                        width=width, task=task)


def restore(folder: Path, manifest: Mapping[str, Any], settings: CouplingSettings) -> CouplingPlan:
    """Return the plan that was frozen in a folder. Raises InputError if weights or data have changed since."""
    pick_device(settings.model.device)
    return plan(settings).restored(folder, manifest)


def describe(plan: CouplingPlan) -> str:
    """Return the text of `harness plan`."""
    settings, n = plan.settings, plan.n_blocks
    lines = [f"coupling {plan.id}  folder {plan.folder}"]
    for index, weights in enumerate(plan.weights):
        prompts = [unit.prompt for unit in plan.units if unit.weights_index == index]
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        lines.append(f"weights {weights.label}: {len(prompts)} prompts with {tokens} tokens of task {plan.task.name}")
    positions = len(plan.units[0].prompt.positions)
    stored = n * plan.width**2 if plan.way.method == "dense" else 2 * n * plan.width * max(settings.k)
    lines.append(f"jacobians {plan.way.method} by the {plan.way.path.replace('_', '-')} path: {n} blocks of"
                 f" {plan.width} dimensions, {positions} of {'each prompt' if positions > 1 else 'one token of each'};"
                 f" {positions * stored * 8 / 2**20:.3g} MiB for one prompt")
    return "\n".join(lines)


def way_of(settings: CouplingSettings, n_blocks: int, width: int, cached: bool) -> Way:
    """Return how Jacobians are computed.

    A matrix-free Jacobian takes about 10 products for each of its K triples, and the pairs take another L K products
    for each order; a dense one takes d products. auto: dense where d <= (L orders + 10) K.
    """
    method, path = settings.jacobian, "one_token" if cached else "whole"
    if method == "whole":
        return Way("dense", "whole")
    if method == "auto":
        method = "dense" if width <= (n_blocks * len(settings.orders) + 10) * max(settings.k) else "krylov"
        if {"context_in", "context_out"} & set(settings.kinds):
            method = "dense"
    return Way(method, path)


def prompts_of(settings: CouplingSettings, task: ScoredTask) -> list[Prompt]:
    """Return the prompts: requests that are evenly spread over the task, each sequence once.

    Raises InputError if a prompt is too short for a position.
    """
    distinct: dict[tuple[int, ...], int] = {}
    for number, request in enumerate(task.requests):
        distinct.setdefault(tuple(np.asarray(request.tokens).tolist()), number)
    sequences = list(distinct.items())
    n = min(settings.prompts, len(sequences))
    prompts = []
    for i in range(n):
        tokens, number = sequences[i * len(sequences) // n]
        prompts.append(Prompt(str(number), tokens, _positions(settings.tokens, len(tokens), number)))
    return prompts


def _positions(wanted: Sequence[int] | str, n: int, number: int) -> tuple[int, ...]:
    positions = [-1] if isinstance(wanted, str) else wanted
    for position in positions:
        if not -n <= position < n:
            raise InputError(f"tokens: {position} is no position in prompt {number}, which has {n} tokens; choose"
                             " others or longer prompts")
    return tuple(sorted({position % n for position in positions}))


def _models(settings: CouplingSettings) -> Iterator[Weights]:
    trained = []
    for index, revision in enumerate(settings.revisions):
        model = checkpoint_settings(settings.model, revision)
        trained.append(Weights(model, describe_model(model), "trained", revision, index))
    if not settings.revisions:
        trained.append(Weights(settings.model, describe_model(settings.model), "trained"))
    if settings.init != "random":
        yield from trained
    reference = describe_reference(settings.reference, settings.model, trained[0].description)
    if reference is not None:
        yield Weights(reference.settings, reference.description, "reference")
    if settings.init != "trained":
        seed = settings.model.recall.seed if settings.model.embedded else settings.seed
        yield Weights(trained[0].model, trained[0].description, "random", seed=seed)


def _with_ablations(
    settings: CouplingSettings, models: Sequence[Weights], matrices: Sequence[Any]
) -> Iterator[Weights]:
    ablations = []
    if settings.region is not None:
        treatment = settings.region.treatment.treatment(None)
        shapes = {matrix.name: matrix.shape for matrix in matrices}
        regions = [region for region in settings.region.regions(shapes.values()) if region.kind not in NO_ABLATION]
        for target in settings.region.targets(settings.target, matrices):
            for region in regions:
                for name in target.matrices:
                    if region.rank_only and not len(select(region, None, shapes[name])):
                        raise InputError(f"region: {region.label} is empty for matrix {name}; use a larger region")
                ablations.append(Ablation(target, region, treatment))
    for one in models:
        yield one
        if one.init == "trained":
            yield from (dataclasses.replace(one, ablation=ablation) for ablation in ablations)


def _prepare_task(settings: CouplingSettings, weights: Weights) -> ScoredTask:
    description = weights.description
    check_kinds(settings.tasks, description.config, description.family.kind)
    tokenizer = load_tokenizer(weights.model, description)
    context = TaskContext.of(description, tokenizer)
    ((name, prepared),) = prepare_tasks(settings.tasks, context).items()
    if isinstance(prepared, DirectTask):
        raise InputError(f"tasks.{name}: it measures the model itself and has no prompts; use a task such as wikitext")
    return prepared


def _unit_id(settings: CouplingSettings, weights: Weights, prompt: Prompt, way: Way) -> str:
    ablation = weights.ablation
    depends_on: dict[str, Any] = {
        "measurement": "coupling",
        "version": NUMBERS_VERSION,
        "identity": weights.description.identity,
        "dtype": weights.description.dtype,
        "attn_implementation": settings.model.attn_implementation,
        "init": weights.init,
        "checkpoint": weights.checkpoint,
        "seed": weights.seed,
        "ablation": ablation and [sorted(ablation.target.matrices), region_key(ablation.region, ablation.treatment)],
        "tokens": prompt.tokens,
        "positions": prompt.positions,
        "kinds": sorted(settings.kinds),
        "k": sorted(settings.k),
        "orders": sorted(settings.orders),
        "way": dataclasses.asdict(way),
        "normality": settings.normality,
        "krylov_seed": settings.seed if way.method == "krylov" else None,
        **(experts_key(weights.description.config) if ablation else {}),
    }
    return digest(canonical(depends_on))
