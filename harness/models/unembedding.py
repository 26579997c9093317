"""What a direction promotes and suppresses: its way through the final norm and the head of a model to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.models.loading import LoadedModel
from harness.models.matrices import Matrix

THROUGH_NEURONS = ("up_proj", "gate_proj")
INTO_STREAM = ("o_proj", "down_proj")
_CHUNK = 64  # directions whose logits are held at once


def down_proj_of(matrix: Matrix, matrices: Sequence[Matrix]) -> Matrix | None:
    """Return the down_proj that reads the neurons into which a matrix writes, or None."""
    if matrix.layer_type not in THROUGH_NEURONS:
        return None
    wanted = ("down_proj", matrix.block, matrix.expert, matrix.shape[0])
    return next((one for one in matrices if (one.layer_type, one.block, one.expert, one.shape[1]) == wanted), None)


def stream_directions(
    loaded: LoadedModel, matrix: Matrix, output: Tensor, neurons: Tensor | None = None
) -> Tensor | None:
    """Return the directions in the residual stream into which output vectors of a matrix write: float64 [c, d].

    output: [c, out]. For up_proj and gate_proj the vector is a weighting of neurons, and the direction is the sum of
    their columns of down_proj, each times its entry and `neurons` [out], the root mean square of the neuron's
    activation; None: 1. Returns None for a matrix that does not write into the stream in either way.
    """
    if matrix.layer_type in INTO_STREAM:
        return output
    down = down_proj_of(matrix, loaded.matrices)
    if down is None:
        return None
    weighted = output if neurons is None else output * neurons.to(output)
    return weighted @ down.read(loaded.model).to(output).T


@torch.no_grad()
def extreme_tokens(loaded: LoadedModel, stream: Tensor, n: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return for each direction [c, d] the n tokens whose logits it raises most, and those that it lowers most.

    The final norm is applied to the direction by itself, so that only its scales matter, and then the head.
    """
    head: Any = loaded.model.get_output_embeddings()
    weight = head.weight.float()
    norm = final_norm(loaded)
    promoted: list[list[int]] = []
    suppressed: list[list[int]] = []
    n = min(n, weight.shape[0])
    for rows in stream.split(_CHUNK):
        rows = rows.to(weight.device, torch.float32)
        rows = torch.nn.functional.normalize(rows, dim=1) * rows.shape[1] ** 0.5  # an rms of 1, far from any epsilon
        if norm is not None:
            dtype = next(norm.parameters(), weight).dtype
            rows = (norm(rows.to(dtype)) - norm(torch.zeros_like(rows[:1], dtype=dtype))).float()
        logits = rows @ weight.T
        promoted += logits.topk(n, dim=1).indices.tolist()
        suppressed += logits.topk(n, dim=1, largest=False).indices.tolist()
    return promoted, suppressed


def final_norm(loaded: LoadedModel) -> nn.Module | None:
    """Return the norm between the last block and the head, or None.

    It is the last norm beside the list of blocks or in a module around it.
    """
    inside = {id(module) for block in loaded.blocks for module in block.modules()}
    norms = [module for module in loaded.model.modules()
             if "norm" in type(module).__name__.lower() and id(module) not in inside]
    return norms[-1] if norms else None
