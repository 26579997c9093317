"""One matrix of a model: where it lies in its parameter, and how it is read and written.

A matrix is always `out x in` here. Checkpoints store matrices in other ways: GPT-2 transposes them (Conv1D) and fuses
q, k and v; GPT-NeoX interleaves q, k and v by head; mixtures of experts stack the experts in one 3-D parameter. In all
of these cases a matrix is a view of the parameter's memory, so that an edit changes this matrix and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from harness.errors import InputError


class HasParameters(Protocol):
    """Anything that returns a parameter by its name, as a model does."""

    def get_parameter(self, target: str, /) -> Tensor:
        """Return the parameter of this name."""
        ...


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in its 2-D parameter, or in the slice of a 3-D parameter that belongs to one expert.

    transposed: whether the parameter is stored as [in, out]. rows: the half-open interval of the output rows that
    belong to this matrix; None for all. heads, part, parts: if `heads` is not 0, the rows are ordered by (head, part,
    row of the head), and this matrix is number `part` of `parts`.
    """

    transposed: bool = False
    rows: tuple[int, int] | None = None
    heads: int = 0
    part: int = 0
    parts: int = 1

    def of(self, weight: Tensor) -> Tensor:
        """Return the view of the matrix in its parameter [..., rows, columns], as `Matrix.view` describes it."""
        if self.transposed:
            weight = weight.mT
        if self.rows is not None:
            weight = weight[..., self.rows[0] : self.rows[1], :]
        if self.heads:
            weight = weight.unflatten(-2, (self.heads, self.parts, -1))[..., self.part, :, :]
        return weight


@dataclass(frozen=True)
class Matrix:
    """One 2-D linear map inside a block.

    name: for example "3.down_proj", "3.down_proj.e7" for an expert, "decoder.3.q_proj" in a model with two stacks.
    block: the block's place in the order of execution, counted over both stacks from 0.
    stack: "encoder" or "decoder", or "" in a model with one stack.
    expert: the index of the expert in a 3-D parameter, or None. parameter: the name of the parameter in the model.
    shape: (out, in).
    """

    name: str
    block: int
    layer_type: str
    stack: str
    expert: int | None
    parameter: str
    shape: tuple[int, int]
    layout: Layout = Layout()

    def view(self, model: HasParameters) -> Tensor:
        """Return the matrix as a detached view of the parameter's memory, in its dtype and on its device.

        The view is 2-D [out, in] with any strides, or 3-D [heads, out / heads, in] if heads are interleaved; in both
        cases `.reshape(out, in)` is the matrix. On the meta device the view has a shape but no values.
        """
        weight = model.get_parameter(self.parameter).detach()
        return self.layout.of(weight if self.expert is None else weight[self.expert])

    def read(self, model: HasParameters) -> Tensor:
        """Return a contiguous copy [out, in] in the parameter's dtype and on its device.

        Raises InputError if the weight is not in memory, as `write` does.
        """
        return self._stored(model).reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def write(self, model: HasParameters, weight: Tensor) -> None:
        """Overwrite the matrix with `weight` [out, in], cast to the parameter's dtype and moved to its device.

        Writing back what `read` returned restores every bit. Raises ValueError for another shape, and InputError if the
        parameter is on the meta device, because the model is a skeleton or its weights are offloaded.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"{self.name}: a matrix of shape {self.shape} is expected, got {tuple(weight.shape)}")
        view = self._stored(model)
        view.copy_(weight.detach().reshape(view.shape))

    def _stored(self, model: HasParameters) -> Tensor:
        return _in_memory(self, self.view(model))


def _in_memory(matrix: Matrix, view: Tensor) -> Tensor:
    if view.is_meta:  # copy_ would do nothing, without an error
        raise InputError(
            f"model.device_map: {matrix.parameter} is not in memory (meta device: offloaded to CPU or disk); "
            "use a device_map that keeps every block on a device"
        )
    return view


def _view_of_all(matrices: Sequence[Matrix], model: HasParameters) -> Tensor:
    first = matrices[0]
    if len(matrices) == 1:
        return _in_memory(first, first.view(model))[None]
    assert first.expert is not None
    stored = model.get_parameter(first.parameter).detach()[first.expert : first.expert + len(matrices)]
    return _in_memory(first, first.layout.of(stored))


def read_all(matrices: Sequence[Matrix], model: HasParameters) -> Tensor:
    """Return a contiguous copy [m, out, in] of one matrix, or of consecutive experts in one parameter.

    Raises InputError as `Matrix.read` does.
    """
    view = _view_of_all(matrices, model)
    return view.reshape(len(matrices), *matrices[0].shape).clone(memory_format=torch.contiguous_format)


def write_all(matrices: Sequence[Matrix], model: HasParameters, weights: Tensor) -> None:
    """Overwrite these matrices with weights [m, out, in], as `Matrix.write` does, for the matrices of `read_all`."""
    expected = (len(matrices), *matrices[0].shape)
    if tuple(weights.shape) != expected:
        raise ValueError(f"{matrices[0].name}: matrices of shape {expected} are expected, got {tuple(weights.shape)}")
    view = _view_of_all(matrices, model)
    view.copy_(weights.detach().reshape(view.shape))


def experts_together(matrices: Sequence[Matrix], model: HasParameters, most_bytes: int) -> list[list[Matrix]]:
    """Return the matrices in their order in groups, each of which `read_all` takes.

    A group has more than one matrix only if it holds consecutive experts of one parameter on a CUDA device. most_bytes:
    of the matrices of such a group in float64.
    """
    groups: list[list[Matrix]] = []
    for matrix in matrices:
        last = groups[-1][-1] if groups else None
        follows = last is not None and None not in (last.expert, matrix.expert) and (
            (last.parameter, last.layer_type, (last.expert or 0) + 1)
            == (matrix.parameter, matrix.layer_type, matrix.expert)
        )
        size = 8 * matrix.shape[0] * matrix.shape[1]
        if follows and (len(groups[-1]) + 1) * size <= most_bytes and model.get_parameter(matrix.parameter).is_cuda:
            groups[-1].append(matrix)
        else:
            groups.append([matrix])
    return groups
