"""Which share of pure noise does a rule call signal? Ours beside laserRMT's, and planted spikes that should be found.

    python experiments/spectra/calibration.py        # writes calibration.md and calibration.csv beside this file

Needs torch only; about a minute on two cores.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.spectral.random_matrix import (
    NOISE_ESTIMATORS,
    aspect_of,
    bbp_threshold,
    estimate_noise,
    hard_threshold,
    mp_edges,
    mp_region_bounds,
)

NOISE = 0.02
SHAPES = ((1024, 1024), (1024, 2816), (768, 3072))  # aspect 1, 0.36 (SwiGLU), 0.25 (4:1)
SPIKES = (0.5, 0.8, 1.25, 2.0, 4.0)  # planted, in units of the BBP threshold: two below, three above


def gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    return NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(shape: tuple[int, int], strengths: list[float], seed: int) -> Tensor:
    left, right = (torch.linalg.qr(gaussian((side, len(strengths)), seed + i)).Q for i, side in enumerate(shape))
    return (left * torch.tensor(strengths, dtype=torch.float64)) @ right.T


def laser_rmt_threshold(sigma: Tensor, shape: tuple[int, int]) -> float:
    """IQR(singular values) / 1.349 * (1 + sqrt(aspect)): the rule of laserRMT and Spectrum."""
    low, high = torch.quantile(sigma, torch.tensor([0.25, 0.75], dtype=sigma.dtype)).tolist()
    return (high - low) / 1.349 * (1 + math.sqrt(aspect_of(shape)))


def rules() -> dict[str, Callable[[Tensor, tuple[int, int]], tuple[int, int, float]]]:
    """Name -> function (sigma, shape) -> (number above, number below, upper threshold)."""
    table = {}
    for estimator in dict.fromkeys(NOISE_ESTIMATORS):
        for margin in (False, True):
            def rule(sigma, shape, estimator=estimator, margin=margin):
                start, stop = mp_region_bounds(sigma, shape, estimator, margin)
                return start, len(sigma) - stop, mp_edges(estimate_noise(sigma, shape, estimator), shape, margin)[1]
            table[f"mp {estimator}" + " + tracy_widom" * margin] = rule
    table["gavish_donoho hard threshold"] = lambda sigma, shape: _above(sigma, hard_threshold(sigma, shape))
    table["laserRMT"] = lambda sigma, shape: _above(sigma, laser_rmt_threshold(sigma, shape))
    return table


def _above(sigma: Tensor, threshold: float) -> tuple[int, int, float]:
    return int((sigma > threshold).sum()), 0, threshold


def measure(shape: tuple[int, int], draws: int) -> list[dict[str, object]]:
    strengths = [factor * bbp_threshold(NOISE, shape) for factor in SPIKES]
    null = [torch.linalg.svdvals(gaussian(shape, seed)) for seed in range(draws)]
    spiked = [torch.linalg.svdvals(gaussian(shape, seed) + planted(shape, strengths, 1000 + 2 * seed))
              for seed in range(draws)]
    edge = mp_edges(NOISE, shape)[1]
    rows = []
    for name, rule in rules().items():
        counts = [rule(sigma, shape) for sigma in null]
        found = [rule(sigma, shape)[0] for sigma in spiked]
        total = draws * min(shape)
        rows.append({
            "shape": f"{shape[0]}x{shape[1]}",
            "aspect": round(aspect_of(shape), 3),
            "rule": name,
            "noise_above": sum(count[0] for count in counts) / total,
            "noise_below": sum(count[1] for count in counts) / total,
            "threshold_over_edge": sum(count[2] for count in counts) / draws / edge,
            "spikes_found_mean": sum(found) / draws,
            "spikes_found_min": min(found),
            "spikes_found_max": max(found),
            "spikes_above_bbp": sum(factor > 1 for factor in SPIKES),
        })
    return rows


def markdown(rows: list[dict[str, object]], draws: int) -> str:
    lines = [
        "# Calibration of the random-matrix rules",
        "",
        f"`python experiments/spectra/calibration.py --draws {draws}`: {draws} matrices of i.i.d. Gaussian entries per "
        f"shape (standard deviation {NOISE}, seeds 0 to {draws - 1}).",
        "",
        "*Noise above / below*: share of the singular values of pure noise that the rule puts outside the bulk; it "
        "should be 0.",
        "",
        "*Threshold / edge*: upper threshold over the true Marchenko-Pastur edge; it should be 1 or a little more.",
        "",
        "*Spikes*: the same noise with five planted values at "
        + ", ".join(f"{factor:g}" for factor in SPIKES)
        + " times the BBP threshold, of which the three above 1 can be seen: values found above, mean (least-most).",
        "",
        "`usvt` and `gavish_donoho` are one estimator: the paper behind the first name uses the median of the second. "
        "The hard threshold lies above the edge on purpose: it keeps what lowers the squared error, not all it sees.",
        "",
        "| shape | aspect | rule | noise above | noise below | threshold / edge | spikes found (3) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['aspect']:g} | {row['rule']} | {row['noise_above']:.3%} | "
            f"{row['noise_below']:.3%} | {row['threshold_over_edge']:.3f} | {row['spikes_found_mean']:.1f} "
            f"({row['spikes_found_min']}-{row['spikes_found_max']}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=5, help="matrices per shape")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the tables")
    args = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(shape, args.draws)]
    args.output.mkdir(parents=True, exist_ok=True)
    text = markdown(rows, args.draws)
    (args.output / "calibration.md").write_text(text)
    with open(args.output / "calibration.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(text)


if __name__ == "__main__":
    main()
