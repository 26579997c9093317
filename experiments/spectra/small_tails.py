"""The exponent of a power law from few singular values: our rule, the rule for large samples, and WeightWatcher's.

    python experiments/spectra/small_tails.py

Draws samples of a Pareto law with a known alpha and prints the bias and the root mean square error of each rule. Takes
about a minute. WeightWatcher's rule is written out anew from `fit_powerlaw_smallN` of its version 0.7.7: at least 8
values, alpha = 1 + (n - 1) / S, and the tail of the least distance - 0.868 / sqrt(n).
"""

from __future__ import annotations

import numpy as np
import torch

from harness.spectral.statistics import _tail_fits, power_law

DRAWS = 1500


def ours(x: np.ndarray) -> float:
    """The rule of harness.spectral.statistics.power_law."""
    return power_law(torch.from_numpy(x).sqrt())[0]


def large_sample(x: np.ndarray) -> float:
    """The rule for large samples, in which a tail may have two values."""
    values = torch.from_numpy(np.sort(x))
    positions = torch.arange(len(x))
    distances, exponents = _tail_fits(values, positions, positions[:-1], lost=0)
    return 1 + float(exponents[distances.argmin()])


def weightwatcher(x: np.ndarray) -> float:
    """WeightWatcher's rule for fewer than 20 values."""
    x = np.sort(x)
    logs, best = np.log(x), (np.inf, np.nan)
    for start in range(max(1, len(x) - 7)):
        n = len(x) - start
        alpha = 1 + (n - 1) / (logs[start:] - logs[start]).sum()
        distance = np.abs(1 - (x[start:] / x[start]) ** (1 - alpha) - np.arange(n) / n).max()
        best = min(best, (distance - 0.868 / np.sqrt(n), alpha))
    return best[1]


def main() -> None:
    print("| values | true alpha | ours: bias, error | WeightWatcher: bias, error | large samples: bias, error |")
    print("|--:|--:|--:|--:|--:|")
    for n in (8, 10, 15, 19):
        for alpha in (2, 3, 5):
            generator = np.random.default_rng(1)
            samples = [generator.random(n) ** (-1 / (alpha - 1)) for _ in range(DRAWS)]
            cells = []
            for rule in (ours, weightwatcher, large_sample):
                errors = np.array([rule(x) for x in samples]) - alpha
                cells.append(f"{errors.mean():.2f}, {np.sqrt((errors**2).mean()):.2f}")
            print(f"| {n} | {alpha} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
