"""One matrix of a model: where it lies in its parameter, and how it is read and written.

A matrix is always `out x in` here. Checkpoints store matrices in other ways: GPT-2 transposes them (Conv1D) and fuses
q, k and v; GPT-NeoX interleaves q, k and v by head; mixtures of experts stack the experts in one 3-D parameter. In all
of these cases a matrix is a view of the parameter's memory, so that an edit changes this matrix and nothing else.
"""

from __future__ import annotations

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
        layout = self.layout
        if self.expert is not None:
            weight = weight[self.expert]
        if layout.transposed:
            weight = weight.mT
        if layout.rows is not None:
            weight = weight[layout.rows[0] : layout.rows[1]]
        if layout.heads:
            weight = weight.unflatten(0, (layout.heads, layout.parts, -1))[:, layout.part]
        return weight

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
        view = self.view(model)
        if view.is_meta:  # copy_ would do nothing, without an error
            raise InputError(
                f"model.device_map: {self.parameter} is not in memory (meta device: offloaded to CPU or disk); "
                "use a device_map that keeps every block on a device"
            )
        return view
