"""Predicted floating-point operations of cells, from shapes alone: for the plan, and to balance shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from harness.config import Config, RuntimeConfig
from harness.evaluation.packing import Batch, PackedRequests
from harness.evaluation.requests import PreparedTask
from harness.evaluation.scoring import pack_for
from harness.execution.study import Ablation, Cell
from harness.models.cost import ModelCost, model_cost
from harness.models.families import skeleton
from harness.models.loading import ModelDescription
from harness.models.matrices import Matrix

# What a generated answer is taken to cost, in tokens fed: nobody knows before it has been generated.
TOKENS_PER_GENERATED_EXAMPLE = 512
# A float64 eigendecomposition runs at about an eighth of the speed of float32 products (experiments/speed).
DECOMPOSITION_WEIGHT = 8.0


def decomposition_flops(out: int, width: int) -> float:
    """Gram matrix and projection on the smaller side k, and about 9 k^3 for a symmetric eigendecomposition."""
    small, large = sorted((out, width))
    return 4.0 * small * small * large + 9.0 * small**3


def edit_flops(out: int, width: int, n_removed: int) -> float:
    """Two products with the vectors of the smaller part, and one with those removed to see what is left of them."""
    return 2.0 * out * width * (2 * min(n_removed, min(out, width) - n_removed) + n_removed)


@dataclass(frozen=True)
class StudyCosts:
    """passes: task -> cost of a scoring pass that resumes at block b, for b = 0..L. advance: task -> cost of running
    blocks 0..b-1 once. decompositions: matrix -> cost. All in floating-point operations. fed: task -> tokens fed in
    one pass, padding included."""

    passes: dict[str, tuple[float, ...]]
    advance: dict[str, tuple[float, ...]]
    decompositions: dict[str, float]
    reuse: bool
    fed: dict[str, int] = field(default_factory=dict)

    def cell(self, task: str, first_block: int) -> float:
        return self.passes[task][first_block if self.reuse else 0]


def _from_each_block(packed: PackedRequests, cost: ModelCost, n_encoder: int = 0) -> tuple[float, ...]:
    """n_encoder: how many of the blocks read the sources of an encoder-decoder."""
    padded = attention = sources = of_sources = 0.0
    for batch in packed.batches:
        n, width = batch.input_ids.shape
        padded += n * width
        # plain causal rows skip half of their pairs; trees and sequences read whole compute them all
        plain = isinstance(batch, Batch) and batch.last is None
        attention += n * width**2 * cost.pair / (2 if plain else 1)
        if n_encoder:
            source = batch.source_ids.shape[1]
            sources += n * source
            of_sources += n * source**2 * cost.pair
            attention += n * width * source * cost.pair
    encoder = [sources * block + of_sources for block in cost.block[:n_encoder]]
    rest = [padded * block + attention for block in cost.block[n_encoder:]]
    return _suffix_sums(encoder + rest, packed.n_rows * cost.head)


def _suffix_sums(values: list[float], last: float) -> tuple[float, ...]:
    sums = [last]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return tuple(reversed(sums))


def study_costs(
    config: Config, description: ModelDescription, matrices: Iterable[Matrix], tasks: Mapping[str, PreparedTask]
) -> StudyCosts:
    """Costs of the passes, frontier moves and decompositions of a study, without weights."""
    model = skeleton(description.config, description.family)
    cost, kind = model_cost(model), description.family.kind
    n_encoder = len({matrix.block for matrix in matrices if matrix.stack == "encoder"})
    passes, fed = {}, {}
    batch_tokens = config.runtime.batch_tokens or RuntimeConfig.batch_tokens
    for name, task in tasks.items():
        if task.generate is None:
            packed = pack_for(
                task.requests, batch_tokens, kind, model, config.runtime.share_context
            )
            passes[name] = _from_each_block(packed, cost, n_encoder)
            fed[name] = sum(batch.input_ids.numel() for batch in packed.batches)
        else:
            tokens = len(task.example_ids) * TOKENS_PER_GENERATED_EXAMPLE
            whole = tokens * (sum(cost.block) + cost.head)  # generating runs every block, whatever was edited
            passes[name] = (whole,) * (1 + len(cost.block))
    advance = {name: tuple(of_task[0] - value for value in of_task) for name, of_task in passes.items()}
    decompositions = {m.name: decomposition_flops(*m.shape) for m in matrices}
    return StudyCosts(passes, advance, decompositions, config.runtime.reuse, fed)


@dataclass(frozen=True)
class Load:
    """What some cells ask for: passes (their cost), and what a shard may share with other cells of its own."""

    passes: float
    tasks: frozenset[str]
    matrices: frozenset[str]
    first_block: int


def load_of(groups: Iterable[tuple[Ablation, list[Cell]]], costs: StudyCosts) -> Load:
    """The load of ablations with their cells."""
    passes, tasks, matrices, first = 0.0, set(), set(), 0
    for ablation, cells in groups:
        passes += sum(costs.cell(cell.task, ablation.target.first_block) for cell in cells)
        tasks.update(cell.task for cell in cells)
        matrices.update(ablation.target.matrices)
        first = max(first, ablation.target.first_block)
    return Load(passes, frozenset(tasks), frozenset(matrices), first)


@dataclass
class ShardCost:
    """The cost of a shard as loads are added to it, in the order in which they run."""

    costs: StudyCosts
    total: float = 0.0
    tasks: frozenset[str] = frozenset()
    matrices: set[str] = field(default_factory=set)
    frontier: int = 0

    def of(self, load: Load) -> float:
        """What adding a load would cost: its passes, and the baselines, frontier moves and decompositions that the
        shard does not have yet."""
        new, advance = load.tasks - self.tasks, self.costs.advance
        cost = load.passes + sum(self.costs.passes[task][0] for task in new)
        if self.costs.reuse:
            ahead = max(self.frontier, load.first_block)
            cost += sum(advance[task][ahead] - advance[task][self.frontier] for task in self.tasks)
            cost += sum(advance[task][ahead] for task in new)
        missing = load.matrices - self.matrices
        return cost + DECOMPOSITION_WEIGHT * sum(self.costs.decompositions[name] for name in missing)

    def add(self, load: Load) -> None:
        self.total += self.of(load)
        self.tasks |= load.tasks
        self.matrices |= load.matrices
        self.frontier = max(self.frontier, load.first_block)
