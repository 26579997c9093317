"""Peak resident memory of `harness spectra` on SmolLM2-135M (GGUF): streamed, drawn at random, and with a covariance.

    python experiments/spectra/peak_memory.py                # writes peak_memory.csv beside this file
    python experiments/spectra/peak_memory.py --case streamed

$HARNESS_ASSETS is the folder of weights and data (../shared). Some minutes per case on two cores.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ["task=text", "tasks.text.window=512", "tasks.text.limit=8"]
# name -> settings besides the model
CASES = {"streamed": ["model.dtype=float32"], "covariance": ["model.dtype=float32", *TEXT],
         "random": ["model.dtype=float32", "init=random"]}


def peak_mib(arguments: list[str], log: Path) -> float:
    """Largest resident set of `harness spectra` with these arguments, in MiB."""
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, "-m", "harness", "spectra", *arguments], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"harness spectra failed:\n{log.read_text()[-2000:]}")
    return usage.ru_maxrss / 1024


def model_mib(assets: Path, dtype: str) -> float:
    """Size of the model's weights in `dtype`."""
    from harness.models.families import skeleton
    from harness.models.loading import TORCH_DTYPES, describe_model
    from harness.models.settings import ModelSettings

    description = describe_model(ModelSettings(name=str(assets / "models"), gguf_file=GGUF))
    n = sum(p.numel() for p in skeleton(description.config, description.family).parameters())
    return n * TORCH_DTYPES[dtype].itemsize / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="one of the cases; default: all")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("peak_memory.csv"))
    args = parser.parse_args()
    assets = Path(os.environ.get("HARNESS_ASSETS", "../shared"))
    rows = []
    for name in args.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            settings = CASES[name]
            arguments = ["model=pretrained", f"model.name={assets / 'models'}", f"model.gguf_file={GGUF}",
                         f"output={folder}/out", *settings]
            if TEXT[0] in settings:
                arguments.append(f"tasks.text.data_files={assets / 'data/tinystories/validation_first_stories.txt'}")
            size = model_mib(assets, settings[0].partition("=")[2])
            peak = peak_mib(arguments, Path(folder) / "log")
        rows.append({"case": name, "model_mib": round(size), "peak_mib": round(peak), "over_mib": round(peak - size)})
        print(rows[-1], flush=True)
        with open(args.output, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
