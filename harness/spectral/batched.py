"""Remove singular values from several matrices of one shape at once, such as the experts of one parameter.

On the CPU each matrix is edited by itself: products of a batch may add in another order than those of one matrix, and
did for matrices of a few hundred elements, so that numbers would change in their last bits. On a CUDA device, where one
product over all matrices takes the place of hundreds of small kernels, the edit differs from that of one matrix in the
last bits of float64. After rounding to the dtype of the weights the two are equal, except where the exact value is
within such an error of the middle between two numbers of that dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.ablation import REMOVE, Operation, Removal, check, describe_removal, edit, on_device, others
from harness.spectral.decomposition import Decomposition


@dataclass(frozen=True, eq=False)
class Part:
    """The part of one matrix that an edit takes.

    indices: int64 [n], its positions in the spectrum. operation: what is done with it.
    """

    decomposition: Decomposition
    indices: Tensor
    operation: Operation = REMOVE


def edit_each(weights: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Removal]]:
    """Return weights [m, out, in] after the edit of each, rounded once to their dtype, and what was really removed.

    Raises ValueError as `edit` does.
    """
    if weights.is_cuda and len(weights) > 1 and _alike(parts):
        return _edit_together(weights, parts)
    edited = [edit(weight, part.decomposition, part.indices, part.operation) for weight, part in zip(weights, parts)]
    return torch.stack([weight for weight, _ in edited]), [removed for _, removed in edited]


def _alike(parts: Sequence[Part]) -> bool:
    """Return whether equally many values are removed from every matrix, and nothing else is done or measured."""
    plain = all(part.operation.removes_own_values and part.operation.inputs is None and part.operation.mean is None
                for part in parts)
    return plain and len({(len(part.indices), part.decomposition.side) for part in parts}) == 1


def _edit_together(weights: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Removal]]:
    """Do what `edit_each` does by products over all matrices. The host waits once, for what is said of them all."""
    for weight, part in zip(weights, parts):
        check(weight, part.decomposition, part.indices)
    n, n_values, device = len(parts[0].indices), len(parts[0].decomposition.sigma), weights.device
    matrix, left = weights.detach().to(torch.float64), parts[0].decomposition.side == "left"
    at = on_device(device, torch.stack([part.indices for part in parts]))
    removed = _vectors(parts, at)
    if n == 0:
        exact = matrix
    elif n == n_values:
        exact = torch.zeros_like(matrix)
    elif 2 * n <= n_values:
        first, second = (removed, removed.mT @ matrix) if left else (matrix @ removed, removed.mT)
        exact = torch.baddbmm(matrix, first, second, alpha=-1)
    else:
        rest = torch.stack([others(part.indices, n_values) for part in parts])
        kept = _vectors(parts, on_device(device, rest))
        exact = kept @ (kept.mT @ matrix) if left else (matrix @ kept) @ kept.mT
    edited = exact.to(weights.dtype)
    sigma = torch.stack([part.decomposition.sigma for part in parts])
    values, after = sigma.gather(1, at), edited.to(torch.float64)
    there = removed.mT @ after if left else after @ removed
    none = torch.zeros_like(sigma[:, 0])
    columns = [values.square().sum(1), sigma.square().sum(1), none, none, none,
               torch.linalg.vector_norm(values, dim=1), torch.linalg.vector_norm(there, dim=(1, 2)),
               *(values.aminmax(dim=1) if n else ())]
    rows = torch.stack(columns, dim=1).cpu().tolist()
    return edited, [describe_removal(REMOVE, False, n, n_values, numbers) for numbers in rows]


def _vectors(parts: Sequence[Part], at: Tensor) -> Tensor:
    """Return the vectors at the positions `at` [m, n] of each spectrum: float64 [m, k, n]."""
    return torch.stack([part.decomposition.vectors[:, own] for part, own in zip(parts, at)])
