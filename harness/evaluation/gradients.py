"""Predict the effect of every ablation to first order: the derivative of a metric to each singular value.

One backward pass gives the derivatives to all singular values of all matrices. Let M be a metric, W a matrix that is
sum_i s_i u_i v_i^T, and G = dM/dW. Then dM/ds_i = u_i^T G v_i, and the removal of the singular values R changes M by
about -sum_{i in R} s_i u_i^T G v_i. Such derivatives rank matrices in "Compress to Impress" (arXiv 2510.20800). Because
s_i v_i = W^T u_i, and s_i u_i = W v_i, the products s_i u_i^T G v_i need no division by small singular values. The same
holds for the singular values of a change D = W - W_reference, with D in place of W in these products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.errors import InputError
from harness.evaluation.inner import forward_replaced
from harness.evaluation.requests import DirectTask, PreparedTask, Request, ScoredTask, Scores
from harness.evaluation.statistics import estimate
from harness.models.loading import LoadedModel, require_head
from harness.models.matrices import Matrix
from harness.spectral.decomposition import Decomposition

BATCH_TOKENS = 2048  # padded tokens per batch, few because the backward pass keeps the activations of every block
STEP = 1e-4  # of the central differences, in nats of one log-probability
MAX_ENTRIES = 50_000  # scored tokens; each costs two evaluations of the task's `measure`


@dataclass(frozen=True)
class SingularGradients:
    """The derivatives of one metric M of one task.

    metric: the name of the metric. value: its value for the unedited model. products: name of a matrix -> the products
    s_i dM/ds_i in the metric's own unit, float64 [r] on the CPU.
    """

    metric: str
    value: float
    products: Mapping[str, Tensor]

    def predicted_delta(self, matrix: str, indices: Tensor) -> float:
        """Return the first-order change of the metric if `indices` (int64 [n]) are removed from one matrix."""
        return -float(self.products[matrix][indices].sum())


def singular_gradients(
    loaded: LoadedModel, task: PreparedTask, metrics: Sequence[str], matrices: Sequence[Matrix],
    decompose: Callable[[Matrix], Decomposition], operand: Callable[[Matrix], Tensor] | None = None,
) -> dict[str, SingularGradients]:
    """Return the derivatives of some metrics of a task to the singular values of some matrices, by metric.

    decompose: a function from a matrix to its decomposition. operand: a function from a matrix to the D [out, in] whose
    singular values are meant, such as the change W - W_reference, of which `decompose` then returns a spectrum; None
    for the weights. The cost is one forward pass over the examples for the scores, and one forward and one backward
    pass for each metric. Raises InputError for a model that is not a causal language model, a task that measures the
    model directly, more than MAX_ENTRIES scored tokens, a metric that the task does not have, and a metric that does
    not change with the log-probabilities, as an accuracy.
    """
    found: dict[str, SingularGradients] = {}
    for metric, one in each_gradient(loaded, task, metrics, matrices, decompose, operand):
        if isinstance(one, InputError):
            raise one
        found[metric] = one
    return found


def each_gradient(
    loaded: LoadedModel, task: PreparedTask, metrics: Sequence[str], matrices: Sequence[Matrix],
    decompose: Callable[[Matrix], Decomposition], operand: Callable[[Matrix], Tensor] | None = None,
) -> Iterator[tuple[str, SingularGradients | InputError]]:
    """Yield each metric with its derivatives, or with the error that says why it has none. All share one scoring pass.

    Arguments as in `singular_gradients`. Raises InputError as it does, if the reason is the model or the task.
    """
    key = f"tasks.{task.name}"
    if loaded.description.family.kind != "causal":
        raise InputError("search.choice: gradient works for causal language models only; use exhaustive")
    require_head(loaded)
    if isinstance(task, DirectTask):
        raise InputError(
            f"{key}: a task that measures the model directly has no derivative; use search.choice=exhaustive"
        )
    n_entries = sum(len(request.targets) for request in task.requests)
    if n_entries > MAX_ENTRIES:
        raise InputError(f"{key}: {n_entries} scored tokens are too many for search.choice=gradient; lower its limit")
    batches = _batches(task.requests, BATCH_TOKENS)
    with torch.no_grad():
        scores = _scores(loaded, task, batches)
    for metric in metrics:
        try:
            value, slopes = metric_slopes(task, scores, metric)
        except InputError as error:
            yield metric, error
            continue
        products = _all_products(loaded, batches, slopes, matrices, decompose, operand)
        yield metric, SingularGradients(metric, value, products)


def loss_changes(
    loaded: LoadedModel, requests: Sequence[Request], matrices: Sequence[Matrix],
    decompose: Callable[[Matrix], Decomposition],
) -> dict[str, Tensor]:
    """Return the first-order change of a text's loss if each singular value is removed: matrix -> float64 [r].

    The loss is the mean negative log-probability of the targets of the requests, in nats. decompose: a function from a
    matrix to its spectrum in any metric. With left vectors u_i and the gradient G the change is -u_i^T G W^T u_i.
    Raises InputError for a model that is not a causal language model.
    """
    if loaded.description.family.kind != "causal":
        raise InputError("region.calibration: the loss of a text is that of a causal language model only")
    n = sum(len(request.targets) for request in requests)
    products = _all_products(loaded, _batches(requests, BATCH_TOKENS), np.full(n, -1.0 / n), matrices, decompose)
    return {name: -of_matrix for name, of_matrix in products.items()}


def first_gradients(
    loaded: LoadedModel, task: PreparedTask, metrics: Sequence[str], matrices: Sequence[Matrix],
    decompose: Callable[[Matrix], Decomposition], operand: Callable[[Matrix], Tensor] | None = None,
) -> SingularGradients:
    """Return the derivatives of the first of some metrics that has any, as `singular_gradients`.

    Raises InputError if none has, and as `singular_gradients`.
    """
    refused = []
    for _, found in each_gradient(loaded, task, metrics, matrices, decompose, operand):
        if isinstance(found, SingularGradients):
            return found
        refused.append(str(found).partition(": ")[2])
    raise InputError(f"tasks.{task.name}: {'; '.join(refused)}")


def metric_slopes(task: ScoredTask, scores: Scores, metric: str) -> tuple[float, np.ndarray]:
    """Return a metric and its derivative to each scored log-probability, float64 [N], by central differences.

    Raises InputError if the task does not have the metric, and if all derivatives are zero.
    """
    measured = task.measure(scores)
    if metric not in measured:
        raise InputError(f"search.metrics: task {task.name} has no metric {metric!r}; it has {', '.join(measured)}")

    def value_at(logprob: np.ndarray) -> float:
        moved = Scores(logprob, scores.greedy, scores.rank, scores.offsets)
        return estimate(task.measure(moved)[metric]).value

    slopes = np.empty_like(scores.logprob)
    logprob = scores.logprob.copy()
    for j in range(len(logprob)):
        at = logprob[j]
        logprob[j] = at + STEP
        above = value_at(logprob)
        logprob[j] = at - STEP
        slopes[j] = (above - value_at(logprob)) / (2 * STEP)
        logprob[j] = at
    if not slopes.any():
        raise InputError(
            f"search.metrics: {metric!r} of task {task.name} has no derivative; use one that moves with the"
            " log-probabilities, such as logprob"
        )
    return estimate(measured[metric]).value, slopes


@dataclass(frozen=True)
class _PaddedBatch:
    input_ids: Tensor  # int64 [B, T], right-padded
    rows: Tensor  # int64 [M], the sequence of each scored token
    positions: Tensor  # int64 [M], the position in the sequence whose output predicts it
    targets: Tensor  # int64 [M], the token
    entries: np.ndarray  # int64 [M], its index in the concatenated scores


def _batches(requests: Sequence[Request], batch_tokens: int) -> list[_PaddedBatch]:
    starts = np.concatenate([[0], np.cumsum([len(request.targets) for request in requests])])
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
    batches = []
    while order:
        width = len(requests[order[0]].tokens)
        members, order = order[: max(1, batch_tokens // width)], order[max(1, batch_tokens // width):]
        input_ids = np.zeros((len(members), width), dtype=np.int64)
        for row, i in enumerate(members):
            input_ids[row, : len(requests[i].tokens)] = requests[i].tokens
        rows = np.concatenate([np.full(len(requests[i].targets), row) for row, i in enumerate(members)])
        positions, targets = (np.concatenate([getattr(requests[i], name) for i in members])
                              for name in ("positions", "targets"))
        entries = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        batches.append(_PaddedBatch(
            torch.from_numpy(input_ids), torch.from_numpy(rows), torch.from_numpy(positions), torch.from_numpy(targets),
            entries,
        ))
    return batches


def _logits(loaded: LoadedModel, batch: _PaddedBatch) -> tuple[Tensor, Tensor]:
    """Return logits [K, vocabulary], and for each scored token its row among them, int64 [M].

    The logits are float64 if the model has that, else float32. The head computes those of the scored positions only,
    and those of each position once.
    """
    width = batch.input_ids.shape[1]
    places, row = torch.unique(batch.rows * width + batch.positions, return_inverse=True)
    head: Any = loaded.model.get_output_embeddings()
    whole = head.forward

    def at_places(hidden: Tensor) -> Tensor:
        rows: Tensor = whole(hidden.flatten(0, 1)[places.to(hidden.device)])
        return rows[None]

    with forward_replaced(head, at_places):
        logits = loaded.model(input_ids=batch.input_ids.to(loaded.device), use_cache=False).logits[0]
    return logits if logits.dtype == torch.float64 else logits.float(), row.to(logits.device)


def _scores(loaded: LoadedModel, task: ScoredTask, batches: Sequence[_PaddedBatch]) -> Scores:
    offsets = np.concatenate([[0], np.cumsum([len(request.targets) for request in task.requests])])
    logprob, greedy = np.empty(offsets[-1]), np.empty(offsets[-1], dtype=bool)
    rank = np.empty(offsets[-1], dtype=np.int64)
    for batch in batches:
        logits, row = _logits(loaded, batch)
        targets = batch.targets.to(logits.device)
        of_target = logits[row, targets]
        logprob[batch.entries] = (of_target - torch.logsumexp(logits, 1)[row]).double().cpu().numpy()
        greedy[batch.entries] = (logits.argmax(1)[row] == targets).cpu().numpy()
        rank[batch.entries] = (logits[row] > of_target[:, None]).sum(1).cpu().numpy()
    return Scores(logprob, greedy, rank, offsets)


class _Gradients:
    """Takes the place of the model in `Matrix.view`, with gradients in place of the parameters."""

    def __init__(self, of: dict[str, Tensor]) -> None:
        self._of = of

    def get_parameter(self, name: str) -> Tensor:
        return self._of[name]


def _weight_gradients(
    loaded: LoadedModel, batches: Sequence[_PaddedBatch], slopes: np.ndarray, matrices: Sequence[Matrix]
) -> _Gradients:
    names = list(dict.fromkeys(matrix.parameter for matrix in matrices))
    parameters = {name: loaded.model.get_parameter(name) for name in names}
    with _differentiable(loaded.model, parameters), torch.enable_grad():
        for batch in batches:
            slope = torch.from_numpy(slopes[batch.entries])
            if not slope.any():
                continue
            logits, row = _logits(loaded, batch)
            logprob = logits[row, batch.targets.to(logits.device)] - torch.logsumexp(logits, 1)[row]
            (logprob * slope.to(logprob.device, logprob.dtype)).sum().backward()
        gradients = {}
        for name, parameter in parameters.items():
            assert parameter.grad is not None  # `metric_slopes` has found a slope that is not zero
            gradients[name] = parameter.grad.detach().clone()
        return _Gradients(gradients)


@contextmanager
def _differentiable(model: torch.nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute gradients for these parameters alone for the time of the context.

    Afterwards every parameter has its former gradient, and requires one if it did before.
    """
    wanted = {id(parameter) for parameter in parameters.values()}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def _all_products(
    loaded: LoadedModel, batches: Sequence[_PaddedBatch], slopes: np.ndarray, matrices: Sequence[Matrix],
    decompose: Callable[[Matrix], Decomposition], operand: Callable[[Matrix], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return s_i u_i^T G v_i for all i of each matrix, float64 [r] on the CPU, after one backward pass."""
    gradients, found = _weight_gradients(loaded, batches, slopes, matrices), {}
    for matrix in matrices:
        gradient = matrix.view(gradients).reshape(matrix.shape).to(torch.float64)
        weight = (matrix.read(loaded.model) if operand is None else operand(matrix)).to(torch.float64)
        found[matrix.name] = _products(gradient, weight, decompose(matrix)).cpu()
    return found


def _products(gradient: Tensor, weight: Tensor, decomposition: Decomposition) -> Tensor:
    """Return s_i u_i^T G v_i for all i, float64 [r]."""
    vectors = decomposition.vectors.to(gradient.device)
    if decomposition.side == "left":
        return ((gradient.T @ vectors) * (weight.T @ vectors)).sum(0)
    return ((weight @ vectors) * (gradient @ vectors)).sum(0)
