"""The forecast of a study's cost: counts, floating-point operations, memory and time. No weights are loaded."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from harness.evaluation.requests import DirectTask, Request, ScoredTask, scored_tasks
from harness.evaluation.scoring import Scorer
from harness.measurements.ablation.cells import Cell, group_by_ablation
from harness.measurements.ablation.costs import CostTable, cost_of_pass, edit_flops, is_one_component
from harness.measurements.ablation.rates import Rates, rates_for
from harness.measurements.ablation.study import Study
from harness.measurements.ablation.summary import bos_note
from harness.models.editing import Ablation
from harness.models.loading import TORCH_DTYPES, LoadedModel, pick_device
from harness.spectral.regions import select
from harness.tables.labels import region_words
from harness.tables.text import count


@dataclass(frozen=True)
class Forecast:
    """Floating-point operations and memory of a study.

    resumed: scoring from the frontier on, the moves of the frontier included. plain: scoring in which every cell runs
        every block. calibration: the pass over the calibration text and the second moments of its activations.
    decompositions: those of all edited matrices, each once. edits: those of all ablations.
    n_matrices: how many matrices are edited. stream_bytes: memory of the stream of all tasks at one boundary.
    vector_bytes: memory of the singular vectors of all edited matrices.
    """

    resumed: float
    plain: float
    decompositions: float
    edits: float
    n_matrices: int
    stream_bytes: int
    vector_bytes: int
    calibration: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the least time, as if all scoring consisted of large matrix products."""
        products = (self.resumed + self.calibration) / rates.product
        return products + self.decompositions / rates.decomposition + self.edits / rates.edit


def forecast(study: Study, cells: Sequence[Cell] | None = None) -> Forecast:
    """Return the cost of some cells of a study, by default of all."""
    costs, reuse = study.costs, study.settings.runtime.reuse
    shapes = {matrix.name: matrix.shape for matrix in study.matrices}
    scored = set(costs.fed)
    resumed = plain = edits = 0.0
    touched: set[str] = set()
    frontier = 0
    inside: dict[str, frozenset[str]] = {}  # task -> the parts of the present block whose outputs are kept
    block = -1
    for ablation, members in group_by_ablation(study.units if cells is None else cells):
        first = ablation.target.first_block if reuse else 0
        touched.update(ablation.target.matrices)
        edits += _edit_flops(ablation, [shapes[name] for name in ablation.target.matrices])
        if first > frontier:
            resumed += sum(costs.advance[name][first] - costs.advance[name][frontier] for name in scored)
            frontier = first
        if first != block:
            inside, block = {}, first
        before = _before(costs, ablation) if reuse else frozenset()
        for cell in members:
            if cell.task in scored:
                kept = before & inside.get(cell.task, frozenset())
                resumed += costs.cell(cell) - sum(costs.parts[cell.task][part] for part in kept)
                inside[cell.task] = before or inside.get(cell.task, frozenset())
                plain += costs.cell(cell) if cell.in_other_order else costs.passes[cell.task][0]
    width = study.description.config.get_text_config().hidden_size
    itemsize = TORCH_DTYPES[study.description.dtype].itemsize
    return Forecast(
        resumed, plain, sum(costs.decompositions[name] for name in touched), edits, len(touched),
        sum(costs.fed.values()) * width * itemsize, sum(8 * min(shapes[name]) ** 2 for name in touched),
        costs.calibration if touched else 0.0,
    )


def _before(costs: CostTable, ablation: Ablation) -> frozenset[str]:
    """Return the parts of the first edited block that are computed before the edited matrices."""
    target = ablation.target
    if is_one_component(ablation):
        return frozenset()
    edited = [name for name in target.matrices if costs.blocks[name] == target.first_block]
    return min((costs.before.get(name, frozenset()) for name in edited), key=len, default=frozenset())


def _edit_flops(ablation: Ablation, shapes: Sequence[tuple[int, int]]) -> float:
    """Return the floating-point operations of the edits of one ablation. shapes: (out, in) of its matrices.

    A component that a loss chooses is in one of the matrices.
    """
    if is_one_component(ablation):
        return sum(edit_flops(*shape, 1) for shape in shapes) / len(shapes)
    return sum(edit_flops(*shape, _n_removed(ablation, shape)) for shape in shapes)


def _n_removed(ablation: Ablation, shape: tuple[int, int]) -> int:
    """Return how many values an ablation removes. If that depends on singular values, half of the rank is assumed."""
    if not ablation.region.rank_only:
        return min(shape) // 2
    picked = len(select(ablation.region, None, shape))
    return min(shape) - picked if ablation.treatment.keep else picked


def announce(study: Study, cells: Sequence[Cell], loaded: LoadedModel) -> str:
    """Return how many cells will be measured and how long that takes, from one batch of real requests scored now.

    The shorter time has the fastest of three passes over the batch; the longer time has the slowest, and half as much
    again for what is not computed in passes. Empty for the embedded model, whose cells take no time.
    """
    if study.settings.model.embedded:
        return ""
    n = sum(cell.is_baseline for cell in cells)
    counted = f"{count(len(cells), 'cell')} to measure: {count(len(cells) - n, 'ablation')} and {count(n, 'baseline')}"
    wanted = {cell.task for cell in cells}
    scored = {name: task for name, task in scored_tasks(study.tasks).items() if name in wanted}
    if not scored:
        return f"{counted}; the time is not known, because the model writes its answers"
    passes = [_seconds_per_operation(study, task, loaded) for task in scored.values()]
    cost, rates = forecast(study, cells), rates_for(loaded.device, study.description.dtype, study.matrices)
    fast, slow = (
        Rates(1 / seconds, rates.decomposition, rates.edit)
        for seconds in (min(low for low, _ in passes), max(high for _, high in passes))
    )
    longest = 1.5 * cost.seconds(slow)
    between = f"between {duration(cost.seconds(fast))} and {duration(longest)}" if longest >= 1 else "less than 1 s"
    most = " at most (adaptive precision)" if study.settings.runtime.precision == "adaptive" else ""
    written = "" if wanted == scored.keys() else ", and longer for tasks in which the model writes its answers"
    return f"{counted}; {between}{most} on {loaded.device.type}, as measured on one batch{written}"


def _seconds_per_operation(study: Study, task: ScoredTask, loaded: LoadedModel) -> tuple[float, float]:
    """Return the fewest and the most seconds per floating-point operation over three passes of one batch of a task."""
    options = replace(study.settings.runtime.scoring(), reuse=False, lazy=False, cuda_graphs=False)
    step, tokens = max(1, len(task.requests) // 64), 0
    chosen: list[Request] = []
    for request in task.requests[::step]:
        if chosen and tokens + len(request.tokens) > options.batch_tokens:
            break
        chosen.append(request)
        tokens += len(request.tokens)
    scorer = Scorer(loaded, {task.name: replace(task, requests=chosen)}, options)
    operations = cost_of_pass(study.prepared, scorer.packed[task.name])
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        scorer.score(task.name)
        taken.append(time.perf_counter() - started)
    return min(taken) / operations, max(taken) / operations


def describe_study(study: Study) -> str:
    """Return the text of `harness plan`: what will be measured, in which order, and at what cost."""
    description, settings = study.description, study.settings
    cost = forecast(study)
    targets = dict.fromkeys(cell.ablation.target.label for cell in study.units if not cell.is_baseline)
    regions = dict.fromkeys(region_words(cell.ablation.label) for cell in study.units if not cell.is_baseline)
    lines = [
        f"study {study.id}  folder {study.folder}",
        f"model {settings.model.label} ({description.config.model_type}, {description.dtype},"
        f" {1 + max(m.block for m in study.matrices)} blocks, {len(study.matrices)} matrices)",
    ]
    if targets:
        lines += [f"targets {len(targets)}: {_some(targets)}", f"regions {len(regions)}: {_some(regions)}"]
    else:
        lines.append("no targets: the model is measured as it is")
    for name, task in study.tasks.items():
        if isinstance(task, DirectTask):
            lines.append(f"task {name}: {len(task.example_ids)} examples, measured on the model directly")
            continue
        tokens = sum(len(request.tokens) for request in task.requests)
        lines.append(f"task {name}: {len(task.example_ids)} examples, {len(task.requests)} requests, {tokens} tokens")
        if note := bos_note(name, task.protocol):
            lines.append(f"task {name}: {note}")
    text = study.prepared.calibration
    if text is not None and text.task is not None:
        lines.append(f"calibration: {len(text.task.example_ids)} examples, whose loss is derived to the singular values"
                     f" of the change, {cost.calibration:.3g} floating-point operations")
    elif text is not None:
        lines.append(
            f"calibration: {len(text.requests)} sequences, {text.n_tokens} tokens,"
            f" {'covariance' if text.centred else 'second moment'} of the inputs, {cost.calibration:.3g} floating-point"
            f" operations in one pass, {_size(study.costs.calibration_bytes)} on disk; nothing if an earlier run has"
            " left it there (runtime.cache_dir)"
        )
    of_task = Counter(cell.task for cell in study.units)
    lines.append(f"cells {len(study.units)}: " + ", ".join(f"{name} {count}" for name, count in of_task.items()))
    saved = 1 - cost.resumed / cost.plain if cost.plain else 0.0
    lines.append(
        f"cost {cost.resumed:.3g} floating-point operations of scoring ({saved:.0%} saved by resuming at the edited"
        f" block), {cost.decompositions:.3g} for {cost.n_matrices} decompositions, {cost.edits:.3g} for edits"
    )
    lines.append(
        f"memory {_size(cost.stream_bytes)} for the stream at one boundary (runtime.stream_gib),"
        f" {_size(cost.vector_bytes)} for all singular vectors (runtime.decomposition_gib)"
    )
    if cost.n_matrices:
        device = pick_device(settings.model.device)
        rates = rates_for(device, description.dtype, study.matrices)
        when = "once" if device.type == "cuda" else "now"
        lines.append(
            f"time {duration(cost.seconds(rates))} at least, on {device.type} at {rates.product / 1e9:.3g} GFLOP/s as"
            f" measured {when} for large products; real forward passes are slower (experiments/speed)"
        )
        lines.append(
            f"an operation of a decomposition takes {rates.decomposition_weight:.3g} times as long as one of a product;"
            f" shards are divided as if it took {study.costs.decomposition_weight:g} times as long"
        )
    if settings.runtime.precision == "adaptive":
        lines.append("precision adaptive: that is the most that it can cost, as a cell stops once its delta is decided")
    if targets:
        lines.append(f"order baseline, then by first edited block: {_some(targets, 4)}")
    return "\n".join(lines)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**29 else f"{n_bytes / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _some(labels: Iterable[str], most: int = 8) -> str:
    names = list(labels)
    return ", ".join(names[:most]) + (f", ... {names[-1]}" if len(names) > most else "")
