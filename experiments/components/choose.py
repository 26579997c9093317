"""Print the names of components to measure, for region.names: those with the largest predictions, and random ones.

    python experiments/components/choose.py COMPONENTS TASK --most 100 --of-matrix 0 --random 50 [--seed 0]

COMPONENTS: the folder of `harness components`. TASK: a task that it derived, or "calibration text". --most: so many of
the whole model that are predicted to help most, and as many that are predicted to harm most. --of-matrix: the same for
every matrix. --random: so many further ones, drawn with equal chances from all components.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from harness.measurements.components import summary


def chosen(predictions: pd.DataFrame, most: int, of_matrix: int, random: int, seed: int) -> list[str]:
    """Return the names without repetition: those by the prediction, then the random ones."""
    ordered = predictions.sort_values("predicted_improvement", ascending=False, kind="stable")
    parts = [ordered.head(most), ordered.iloc[::-1].head(most)]
    for _, one in ordered.groupby("matrix", sort=False):
        parts += [one.head(of_matrix), one.iloc[::-1].head(of_matrix)]
    parts.append(drawn(predictions, random, seed))
    whole = pd.concat(parts).drop_duplicates(["matrix", "index"])
    return [f"{row.matrix}:{row.index_}" for row in whole.rename(columns={"index": "index_"}).itertuples()]


def drawn(predictions: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Return the rows of n components that are drawn with equal chances. predictions: all of one task, in order."""
    return predictions.iloc[np.random.default_rng(seed).permutation(len(predictions))[:n]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("components", type=Path)
    parser.add_argument("task")
    for name in ("most", "of-matrix", "random", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    asked = parser.parse_args()
    predictions = summary.predicted(asked.components)
    of_task = predictions[predictions["task"] == asked.task].reset_index(drop=True)
    print(f"[{','.join(chosen(of_task, asked.most, asked.of_matrix, asked.random, asked.seed))}]")


if __name__ == "__main__":
    main()
