"""The components of one matrix one by one: their directions, their outputs, and how stable they are.

Component i of W [out, in] has the output u_i^T W x for an input x; in the metric of the weights, sigma_i v_i . x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.spectral import vectors
from harness.spectral.activations import InputCovariance
from harness.spectral.decomposition import Decomposition, decompose

LEADING = 10  # eigenvectors of the covariance of the inputs that count as leading
BLOCK = 32  # inputs that share a scale and an offset in a rounding to 4 bits


@dataclass(frozen=True)
class Directions:
    """The components of one matrix.

    output: float64 [r, out], the unit vectors u_i as rows. reading: float64 [r, in], the rows u_i^T W, which are
    sigma_i v_i^T in the metric of the weights. A row of zeros is a vector that the matrix does not determine.
    """

    output: Tensor
    reading: Tensor

    @property
    def input(self) -> Tensor:
        """The rows of `reading`, normalised; zero where a row is zero."""
        return torch.nn.functional.normalize(self.reading, dim=1, eps=1e-300)


def directions(weight: Tensor, decomposition: Decomposition) -> Directions:
    """Return the components of a weight [out, in]. decomposition: its spectrum in any metric."""
    matrix = weight.detach().to(torch.float64)
    if decomposition.side == "left":
        output = decomposition.vectors.T.contiguous()
        return Directions(output, output @ matrix)
    rows = [output for _, output, _ in vectors.vector_chunks(weight, decomposition)]
    return Directions(torch.cat(rows).nan_to_num(0.0), decomposition.sigma[:, None] * decomposition.vectors.T)


def concentration(of: Directions) -> dict[str, Any]:
    """Return the columns that say how much of each vector is in single coordinates."""
    found: dict[str, Any] = {}
    for side, rows in (("input", of.input), ("output", of.output)):
        found[f"{side}_participation"] = vectors.inverse_participation(rows).cpu().numpy()
        found[f"{side}_coordinate"] = rows.abs().argmax(1).cpu().numpy()
    return found


def leading_directions(inputs: InputCovariance) -> Tensor:
    """Return the LEADING eigenvectors of the covariance of the inputs as columns, float64 [in, LEADING] or fewer."""
    return inputs.directions()[:, :LEADING]


def outputs(of: Directions, inputs: InputCovariance, leading: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the columns about the outputs over the text of `inputs`, and the signs of the means of the outputs.

    leading: as `leading_directions` returns; matrices with the same input share it. The signs, float64 [r], are 1 or
    -1.
    """
    mean = of.reading @ inputs.mean
    square = ((of.reading @ inputs.covariance) * of.reading).sum(1).clamp(min=0) + mean**2
    unit = of.input
    norm = torch.linalg.vector_norm(inputs.mean)
    cosine = unit @ inputs.mean / norm if norm else torch.zeros_like(mean)
    order = square.argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    signs = torch.where(mean < 0, -1.0, 1.0).to(mean)
    found = {
        "output_rms": square.sqrt(), "output_mean": mean * signs,
        "constant_share": torch.where(square > 0, mean**2 / square, torch.nan),
        "output_rank": place, "mean_cosine": cosine * signs, "leading_share": (unit @ leading).square().sum(1),
    }  # fmt: skip
    return {name: values.cpu().numpy() for name, values in found.items()}, signs


def stability(of: Directions, other: Tensor) -> Tensor:
    """Return how well each component is found again in another matrix [out, in]: float64 [r], from 0 to 1.

    It is the largest |u . u'| |v . v'| over the components (u', v') of the spectrum of the other weight.
    """
    theirs = directions(other, decompose(other))
    return ((of.output @ theirs.output.T).abs() * (of.input @ theirs.input.T).abs()).amax(1)


def rounded_to_4_bits(weight: Tensor) -> Tensor:
    """Return a weight [out, in] rounded to 16 levels in each block of BLOCK consecutive inputs, in float64.

    The levels are evenly spaced from the smallest to the largest entry of the block. The last block of a row is shorter
    if the number of inputs is no multiple of BLOCK.
    """
    parts = []
    for block in weight.detach().to(torch.float64).split(BLOCK, dim=1):
        low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
        step = (high - low) / 15
        levels = torch.where(step > 0, (block - low) / step, 0.0).round()
        parts.append(low + levels * step)
    return torch.cat(parts, dim=1)
