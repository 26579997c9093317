"""Controls of parts of a weight: as large a part in random directions, in place of the matrix's own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from harness.models.matrices import Matrix
from harness.spectral.changes import Frame, rotated
from harness.spectral.decomposition import Decomposition

ROTATIONS = ("rotated", "rotated_output")  # kinds of controls


def rotated_spectrum(found: Decomposition, seed: int, matrix: Matrix) -> Decomposition:
    """Return a spectrum with random left vectors [out, r] in place of its own. The draw is that of `rotated_operand`.

    The values are the same, so that a region picks the same positions.
    """
    return dataclasses.replace(found, vectors=_turned(found, seed, matrix).output, side="left")


def rotated_operand(
    found: Decomposition, seed: int, matrix: Matrix, sizes: Tensor | None = None, inputs: Tensor | None = None
) -> Tensor:
    """Return sum_i c_i a_i b_i^T with random orthonormal a_i and b_i, float64 [out, in].

    found: the spectrum of the weight. sizes: None for c_i = sigma_i; else float64 [r], the root mean squares that the
    outputs c_i b_i^T x shall have. inputs: float64 F [in, q], where F F^T is the second moment or the covariance of x.
    A direction into which no input falls gets c_i = 0.
    """
    turned = _turned(found, seed, matrix)
    values = turned.sigma
    if sizes is not None:
        assert inputs is not None
        reached = torch.linalg.vector_norm(turned.input.T @ inputs.to(turned.input), dim=1)
        values = torch.where(reached > 0, sizes.to(reached) / reached, 0.0)
    return (turned.output * values) @ turned.input.T


def output_sizes(found: Decomposition, weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the root mean squares of the outputs u_i^T W x of all components of a weight: float64 [r].

    weight: W [out, in]. inputs: F as in `rotated_operand`.
    """
    if found.side == "left":
        rows = found.vectors.T @ weight.detach().to(found.vectors)
    else:
        rows = found.sigma[:, None] * found.vectors.T
    return torch.linalg.vector_norm(rows @ inputs.to(rows), dim=1)


def _turned(found: Decomposition, seed: int, matrix: Matrix) -> Frame:
    output, entering = (found.sigma.new_empty(n, len(found.sigma)) for n in matrix.shape)
    return rotated(Frame(found.sigma, output, entering), seed, matrix.name)
