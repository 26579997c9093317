"""Predict the floating-point operations of cells from shapes alone, for the plan and to balance shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from harness.evaluation.last_block import computed_positions, own_position_matrices
from harness.evaluation.other_order import other_options
from harness.evaluation.packing import Batch, PackedRequests
from harness.evaluation.requests import DirectTask
from harness.evaluation.scoring import pack_for
from harness.evaluation.settings import ScoringOptions
from harness.measurements.ablation.cells import Cell, has_noise_floor
from harness.measurements.ablation.preparation import Prepared
from harness.measurements.ablation.region_settings import OTHER_ORDER
from harness.measurements.ablation.settings import StudySettings
from harness.models.cost import ModelCost, model_cost, routed_share
from harness.models.editing import Ablation
from harness.models.families import MLP_TYPES, skeleton
from harness.models.matrices import Matrix
from harness.spectral.activations import metric_flops
from harness.spectral.decomposition import decomposition_flops
from harness.spectral.regions import Component, by_loss

# The assumed cost of a generated answer in tokens, because its length is not known before it is generated.
TOKENS_PER_GENERATED_EXAMPLE = 512
# How many times as long an operation of a float64 decomposition takes as one of a product. These are constants, because
# every worker of a run must divide it into the same shards. What rates.py measures of a device may differ from machine
# to machine; `harness plan` prints it beside the constant. In float32, on one thread of an AMD EPYC, it was 4 to 6 for
# ranks from 288 on and 14 to 31 for rank 64.
DECOMPOSITION_WEIGHT = 8.0
# In low precision, which means a GPU: 788 TFLOP/s in bfloat16 against about 3 in decompositions, on paper, of an H200;
# the stages "rates" and "decompositions" of experiments/speed/gpu.py measure it.
DECOMPOSITION_WEIGHT_IN_LOW_PRECISION = 250.0


def edit_flops(out: int, width: int, n_removed: int) -> float:
    """Return the floating-point operations of an edit of a matrix [out, width].

    They are two products with the vectors of the removed or the kept part, whichever is smaller, and one product with
    the removed vectors for the realised removal.
    """
    return 2.0 * out * width * (2 * min(n_removed, min(out, width) - n_removed) + n_removed)


def is_one_component(ablation: Ablation) -> bool:
    """Return whether an ablation edits one matrix of its target, which a loss will choose."""
    return isinstance(ablation.region, Component) and ablation.region.by_loss and not ablation.treatment.keep


@dataclass(frozen=True)
class CostTable:
    """The predicted costs of the parts of a study, in floating-point operations.

    passes: task -> the cost of a scoring pass that resumes at block b, for b = 0..L.
    advance: task -> the cost of running blocks 0..b-1 once, for b = 0..L.
    decompositions: matrix -> the cost of its decomposition.
    reuse: whether cells resume at the frontier.
    fed: task -> the number of tokens in one pass, padding included.
    other: task -> the cost of a pass in other batches, which a study in low precision makes for its noise floor.
    calibration: the cost of the pass over the calibration text with its second moments, which every shard makes unless
        it finds them on disk. calibration_bytes: the size of these second moments.
    blocks: matrix -> its block.
    before: matrix -> the parts of its block that are computed before it: the matrices, and the attention of the block.
    parts: task -> the cost of these parts in a pass.
    decomposition_weight: how many times as long an operation of a decomposition takes as one of a pass.
    """

    passes: dict[str, tuple[float, ...]]
    advance: dict[str, tuple[float, ...]]
    decompositions: dict[str, float]
    reuse: bool
    fed: dict[str, int] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)
    calibration: float = 0.0
    calibration_bytes: int = 0
    decomposition_weight: float = DECOMPOSITION_WEIGHT
    blocks: dict[str, int] = field(default_factory=dict)
    before: dict[str, frozenset[str]] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)

    def cell(self, cell: Cell) -> float:
        """Return the cost of scoring one cell; for a component that a loss will choose, the mean over its target."""
        if cell.in_other_order and cell.task in self.other:
            return self.other[cell.task]
        if self.reuse and is_one_component(cell.ablation):
            of_block = self.passes[cell.task]
            names = cell.ablation.target.matrices
            return sum(of_block[self.blocks[name]] for name in names) / len(names)
        return self.passes[cell.task][cell.ablation.target.first_block if self.reuse else 0]


def parts_before(matrices: Sequence[Matrix]) -> dict[str, frozenset[str]]:
    """Return for each matrix the parts of its block that are computed before it and cannot depend on it.

    They are earlier matrices of other parameters, and for a matrix behind the attention also the attention itself. In
    models whose blocks are in another order a plan is a little too high.
    """
    found: dict[str, frozenset[str]] = {}
    of_block: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        if matrix.expert is None:
            earlier = [one for one in of_block.get(matrix.block, []) if one.parameter != matrix.parameter]
            behind = [attention_of(matrix.block)] if matrix.layer_type in MLP_TYPES else []
            found[matrix.name] = frozenset([*(one.name for one in earlier), *behind])
            of_block.setdefault(matrix.block, []).append(matrix)
    return found


def attention_of(block: int) -> str:
    """Return the name of the attention of a block among the parts that are computed before a matrix."""
    return f"{block} attention"


def _parts(
    packed: PackedRequests, cost: ModelCost, matrices: Sequence[Matrix], at_scored: Sequence[Matrix]
) -> dict[str, float]:
    """Return the cost of each matrix, and of the attention of each block, in one pass. at_scored: as below."""
    tokens, pairs = 0.0, 0.0
    for batch in packed.batches:
        n, width = batch.input_ids.shape
        tokens += n * width
        plain = isinstance(batch, Batch) and batch.last is None
        pairs += n * width**2 * cost.pair / (2 if plain else 1)
    left_out = dict.fromkeys((matrix.name for matrix in at_scored), _left_out(packed))
    return ({matrix.name: 2.0 * prod(matrix.shape) * (tokens - left_out.get(matrix.name, 0)) for matrix in matrices}
            | {attention_of(matrix.block): pairs for matrix in matrices})


def _left_out(packed: PackedRequests) -> int:
    """Return at how many positions of all batches the matrices of the last block are not applied that may be spared."""
    sizes = [(batch.input_ids.numel(), len(batch.rows)) for batch in packed.batches]
    return sum(positions - computed_positions(scored, positions) for positions, scored in sizes)


def _from_each_block(
    packed: PackedRequests, cost: ModelCost, n_encoder: int = 0, at_scored: Sequence[Matrix] = ()
) -> tuple[float, ...]:
    """Return the cost of a pass that resumes at block b, for b = 0..L.

    n_encoder: the number of blocks of an encoder. at_scored: the matrices of the last block that are applied at scored
    positions only.
    """
    padded = attention = sources = of_sources = 0.0
    for batch in packed.batches:
        n, width = batch.input_ids.shape
        padded += n * width
        # A plain causal batch computes half of the pairs of tokens. Trees and whole sequences compute all pairs.
        plain = isinstance(batch, Batch) and batch.last is None
        attention += n * width**2 * cost.pair / (2 if plain else 1)
        if n_encoder:
            source = batch.source_ids.shape[1]
            sources += n * source
            of_sources += n * source**2 * cost.pair
            attention += n * width * source * cost.pair
    encoder = [sources * block + of_sources for block in cost.block[:n_encoder]]
    rest = [padded * block + attention for block in cost.block[n_encoder:]]
    if at_scored:
        rest[-1] -= _left_out(packed) * sum(2.0 * prod(matrix.shape) for matrix in at_scored)
    return _suffix_sums(encoder + rest, packed.n_rows * cost.head)


def cost_of_pass(prepared: Prepared, packed: PackedRequests) -> float:
    """Return the floating-point operations of a pass of a prepared model over packed requests, without any reuse."""
    family = prepared.description.family
    model = skeleton(prepared.description.config, family)
    return _from_each_block(packed, model_cost(model, family), _n_encoder(prepared))[0]


def _n_encoder(prepared: Prepared) -> int:
    """Return the number of blocks of the model's encoder."""
    return len({matrix.block for matrix in prepared.matrices if matrix.stack == "encoder"})


def _suffix_sums(values: list[float], last: float) -> tuple[float, ...]:
    sums = [last]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return tuple(reversed(sums))


def costs_of(settings: StudySettings, prepared: Prepared, cells: Sequence[Cell]) -> CostTable:
    """Return the predicted costs of the passes, moves of the frontier and decompositions of some cells of a study."""
    description, runtime = prepared.description, settings.runtime
    family = description.family
    model = skeleton(description.config, family)
    cost = model_cost(model, family)
    n_encoder = _n_encoder(prepared)
    low = description.dtype != "float32"
    # Low precision means a GPU here, as for DECOMPOSITION_WEIGHT: there every position is computed.
    spares = family.kind == "causal" and runtime.reuse and not runtime.compile and not low
    at_scored = own_position_matrices(prepared.matrices) if spares else []
    passes, fed, other, parts = {}, {}, {}, {}
    options = ScoringOptions(runtime.batch_tokens or ScoringOptions.batch_tokens, share_context=runtime.share_context)
    for name, task in prepared.tasks.items():
        if isinstance(task, DirectTask):
            tokens = max(len(task.example_ids) * TOKENS_PER_GENERATED_EXAMPLE, sum(map(len, task.inputs)))
            whole = tokens * (sum(cost.block) + cost.head)  # generation runs every block, whichever was edited
            passes[name] = (whole,) * (1 + len(cost.block))
        else:
            packed = pack_for(task.requests, options.batch_tokens, family, model, options.share_context)
            passes[name] = _from_each_block(packed, cost, n_encoder, at_scored)
            parts[name] = _parts(packed, cost, prepared.matrices, at_scored)
            if has_noise_floor(description):
                others = other_options(options, packed.batches, OTHER_ORDER.share)
                again = pack_for(task.requests, others.batch_tokens, family, model, others.share_context)
                other[name] = _from_each_block(again, cost, n_encoder)[0]
            fed[name] = sum(batch.input_ids.numel() for batch in packed.batches)
    advance = {name: tuple(of_task[0] - value for value in of_task) for name, of_task in passes.items()}
    in_metric = settings.region.treatment.metric == "activations"
    flops = metric_flops if in_metric else decomposition_flops
    decompositions = {m.name: flops(*m.shape) for m in prepared.matrices}
    calibration, size = _calibration(prepared, cells, cost)
    weight = DECOMPOSITION_WEIGHT_IN_LOW_PRECISION if low else DECOMPOSITION_WEIGHT
    return CostTable(passes, advance, decompositions, runtime.reuse, fed, other, calibration, size, weight,
                     {matrix.name: matrix.block for matrix in prepared.matrices},
                     {} if n_encoder or runtime.compile else parts_before(prepared.matrices), parts)


def _calibration(prepared: Prepared, cells: Sequence[Cell], cost: ModelCost) -> tuple[float, int]:
    """Return the cost of the pass over the calibration text in floating-point operations, and the bytes on disk.

    Matrices of one block with equally many inputs are taken to have the same input, apart from experts.
    """
    text = prepared.calibration
    names = {name for cell in cells for name in cell.ablation.target.matrices}
    edited = [matrix for matrix in prepared.matrices if matrix.name in names]
    if text is None or not edited:
        return 0.0, 0
    inputs = {(m.block, m.expert, m.shape[1], m.layer_type in ("o_proj", "down_proj")) for m in edited}
    last = max(matrix.block for matrix in edited)
    one_pass = sum(len(one.tokens) * sum(cost.block[: last + 1]) + len(one.tokens) ** 2 / 2 * cost.pair * (last + 1)
                   for one in text.requests)
    if text.task is not None:  # the inputs are not measured; the metrics need a pass of their own
        return 4.0 * sum(len(one.tokens) * (sum(cost.block) + cost.head) for one in text.requests), 0
    if any(by_loss(cell.ablation.region) for cell in cells):  # a forward and a backward pass for the loss
        one_pass += 3.0 * sum(len(one.tokens) * (sum(cost.block) + cost.head) for one in text.requests)
    routed = routed_share(prepared.description.config)
    moments = sum(2.0 * text.n_tokens * (1.0 if expert is None else routed) * width**2
                  for _, expert, width, _ in inputs)
    return one_pass + moments, sum(8 * width**2 for _, _, width, _ in inputs)


@dataclass(frozen=True)
class CellLoad:
    """What some cells need: the cost of their passes, and the parts that they may share with other cells of a shard."""

    passes: float
    tasks: frozenset[str]
    matrices: frozenset[str]
    first_block: int


@dataclass
class ShardOfCells:
    """The cost of a shard of cells while loads are added to it in the order in which they run.

    The cells of a shard share the baseline of each task, the moves of the frontier, and the decompositions.
    """

    costs: CostTable
    total: float = 0.0
    tasks: frozenset[str] = frozenset()
    matrices: set[str] = field(default_factory=set)
    frontier: int = 0

    def __post_init__(self) -> None:
        self.total += self.costs.calibration

    def load(self, units: Sequence[Cell]) -> CellLoad:
        """Return what these cells need. The passes of baselines are left out, because every shard makes them anyway."""
        edited = [cell for cell in units if not cell.is_baseline]
        return CellLoad(
            sum(self.costs.cell(cell) for cell in edited),
            frozenset(cell.task for cell in units),
            frozenset(name for cell in edited for name in cell.ablation.target.matrices),
            max((cell.ablation.target.first_block for cell in edited), default=0),
        )

    def of(self, load: CellLoad) -> float:
        """Return the cost of adding a load.

        It is that of the passes, and of the baselines, moves of the frontier and decompositions that the shard does not
        have yet.
        """
        new, advance = load.tasks - self.tasks, self.costs.advance
        cost = load.passes + sum(self.costs.passes[task][0] for task in new)
        if self.costs.reuse:
            ahead = max(self.frontier, load.first_block)
            cost += sum(advance[task][ahead] - advance[task][self.frontier] for task in self.tasks)
            cost += sum(advance[task][ahead] for task in new)
        missing = load.matrices - self.matrices
        return cost + self.costs.decomposition_weight * sum(self.costs.decompositions[name] for name in missing)

    def add(self, load: CellLoad) -> None:
        """Add a load to the shard."""
        self.total += self.of(load)
        self.tasks |= load.tasks
        self.matrices |= load.matrices
        self.frontier = max(self.frontier, load.first_block)
