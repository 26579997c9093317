"""Statistics of residual Jacobians and of the way of a token through the residual stream."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.spectral.statistics import effective_rank


def symmetry(jacobian: Tensor) -> float:
    """Return ||(J + J^T) / 2||_F^2 / ||J||_F^2 of a Jacobian [d, d] (arXiv 2605.14258).

    It is 1 for a symmetric matrix, 0 for a rotation's generator, and 1/2 for independent entries. nan for zero.
    """
    matrix = jacobian.to(torch.float64)
    energy = float(matrix.square().sum())
    return float(((matrix + matrix.T) / 2).square().sum()) / energy if energy else math.nan


def departure_from_normality(jacobian: Tensor) -> float:
    """Return Henrici's departure sqrt(1 - sum |lambda|^2 / ||J||_F^2) of a Jacobian [d, d] with eigenvalues lambda.

    It is 0 for a normal matrix and about sqrt(1/2) for independent entries. nan for zero.
    """
    matrix = jacobian.to(torch.float64)
    energy = float(matrix.square().sum())
    if not energy:
        return math.nan
    eigenvalues = torch.linalg.eigvals(matrix)
    return math.sqrt(max(0.0, 1 - float(eigenvalues.abs().square().sum()) / energy))


def accumulated(product: Tensor | None, jacobian: Tensor) -> tuple[Tensor, float]:
    """Return (I + J) P, scaled to the Frobenius norm 1, and its effective rank (arXiv 2605.14258).

    product: P, float64 [d, d], the product of the earlier blocks up to a factor; None for the identity.
    """
    step = jacobian.to(torch.float64) + torch.eye(len(jacobian), dtype=torch.float64, device=jacobian.device)
    product = step if product is None else step @ product.to(step.device)
    product = product / torch.linalg.matrix_norm(product)
    # Values below 1e-8 of the largest are lost in the Gram matrix; they do not change the effective rank.
    values = torch.linalg.eigvalsh(product.T @ product).flip(0).clamp_min(0).sqrt()
    return product, effective_rank(values.cpu())


@dataclass(frozen=True)
class Trajectory:
    """The way of one token through L blocks, from the input of the first to the output of the last.

    lss: the line-shape score, at least 1, which is 1 if and only if the way is straight. lss_null: sqrt(L), about what
    L steps in random directions give. growth_mean, growth_std: mean and standard deviation over the blocks of
    ln(|x^l| / |x^(l-1)|), in nats per block. expodistance: (growth_std / growth_mean)^2, which is 0 for exact
    exponential growth; nan without growth.
    """

    lss: float
    lss_null: float
    growth_mean: float
    growth_std: float
    expodistance: float


def trajectory(states: Tensor) -> Trajectory:
    """Return the statistics of states [L + 1, d], the residual stream of one token at all block boundaries.

    The line-shape score of Gai and Zhang (2021) adds the unit vectors of all steps: L / |sum_l (x^l - x^(l-1)) /
    |x^l - x^(l-1)||. It is infinite if they cancel, and nan if a block adds nothing.
    """
    states = states.to(torch.float64)
    steps = states.diff(dim=0)
    n = len(steps)
    reach = float(torch.linalg.vector_norm((steps / torch.linalg.vector_norm(steps, dim=1, keepdim=True)).sum(0)))
    growth = torch.linalg.vector_norm(states, dim=1).log().diff()
    mean, deviation = float(growth.mean()), float(growth.std(correction=0))
    return Trajectory(
        n / reach if reach else math.inf, math.sqrt(n), mean, deviation, (deviation / mean) ** 2 if mean else math.nan
    )


def plane(states: Tensor) -> Tensor:
    """Return the coordinates of states [..., d] on their first two principal axes, float64 [..., 2].

    The mean of all states is the origin. The sign of an axis is such that its largest entry is positive.
    """
    flat = states.reshape(-1, states.shape[-1]).to(torch.float64)
    centred = flat - flat.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :2]
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return (centred @ axes).reshape(*states.shape[:-1], 2)
