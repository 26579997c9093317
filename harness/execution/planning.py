"""What a study will cost: counts, floating-point operations, and the share that reuse saves. No weights are loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from harness.evaluation.packing import PackedRequests, pack
from harness.execution.runner import PlannedStudy, group_by_ablation
from harness.models.families import blocks_of, skeleton


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds x 2 per token: of each block (its weights, and attention per token of context), and of the head."""

    block: tuple[float, ...]
    attention_per_token: float
    head: float


@dataclass(frozen=True)
class StudyCost:
    """Floating-point operations of a study. resumed: with the frontier. plain: every block again for every cell.
    decompositions: Gram matrix and eigendecomposition of every matrix touched, once."""

    resumed: float
    plain: float
    decompositions: float
    n_matrices: int


def model_cost(planned: PlannedStudy) -> ModelCost:
    """From the shapes alone. Of a mixture of experts only the experts that a token uses are counted."""
    config = planned.description.config
    model = skeleton(config)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    active = getattr(config, "num_experts_per_tok", None) or 1
    per_block = [
        2.0 * sum(
            prod(p.shape) * (active / experts if p.ndim == 3 else 1) for p in block.parameters() if p.ndim >= 2
        )
        for block in blocks_of(model)
    ]
    head = model.get_output_embeddings()
    return ModelCost(tuple(per_block), 4.0 * config.hidden_size, 2.0 * prod(head.weight.shape))


def pass_flops(packed: PackedRequests, cost: ModelCost, first_block: int) -> float:
    """One scoring pass of one task that resumes at `first_block`."""
    total = packed.n_rows * cost.head
    for batch in packed.batches:
        n, width = batch.input_ids.shape
        attention = cost.attention_per_token * width / 2
        total += n * width * sum(block + attention for block in cost.block[first_block:])
    return total


def study_cost(planned: PlannedStudy, cells=None) -> StudyCost:
    """The cost of some cells of a study (all of them by default)."""
    config, cost = planned.study.config, model_cost(planned)
    causal = planned.description.family.kind == "causal"
    packed = {
        name: pack(task.requests, config.runtime.batch_tokens, causal)
        for name, task in planned.tasks.items() if task.generate is None
    }
    resumed = plain = 0.0
    frontier = 0
    touched = set()
    for ablation, members in group_by_ablation(list(planned.study.cells if cells is None else cells)):
        first = ablation.target.first_block if config.runtime.reuse else 0
        touched.update(ablation.target.matrices)
        for name, requests in packed.items():
            if first > frontier:
                resumed += pass_flops(requests, cost, frontier) - pass_flops(requests, cost, first)
        frontier = max(frontier, first)
        for cell in members:
            if cell.task in packed:
                resumed += pass_flops(packed[cell.task], cost, first)
                plain += pass_flops(packed[cell.task], cost, 0)
    shapes = {matrix.name: matrix.shape for matrix in planned.matrices}
    decompositions = sum(_decomposition_flops(*shapes[name]) for name in touched)
    return StudyCost(resumed, plain, decompositions, len(touched))


def _decomposition_flops(out: int, width: int) -> float:
    """Gram matrix and projection on the smaller side k, and about 9 k^3 for a symmetric eigendecomposition."""
    small, large = sorted((out, width))
    return 4.0 * small * small * large + 9.0 * small**3


def describe_plan(planned: PlannedStudy) -> str:
    """Text for the terminal: what will be measured, in which order, at what cost."""
    study, description = planned.study, planned.description
    cost = study_cost(planned)
    targets = dict.fromkeys(cell.ablation.target.label for cell in study.cells if not cell.is_baseline)
    regions = dict.fromkeys(cell.ablation.region.label for cell in study.cells if not cell.is_baseline)
    lines = [
        f"study {study.study_id}  folder {planned.folder}",
        f"model {study.config.model.name} ({description.config.model_type}, {description.dtype},"
        f" {1 + max(m.block for m in planned.matrices)} blocks, {len(planned.matrices)} matrices)",
        f"targets {len(targets)}: {_some(targets)}",
        f"regions {len(regions)}: {_some(regions)}",
    ]
    for name, task in planned.tasks.items():
        if task.generate is not None:
            lines.append(f"task {name}: {len(task.example_ids)} examples, generated")
            continue
        tokens = sum(len(request.tokens) for request in task.requests)
        lines.append(f"task {name}: {len(task.example_ids)} examples, {len(task.requests)} requests, {tokens} tokens")
    of_task = Counter(cell.task for cell in study.cells)
    lines.append(f"cells {len(study.cells)}: " + ", ".join(f"{name} {count}" for name, count in of_task.items()))
    saved = 1 - cost.resumed / cost.plain if cost.plain else 0.0
    lines.append(
        f"cost {cost.resumed:.3g} floating-point operations of scoring ({saved:.0%} saved by resuming at the edited"
        f" block), {cost.decompositions:.3g} for {cost.n_matrices} decompositions"
    )
    order = [f"baseline, then by first edited block: {_some(targets, 4)}"]
    return "\n".join([*lines, "order " + order[0]])


def _some(names, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", ... {names[-1]}" if len(names) > most else "")
