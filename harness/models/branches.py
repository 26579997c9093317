"""Ablation as a branch: the weights stay as they are, and the removed part is subtracted from the module's output.

    y = z - U_r (U_r^T z) + bias        if the output is the smaller side of W, with z = W x
    y = z - (W V_r) (V_r^T x) + bias    if the input is the smaller side of W

and in general y = z + (s - 1) U_r (U_r^T D x) + bias, for an operand D other than W or a scale s other than 0.

The product z is computed again in float32, and y is rounded once, to the model's dtype. The output of the module itself
cannot be used, because it is already rounded: the second rounding would undo a subtraction of less than half a unit in
the last place. This was measured on a square Gaussian bfloat16 matrix without its smallest 1 % of singular values, by
regressing the outputs along U_r on those before the removal. The coefficient was 49 % for an edited weight, 47 % for a
subtraction from the rounded output, and 0 % for this method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import InputError
from harness.models.matrices import Matrix
from harness.spectral.ablation import REMOVE, Operation, bias_of, low_rank_factors, others
from harness.spectral.decomposition import Decomposition


@dataclass(frozen=True)
class Branch:
    """The removal or scaling of singular values of one matrix, as two factors and perhaps a bias in float32.

    keeps: whether the factors hold the part that is kept, because it has fewer singular values than the removed part.
        Their product then gives the output; otherwise it is subtracted.
    scale: the factor of the part that is removed, which is 0 if it is really removed.
    first: float32 [out, n].
    second: float32 [n, in]. None if `first` holds singular vectors of the output side: the product with x is then
        first^T z.
    bias: float32 [out], added to the output if the part is replaced by its mean; else None.
    """

    matrix: Matrix
    keeps: bool
    scale: float
    first: Tensor
    second: Tensor | None
    bias: Tensor | None = None

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return W' x without the bias of the module, float32 [..., out].

        x: [..., in] of any dtype. weight: W [out, in].
        """
        y = self._product(x, weight)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.second is not None and self.keeps and self.scale == 0:
            return (x.float() @ self.second.T) @ self.first.T
        z = _linear_in_float32(x, weight)
        part = z @ self.first if self.second is None else x.float() @ self.second.T
        return self._edited(z, part @ self.first.T)

    def effective(self, weight: Tensor) -> Tensor:
        """Return the matrix W' by which `output` multiplies, float32 [out, in], computed from the same factors."""
        weight = weight.to(self.first.dtype)
        return self._edited(weight, self.first @ (self.first.T @ weight if self.second is None else self.second))

    def _edited(self, whole: Tensor, part: Tensor) -> Tensor:
        """Return what becomes of the matrix, or of its output, whose part the factors give."""
        if self.scale == 0:
            return part if self.keeps else whole - part
        return self.scale * whole + (1 - self.scale) * part if self.keeps else whole + (self.scale - 1) * part


def _linear_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """Return W x in float32, [..., out], for x [..., in] and weight W [out, in].

    On a GPU inputs and weights of one low precision are multiplied as they are and summed in float32. Every product of
    two such numbers is exact in float32, so that only the order of the sum differs, and the rate is about ten times
    that of float32 products.
    """
    low = x.is_cuda and x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if low and hasattr(torch.ops.aten.mm, "dtype"):
        flat = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=torch.float32)
        return flat.reshape(*x.shape[:-1], len(weight))
    return F.linear(x.float(), weight.float())


def branch(
    matrix: Matrix, weight: Tensor, decomposition: Decomposition, indices: Tensor, operation: Operation = REMOVE
) -> Branch:
    """Return the branch that removes the singular values at `indices` (int64 [n]) from weight [out, in].

    operation: what is done with them instead of a removal. The factors are on the weight's device. Raises ValueError as
    `low_rank_factors` does.
    """
    own = operation.operand is None
    bias = bias_of(weight, decomposition, indices, operation).float() if operation.to_mean else None
    keeps = own and 2 * len(indices) > min(matrix.shape)
    if keeps:
        indices = others(indices, min(matrix.shape))
    first, second = low_rank_factors(operation.of(weight), decomposition, indices)
    by_output = own and decomposition.side == "left"
    return Branch(matrix, keeps, operation.scale, first.float(), None if by_output else second.float(), bias)


@dataclass(frozen=True)
class Bias:
    """A vector that is added to the outputs of one matrix. values: float32 [out]."""

    matrix: Matrix
    values: Tensor


@contextmanager
def biased(model: nn.Module, biases: Sequence[Bias]) -> Iterator[None]:
    """Add these biases to the outputs of the modules for the time of the context; no parameter of the model changes.

    The sum is computed in float32 and rounded to the model's dtype.
    """
    of_module: dict[nn.Module, list[Bias]] = {}
    for one in biases:
        of_module.setdefault(owner_of(model, one.matrix), []).append(one)

    def adding(group: Sequence[Bias]) -> Callable[[Any, tuple, Tensor], Tensor]:
        def add(module: Any, args: tuple, output: Tensor) -> Tensor:
            result = output.clone()
            for one in group:
                part = slice_of(one.matrix, result)
                own = part.shape[-2:] if one.matrix.layout.heads else part.shape[-1:]
                part.copy_(part.float() + one.values.to(part.device).reshape(own))
            return result

        return add

    with ExitStack() as stack:
        for module, group in of_module.items():
            stack.callback(module.register_forward_hook(adding(group)).remove)
        yield


def check_linear(model: nn.Module, matrices: Iterable[Matrix], key: str, instead: str) -> None:
    """Raise an InputError that names the first matrix whose module is not a plain linear layer.

    The model may be on the meta device. key: the setting that cannot edit it. instead: the setting to use.
    """
    for matrix in matrices:
        if matrix.expert is not None or not is_linear(owner_of(model, matrix)):
            what = "an expert of a fused 3-D parameter" if matrix.expert is not None else "not a plain linear layer"
            raise InputError(
                f"{key} cannot edit {matrix.name}, which is {what}; use {instead}, or leave it out of"
                " target.layer_types"
            )


def check_branchable(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Raise an InputError as `check_linear` if runtime.edit=branch cannot edit one of these matrices."""
    check_linear(model, matrices, "runtime.edit: branch", "runtime.edit=weight")


def check_biasable(model: nn.Module, matrices: Iterable[Matrix]) -> None:
    """Raise an InputError as `check_linear` if the part of one of these matrices cannot be replaced by a bias."""
    check_linear(model, matrices, "region.replace: mean", "region.replace=zero")


@contextmanager
def branched(model: nn.Module, branches: Sequence[Branch]) -> Iterator[None]:
    """Put these removals into the forward pass of the model for the time of the context; its weights do not change."""
    of_module: dict[nn.Module, list[Branch]] = {}
    for one in branches:
        of_module.setdefault(owner_of(model, one.matrix), []).append(one)
    with ExitStack() as stack:
        for module, group in of_module.items():
            handle = module.register_forward_hook(_hook(model, group))
            stack.callback(handle.remove)
        yield


def owner_of(model: nn.Module, matrix: Matrix) -> nn.Module:
    """Return the module whose parameter holds the matrix."""
    return model.get_submodule(matrix.parameter.rpartition(".")[0])


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a plain linear layer, of torch or of transformers."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _hook(model: nn.Module, group: Sequence[Branch]) -> Callable[[Any, tuple, Tensor], Tensor]:
    weights = [one.matrix.view(model).reshape(one.matrix.shape) for one in group]

    def replace(module: Any, args: tuple, output: Tensor) -> Tensor:
        x = args[0].to(output.device)
        result = output.clone()
        for one, weight in zip(group, weights):
            part = slice_of(one.matrix, result)
            y = one.output(x, weight).reshape(part.shape)
            part.copy_(y if module.bias is None else y + slice_of(one.matrix, module.bias))
        return result

    return replace


def slice_of(matrix: Matrix, output: Tensor) -> Tensor:
    """Return a view of the outputs of this matrix among the outputs [..., all] of its module, which may be fused.

    Its shape is [..., out], or [..., heads, out / heads] if the module interleaves heads.
    """
    layout = matrix.layout
    if layout.rows is not None:
        return output[..., layout.rows[0] : layout.rows[1]]
    if layout.heads:
        return output.unflatten(-1, (layout.heads, layout.parts, -1))[..., layout.part, :]
    return output
