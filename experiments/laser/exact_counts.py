"""The exact p-values and intervals of the published changes of accuracies, from their deltas and intervals alone.

    python experiments/laser/exact_counts.py    # writes exact-counts.csv beside this file

The verdicts were published with Student's t. The variance behind an interval of Student's t says how many answers
changed: the sum of the squared changes is (n - 1) n stderr^2 + n delta^2, which must be a whole number, and the delta
says how many more were gained than lost. Rows whose examples are in clusters now (BLiMP) are left out.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas
from scipy.stats import t

from harness.evaluation.counts import mcnemar_interval, sign_flip_p

HERE = Path(__file__).parent
SHOWN = ("task", "n", "delta", "p_value", "delta_low", "delta_high", "verdict")


def exact(row: dict[str, float]) -> dict[str, float]:
    n, delta = int(row["n"]), row["delta"]
    stderr = (row["delta_high"] - row["delta_low"]) / 2 / t.ppf(0.975, n - 1)
    changed, more = (n - 1) * n * stderr**2 + n * delta**2, n * delta
    # six digits of the published interval leave less than this of an answer
    assert abs(changed - round(changed)) < 0.02 and abs(more - round(more)) < 0.01, (changed, more)
    gained, lost = (round(changed) + round(more)) // 2, (round(changed) - round(more)) // 2
    low, high = mcnemar_interval(gained, lost, n, 0.95)
    p = sign_flip_p(np.concatenate([np.ones(gained), -np.ones(lost)]))
    return {"gained": gained, "lost": lost, "exact_p": p, "exact_low": low, "exact_high": high}


def main() -> None:
    rows = []
    for path in sorted(HERE.glob("*-verdict.csv")):
        for row in pandas.read_csv(path).to_dict("records"):
            if row["metric"] == "accuracy" and row["task"] != "blimp":
                shown = {key: row[key] for key in SHOWN}
                rows.append({"verdict_of": path.stem, **shown, **exact(row)})
    with open(HERE / "exact-counts.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
