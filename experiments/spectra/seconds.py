"""Processor seconds of one row of `harness spectra`: the decomposition, and everything after it.

    OMP_NUM_THREADS=1 python experiments/spectra/seconds.py        # writes seconds.csv beside this file
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import torch

from harness.measurements.spectra.rows import spectrum_of, vectors_of
from harness.spectral.decomposition import decompose

SHAPES = ("1024x1024", "2048x2048", "4096x4096")


def measure(shape: str) -> dict[str, object]:
    out, width = map(int, shape.split("x"))
    weight = 0.02 * torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    times = [time.process_time()]
    decomposition = decompose(weight)
    times.append(time.process_time())
    spectrum_of(weight, decomposition)
    times.append(time.process_time())
    vectors_of(weight, decomposition)
    times.append(time.process_time())
    names = ("decomposition", "values", "vectors")
    seconds = {name: round(after - before, 2) for name, before, after in zip(names, times, times[1:])}
    return {"shape": shape, "threads": torch.get_num_threads(), **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", action="append", help="for example 4096x4096; default: " + ", ".join(SHAPES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("seconds.csv"))
    args = parser.parse_args()
    measure("64x64")  # imports and warms up
    rows = []
    for shape in args.shape or SHAPES:
        rows.append(measure(shape))
        print(rows[-1], flush=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
