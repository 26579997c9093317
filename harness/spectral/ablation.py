"""Remove singular values from a matrix, or scale them, and measure what was really removed.

Every edit is W' = W + (s - 1) U_r (U_r^T D). U_r holds the left singular vectors at the region's positions of some
spectrum, D is the operand, and s the scale: 0 removes the part, 2 doubles it. The operand is W itself unless another
is given. The edit is computed in float64 and rounded once. A part may also be replaced by its mean over some inputs x:
a bias (1 - s) U_r U_r^T D <x> is then added to the output W' x (`bias_of`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from harness.spectral.decomposition import Decomposition


@dataclass(frozen=True, eq=False)
class Operation:
    """What is done with the part of a matrix that a region picks: by default it is removed.

    scale: s in W + (s - 1) U_r (U_r^T D).
    factors: float64 [n], one s for each of the values at the region's positions, in place of `scale`; or None.
    values: what the spectrum's singular values are: "own", those of the operand D itself; "output", those of D C^(1/2),
        in the metric of the activations; "other", those of another matrix.
    operand: D [out, in] of any dtype; None for W. If it is given, the spectrum must have `side` "left", unless it is
        that of the operand, or unless all of it is meant.
    without: W - D [out, in] of any dtype, exactly, if an operand is given: what is left if all of D is removed.
    whole: the D that is meant where the operand is only a control of it; None if the operand is D.
    rest: whether everything but the part is meant, W' = W + (s - 1) (D - U_r U_r^T operand); only with an operand.
    inputs: float64 F [in, q], where F F^T is the second moment or the covariance of the matrix's inputs; None if it is
        not known, or if the values are "output". It tells what the part contributes to the outputs.
    output_energy: float64 scalar |D F|^2 if it is known already, for it is the same for every part of D.
    centred: whether F F^T, or C, is the covariance.
    mean: float64 [in], the mean of the inputs; None if it is not known. to_mean: whether the part is replaced by its
        mean, so that a bias is added. `inputs` must then be those of the covariance.
    """

    scale: float = 0.0
    values: Literal["own", "output", "other"] = "own"
    operand: Tensor | None = None
    inputs: Tensor | None = None
    output_energy: Tensor | None = None
    centred: bool = False
    mean: Tensor | None = None
    to_mean: bool = False
    without: Tensor | None = None
    whole: Tensor | None = None
    rest: bool = False
    factors: Tensor | None = None

    @property
    def removes_own_values(self) -> bool:
        """Whether singular values of W itself are removed, so that their squares say what there was."""
        return self.scale == 0 and self.values == "own" and self.operand is None and self.factors is None

    def of(self, weight: Tensor) -> Tensor:
        """Return the operand for this weight, in float64 on its device."""
        operand = weight if self.operand is None else self.operand
        return operand.detach().to(weight.device, torch.float64)


REMOVE = Operation()


@dataclass(frozen=True)
class Removal:
    """What one edit took away from a matrix.

    n_removed, n_values: the number of removed singular values, and of all singular values of the matrix. If the scale
        is not 0, "removed" means here and below the values that the edit scales.
    energy_removed: the removed share |U_r^T D|^2 / |D|^2 of the squared Frobenius norm of the operand, which for the
        spectrum of W is the sum of the removed sigma^2 over the sum of all sigma^2; 0 for a zero matrix.
    energy: |D|^2, the squared Frobenius norm of the operand.
    norm_removed: |W - W'|, the Frobenius norm of the change before rounding.
    output_energy_removed, output_energy, output_norm_removed: the same three for the outputs, with D C^(1/2) in place
        of D: means of squares over the calibration text, or variances if C is the covariance or the part is replaced by
        its mean. None if the inputs are not known.
    output_part_energy, output_constant_energy: the mean square of the part's outputs, U_r^T D x, and the square of
        their mean. None if the mean of the inputs is not known.
    sigma_max_removed, sigma_min_removed: the largest and the smallest removed singular value; None if none was removed.
    realised_removal: 1 - |U_r^T W'|_F / |U_r^T W|_F, where W' is the new weight after rounding to its dtype and U_r
        holds the removed vectors. It is 1 if the removed part is gone, and 0 if rounding has put as much back as was
        taken. None if there was nothing to take: no indices, or only singular values of zero. For another operand or
        scale it is 1 - |U_r^T (W' - E)|_F / |U_r^T (W - E)|_F, where E is the edited weight before rounding.
    """

    n_removed: int
    n_values: int
    energy_removed: float
    sigma_max_removed: float | None
    sigma_min_removed: float | None
    realised_removal: float | None
    energy: float
    norm_removed: float
    output_energy_removed: float | None = None
    output_energy: float | None = None
    output_norm_removed: float | None = None
    output_part_energy: float | None = None
    output_constant_energy: float | None = None


def ablate(weight: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation = REMOVE) -> Tensor:
    """Return weight [out, in] without the singular values at `indices` (int64 [n]), as float64 [out, in].

    decomposition: that of this weight, or of the operation's operand, or another spectrum of the same shape. The result
    is on the weight's device. Without indices it is exactly the weight; if all values of the weight's own spectrum are
    removed it is exactly zero. Raises ValueError if the weight has another shape than its decomposition, and if an
    index is out of range or appears twice.
    """
    check(weight, decomposition, indices)
    matrix, scale = weight.detach().to(torch.float64), operation.scale
    n_values = len(decomposition.sigma)
    if operation.factors is not None:
        return matrix + _scaled(operation.of(matrix), decomposition, indices, operation.factors - 1)
    if operation.operand is not None:
        return _ablate_operand(matrix, decomposition, indices, operation)
    if len(indices) == 0:
        return matrix.clone()
    if len(indices) == n_values:
        return torch.zeros_like(matrix) if scale == 0 else scale * matrix
    if 2 * len(indices) <= n_values:
        part = _project(matrix, decomposition, indices)
        return matrix - part if scale == 0 else matrix + (scale - 1) * part
    rest = _project(matrix, decomposition, others(indices, n_values))
    return rest if scale == 0 else scale * matrix + (1 - scale) * rest


def _ablate_operand(matrix: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation) -> Tensor:
    """Return the matrix without a part of the operand, or without all of it but this part, in float64.

    Where all of D is removed the result is exactly `without`, and where nothing is, exactly the matrix.
    """
    scale, operand = operation.scale, operation.of(matrix)
    whole = operand if operation.whole is None else operation.whole.to(matrix)
    vectors = decomposition.vectors
    everything = len(indices) == len(decomposition.sigma) and vectors.shape[0] == vectors.shape[1]
    everything = everything and operation.whole is None
    if operation.rest and everything or not operation.rest and len(indices) == 0:
        return matrix.clone()
    removed = operation.without
    emptied = removed.to(matrix) if scale == 0 and removed is not None else matrix + (scale - 1) * whole
    if operation.rest and len(indices) == 0 or not operation.rest and everything:
        return emptied.clone()
    part = _project(operand, decomposition, indices)
    return emptied + (1 - scale) * part if operation.rest else matrix + (scale - 1) * part


def edit(
    weight: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation = REMOVE
) -> tuple[Tensor, Removal]:
    """Return the ablated weight [out, in], rounded once to the dtype of `weight`, and what was really removed.

    Arguments and errors are those of `ablate`.
    """
    exact = ablate(weight, decomposition, indices, operation)
    edited = exact.to(weight.dtype)
    return edited, removal(edited, weight, decomposition, indices, operation, exact)


def removal(
    after: Tensor, weight: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation = REMOVE,
    exact: Tensor | None = None,
) -> Removal:
    """Describe what an edit took away from a weight.

    after: the weight after the edit, [out, in], of any dtype. weight: the weight before it. indices: int64 [n], the
    removed singular values. exact: what `ablate` returns for these arguments, if the caller has it.
    """
    sigma = decomposition.sigma
    removed = sigma[on_device(sigma.device, indices)]
    energy_removed, energy = (removed**2).sum(), (sigma**2).sum()
    output_removed = output_energy = torch.zeros_like(energy)
    known = operation.values == "output" or operation.inputs is not None
    if operation.values == "output" and operation.inputs is None:
        output_removed, output_energy = energy_removed, energy
    if operation.values != "own":
        operand = operation.of(weight)
        energy_removed = _coordinates(operand, decomposition, indices).square().sum()
        energy = operand.square().sum()
    if operation.inputs is not None and operation.output_energy is not None and not len(indices):
        output_energy = operation.output_energy
    elif operation.inputs is not None:
        operand, inputs = operation.of(weight), operation.inputs
        if decomposition.side == "left":
            outputs = _coordinates(operand, decomposition, indices) @ inputs
        else:  # the columns of D V_r are orthogonal, and their norms are the values
            outputs = removed[:, None].to(inputs) * (_vectors(decomposition, indices, inputs).T @ inputs)
        output_removed, whole = outputs.square().sum(), operation.output_energy
        output_energy = (operand @ inputs).square().sum() if whole is None else whole
    of_mean = torch.zeros_like(energy)
    if operation.mean is not None and known and len(indices):
        of_mean = _part_of(operation, weight, decomposition, indices).square().sum()
    n_removed = len(indices)
    if operation.rest:  # everything but the part is meant
        removed = sigma[on_device(sigma.device, others(indices, len(sigma)))]
        n_removed = len(removed)
        energy = (operation.of(weight) if operation.whole is None else operation.whole.to(sigma)).square().sum()
        energy_removed = (energy - energy_removed).clamp(min=0)
    if operation.removes_own_values:
        realised = _norms_of_own(after, decomposition, indices)
    else:
        exact = ablate(weight, decomposition, indices, operation) if exact is None else exact
        parts = weight.to(torch.float64) - exact, after.to(torch.float64) - exact
        realised = [
            torch.linalg.vector_norm(part if operation.rest else _coordinates(part, decomposition, indices))
            for part in parts
        ]
    found = describe_removal(
        operation, known, n_removed, len(sigma),
        _numbers([energy_removed, energy, output_removed, output_energy, of_mean, *realised,
                  *(removed.aminmax() if n_removed else ())]),
    )
    if operation.factors is None:
        return found
    assert exact is not None  # `removes_own_values` is false
    return dataclasses.replace(found, norm_removed=float(torch.linalg.vector_norm(weight.to(exact) - exact)))


def describe_removal(operation: Operation, known: bool, n_removed: int, n_values: int, numbers: list[float]) -> Removal:
    """Return the description of an edit. numbers: those that `removal` measures, in its order.

    known: whether it is measured what the part contributes to the outputs.
    """
    energy_removed, energy, output_removed, output_energy, of_mean, there, left, *extremes = numbers
    smallest, largest = extremes or (None, None)
    constant = part = None
    if operation.mean is not None and known:
        constant = of_mean
        part = output_removed + constant if operation.centred or operation.to_mean else output_removed
    strength = abs(1 - operation.scale)
    return Removal(
        n_removed=n_removed,
        n_values=n_values,
        energy_removed=energy_removed / energy if energy else 0.0,
        sigma_max_removed=largest,
        sigma_min_removed=smallest,
        realised_removal=1 - left / there if n_removed and there else None,
        energy=energy,
        norm_removed=strength * math.sqrt(energy_removed),
        output_energy_removed=(output_removed / output_energy if output_energy else 0.0) if known else None,
        output_energy=output_energy if known else None,
        output_norm_removed=strength * math.sqrt(output_removed) if known else None,
        output_part_energy=part,
        output_constant_energy=constant,
    )


def bias_of(weight: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation) -> Tensor:
    """Return the bias that replaces the part at `indices` by its mean, (1 - s) U_r U_r^T D <x>: float64 [out].

    weight: the weight [out, in] before the edit. Raises ValueError if the operation does not know the mean.
    """
    if operation.mean is None:
        raise ValueError("a part can be replaced by its mean only if the mean of the inputs is known")
    return (1 - operation.scale) * _part_of(operation, weight, decomposition, indices)


def _part_of(operation: Operation, weight: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    """Return U_r U_r^T D <x>, float64 [out]."""
    assert operation.mean is not None
    operand, mean = operation.of(weight), operation.mean.to(weight.device)
    vectors = _vectors(decomposition, indices, operand)
    if decomposition.side == "left":
        return vectors @ (vectors.T @ (operand @ mean))
    return operand @ (vectors @ (vectors.T @ mean))


def realised_removal(after: Tensor, decomposition: Decomposition, indices: Tensor) -> float | None:
    """Return 1 - |U_r^T W'|_F / |U_r^T W|_F, where W is the decomposed weight and W' is `after` [out, in].

    None if there was nothing to remove (see `Removal`).
    """
    there, left = _numbers(_norms_of_own(after, decomposition, indices))
    return 1 - left / there if len(indices) and there else None


def _norms_of_own(after: Tensor, decomposition: Decomposition, indices: Tensor) -> list[Tensor]:
    # The rows of U_r^T W have the removed singular values as their norms, so W itself is not needed.
    there = decomposition.sigma[on_device(decomposition.sigma.device, indices)]
    left = there if not len(indices) else _coordinates(after.to(torch.float64), decomposition, indices)
    return [torch.linalg.vector_norm(there), torch.linalg.vector_norm(left)]


def _numbers(values: list[Tensor]) -> list[float]:
    """Return scalar tensors as numbers. A GPU is waited for once and not for each of them."""
    found: list[float] = torch.stack([value.to(values[0]) for value in values]).cpu().tolist()
    return found


def on_device(device: torch.device, indices: Tensor) -> Tensor:
    """Return indices on a device, for which the host does not wait."""
    return indices.to(device, non_blocking=True)


def low_rank_factors(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the removed part as two factors: float64 A [out, n] and B [n, in] with A @ B = weight - ablate(weight).

    Arguments and errors are those of `ablate`.
    """
    check(weight, decomposition, indices)
    matrix = weight.detach().to(torch.float64)
    vectors = _vectors(decomposition, indices, matrix)
    if decomposition.side == "left":
        return vectors, vectors.T @ matrix
    return matrix @ vectors, vectors.T.contiguous()


def check(weight: Tensor, decomposition: Decomposition, indices: Tensor) -> None:
    """Raise ValueError if the weight has another shape than its decomposition, or an index is out of range or twice."""
    if tuple(weight.shape) != decomposition.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, its decomposition {decomposition.shape}")
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= len(decomposition.sigma)):
        raise ValueError(f"indices must lie in 0..{len(decomposition.sigma) - 1}")
    if len(indices.unique()) != len(indices):
        raise ValueError("indices name a singular value twice")


def others(indices: Tensor, n_values: int) -> Tensor:
    """Return the positions 0..n_values - 1 that are not in `indices` (int64 [n]), in ascending order, on the CPU."""
    kept = torch.ones(n_values, dtype=torch.bool)
    kept[indices.cpu()] = False
    return kept.nonzero().flatten()


def _vectors(decomposition: Decomposition, indices: Tensor, like: Tensor) -> Tensor:
    vectors = decomposition.vectors
    return vectors[:, on_device(vectors.device, indices)].to(like.device)


def _coordinates(matrix: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    vectors = _vectors(decomposition, indices, matrix)
    return vectors.T @ matrix if decomposition.side == "left" else matrix @ vectors


def _scaled(matrix: Tensor, decomposition: Decomposition, indices: Tensor, strengths: Tensor) -> Tensor:
    """Return sum_i c_i u_i u_i^T D (or the same with right vectors), float64 [out, in]. strengths: c, float64 [n]."""
    vectors = _vectors(decomposition, indices, matrix)
    weighted = vectors * strengths.to(matrix)
    return weighted @ (vectors.T @ matrix) if decomposition.side == "left" else (matrix @ weighted) @ vectors.T


def _project(matrix: Tensor, decomposition: Decomposition, indices: Tensor) -> Tensor:
    vectors = _vectors(decomposition, indices, matrix)
    if decomposition.side == "left":
        return vectors @ (vectors.T @ matrix)
    return (matrix @ vectors) @ vectors.T
