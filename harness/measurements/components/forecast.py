"""The price of the components of a model, in floating-point operations and as the least time, before it is measured."""

from __future__ import annotations

from dataclasses import dataclass

from harness.measurements.ablation.forecast import duration
from harness.measurements.ablation.rates import rates_for
from harness.measurements.components.plan import ComponentsPlan
from harness.models.cost import model_cost
from harness.models.families import skeleton
from harness.models.loading import pick_device
from harness.models.unembedding import INTO_STREAM, THROUGH_NEURONS
from harness.spectral.activations import metric_flops
from harness.spectral.decomposition import decomposition_flops


@dataclass(frozen=True)
class Price:
    """Floating-point operations. passes: over the calibration text and the tasks, forward and backward, with the second
    moments of the inputs. decompositions: of the spectra, and of the weights in which components are looked for again.
    directions: products with the gradients, and for the promoted and suppressed tokens."""

    passes: float
    decompositions: float
    directions: float


def price(plan: ComponentsPlan) -> Price:
    """Return the price of all matrices of a plan. Matrices of one block with equally many inputs share their input."""
    settings, matrices = plan.settings, [unit.matrix for unit in plan.units]
    model = skeleton(plan.description.config, plan.description.family)
    cost = model_cost(model, plan.description.family)
    blocks, passes = sum(cost.block), 0.0
    # A forward pass for the scores, and a forward pass with a backward pass, which costs twice as much.
    for task in plan.tasks.values():
        fed, scored = (sum(len(getattr(one, name)) for one in task.requests) for name in ("tokens", "targets"))
        passes += 4 * (fed * blocks + scored * cost.head)
    if plan.text is not None:
        scored = sum(len(one.targets) for one in plan.text.requests)
        inputs = {(m.block, m.expert, m.shape[1], m.layer_type in INTO_STREAM) for m in matrices}
        passes += 4 * plan.text.n_tokens * blocks + 3 * scored * cost.head
        passes += sum(2.0 * plan.text.n_tokens * width**2 for _, _, width, _ in inputs)
    in_metric = settings.region.metric == "activations"
    of_others = len(settings.stability) + (plan.reference is not None)
    decompositions = sum((metric_flops if in_metric else decomposition_flops)(*m.shape)
                         + of_others * decomposition_flops(*m.shape) for m in matrices)
    derived = len(plan.tasks) + (plan.text is not None)
    width = plan.description.config.get_text_config().hidden_size
    directions = 0.0
    for matrix in matrices:
        out, n_in, rank = *matrix.shape, min(matrix.shape)
        named = min(rank, (settings.tokens_of or rank) * max(derived, 1)) if settings.tokens else 0
        directions += 4.0 * derived * out * n_in * rank
        if matrix.layer_type in (*INTO_STREAM, *THROUGH_NEURONS):
            directions += named * (cost.head + 2.0 * width * out * (matrix.layer_type in THROUGH_NEURONS))
    return Price(passes, decompositions, directions)


def price_lines(plan: ComponentsPlan) -> list[str]:
    """Return the price in words, with the least time at the rates of the device."""
    found, settings = price(plan), plan.settings
    device = pick_device(settings.model.device)
    rates = rates_for(device, plan.description.dtype, (unit.matrix for unit in plan.units))
    seconds = (found.passes + found.directions) / rates.product + found.decompositions / rates.decomposition
    return [
        f"cost {found.passes:.3g} floating-point operations of passes, {found.decompositions:.3g} for"
        f" {len(plan.units) * (1 + len(settings.stability) + (plan.reference is not None))} decompositions,"
        f" {found.directions:.3g} for derivatives along the directions and for tokens",
        f"time {duration(seconds)} at least, on {device.type} at {rates.product / 1e9:.3g} GFLOP/s as measured for"
        " large products",
    ]
