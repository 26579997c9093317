"""One matrix of a model: where it lies in its parameter, and how to read it, write it and put it back.

A matrix is always `out x in` here. Checkpoints store it otherwise: GPT-2 transposes (Conv1D) and fuses q, k and v;
GPT-NeoX interleaves them by head; mixtures of experts stack experts in one 3-D parameter. Every one of these is a
view of the parameter's storage, so that an edit touches this matrix and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.errors import InputError


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in its 2-D parameter, or in one expert's slice of a 3-D one.

    transposed: stored in x out. rows: the half-open interval of output rows that are this matrix; None: all.
    heads, part, parts: rows ordered (heads, parts, rows of a head), of which this matrix is `part`; heads 0: not so.
    """

    transposed: bool = False
    rows: tuple[int, int] | None = None
    heads: int = 0
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Matrix:
    """One 2-D linear map inside a block.

    name: "3.down_proj", "3.down_proj.e7" for an expert, "decoder.3.q_proj" where a model has two stacks.
    block: index into the execution-ordered list of blocks, over both stacks. stack: "" or "encoder" or "decoder".
    expert: index in a 3-D parameter, or None. parameter: its name in the model. shape: (out, in).
    """

    name: str
    block: int
    layer_type: str
    stack: str
    expert: int | None
    parameter: str
    shape: tuple[int, int]
    layout: Layout = Layout()

    def view(self, model: nn.Module) -> Tensor:
        """The matrix as a detached view sharing the parameter's storage, in its dtype and on its device.

        2-D [out, in] with any strides, or 3-D [heads, out / heads, in] where heads are interleaved;
        `.reshape(out, in)` is the matrix in every case. On the meta device only its shape means something.
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

    def read(self, model: nn.Module) -> Tensor:
        """A contiguous copy [out, in] in the parameter's dtype and on its device; InputError as in `write`."""
        return self._stored(model).reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def write(self, model: nn.Module, weight: Tensor) -> None:
        """Overwrite the matrix with `weight` [out, in], cast to the parameter's dtype and moved to its device.

        Writing back what `read` returned restores every bit. Raises ValueError for another shape, and InputError for a
        weight without storage (a skeleton, or offloaded).
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"{self.name}: a matrix of shape {self.shape} is expected, got {tuple(weight.shape)}")
        view = self._stored(model)
        view.copy_(weight.detach().reshape(view.shape))

    def _stored(self, model: nn.Module) -> Tensor:
        view = self.view(model)
        if view.is_meta:  # copy_ would do nothing, and say nothing
            raise InputError(
                f"model.device_map: {self.parameter} is not in memory (meta device: offloaded to CPU or disk); "
                "use a device_map that keeps every block on a device"
            )
        return view
