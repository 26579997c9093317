"""Make the columns of the first three tables from the weight and the decomposition of one matrix."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from harness.spectral import statistics, vectors
from harness.spectral.decomposition import Decomposition
from harness.spectral.random_matrix import bounds_within, estimate_noise, mp_distances, mp_edges
from harness.spectral.singular_values import SingularValues


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The activations that enter one matrix.

    directions: float64 [in, m], the eigenvectors of their covariance. n_tokens: the number of tokens in it.
    """

    directions: Tensor
    n_tokens: int


def spectrum_of(
    weight: Tensor, decomposition: Decomposition | SingularValues, estimator: str = "gavish_donoho",
    tracy_widom: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns of `matrices` and of `singular_values` that follow from the singular values of a matrix.

    weight: [out, in]. estimator, tracy_widom: as in the settings.
    """
    sigma, shape = decomposition.sigma.cpu(), decomposition.shape
    noise = estimate_noise(sigma, shape, estimator)
    lower, upper = mp_edges(noise, shape, tracy_widom)
    start, stop = bounds_within(sigma, lower, upper)
    from_law, from_law_inside = mp_distances(sigma, noise, shape)
    rank, energy = len(sigma), sigma**2
    total = float(energy.sum())
    alpha, alpha_ks, xmin, n_tail = statistics.power_law(sigma)
    row = {
        "entry_std": math.sqrt(total / weight.numel()),
        "sigma_max": float(sigma[0]),
        "sigma_median": float((sigma[(rank - 1) // 2] + sigma[rank // 2]) / 2),
        "sigma_min": float(sigma[-1]),
        "condition": statistics.condition(sigma),
        "frobenius_norm": math.sqrt(total),
        "stable_rank": statistics.stable_rank(sigma),
        "participation_ratio": statistics.participation_ratio(sigma),
        "spectral_entropy": statistics.spectral_entropy(sigma),
        "effective_rank": statistics.effective_rank(sigma),
        "noise": noise,
        "edge_lower": lower,
        "edge_upper": upper,
        "n_above": start,
        "n_below": rank - stop,
        "share_outside": (start + rank - stop) / rank,
        "energy_above": float(energy[:start].sum()) / total if total else math.nan,
        "ks_mp": from_law,
        "ks_mp_inside": from_law_inside,
        "alpha": alpha,
        "alpha_ks": alpha_ks,
        "alpha_xmin": xmin,
        "alpha_n": n_tail,
        "svd_method": decomposition.method,
        "svd_reconstruction_error": decomposition.reconstruction_error,
        "svd_orthogonality_error": decomposition.orthogonality_error,
    }
    position = ["above"] * start + ["inside"] * (stop - start) + ["below"] * (rank - stop)
    return row, {"index": list(range(rank)), "sigma": sigma.numpy(), "position": position}


def vectors_of(
    weight: Tensor, decomposition: Decomposition, inputs: Inputs | None = None, n_above: int = 0, n_below: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns of `matrices` and of `vectors` that follow from the singular vectors of a matrix.

    weight: [out, in]. inputs: the activations that enter the matrix, or None if there are no overlaps to compute.
    n_above, n_below: the numbers of singular values above and below the bulk. The input side is first in `vectors`.
    """
    rank = len(decomposition.sigma)
    names = ("porter_thomas_p", "inverse_participation", "largest_component", "overlap")
    found = {side: {name: torch.full((rank,), math.nan, dtype=torch.float64) for name in names}
             for side in ("input", "output")}
    direction = torch.full((rank,), -1)
    for positions, output, entering in vectors.vector_chunks(weight, decomposition):
        for side, rows in (("input", entering), ("output", output)):
            found[side]["porter_thomas_p"][positions] = vectors.porter_thomas_p(rows)
            found[side]["inverse_participation"][positions] = vectors.inverse_participation(rows).cpu()
            found[side]["largest_component"][positions] = vectors.largest_component(rows).cpu()
        if inputs is not None and inputs.directions.shape[1]:
            overlap, where = vectors.overlaps(entering, inputs.directions)
            found["input"]["overlap"][positions] = overlap.cpu()
            direction[positions] = where.cpu()
    row: dict[str, Any] = {
        f"porter_thomas_{side}": float(found[side]["porter_thomas_p"].nanmean()) for side in ("input", "output")
    }
    if inputs is not None:
        row |= {"n_tokens": inputs.n_tokens, "n_directions": inputs.directions.shape[1]}
    if inputs is not None and inputs.directions.shape[1]:
        mean, deviation = vectors.random_overlap(*inputs.directions.shape)
        beyond = found["input"]["overlap"] > mean + 3 * deviation
        row |= {
            "overlap_null_mean": mean, "overlap_null_std": deviation, "n_overlapping": int(beyond.sum()),
            "n_overlapping_above": int(beyond[:n_above].sum()),
            "n_overlapping_below": int(beyond[rank - n_below :].sum()),
        }  # fmt: skip
    columns: dict[str, Any] = {"side": ["input"] * rank + ["output"] * rank, "index": [*range(rank), *range(rank)]}
    for name in names:
        columns[name] = torch.cat([found["input"][name], found["output"][name]]).numpy()
    columns["porter_thomas_p15"] = torch.cat(
        [vectors.smoothed(found[side]["porter_thomas_p"]) for side in ("input", "output")]
    ).numpy()
    known = [None if math.isnan(o) else d for o, d in zip(found["input"]["overlap"].tolist(), direction.tolist())]
    columns["overlap_direction"] = [*known, *[None] * rank]
    return row, columns
