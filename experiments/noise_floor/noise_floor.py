"""The noise in the delta of each ablation, measured against float32, beside the noise floor that a study reports.

The noise of an ablation is its delta in low precision minus its delta in float32 of the same weights, which are first
rounded to the low precision. Arguments: a folder of the model, a text file, a folder for results, and the dtype.
Example: python -m experiments.noise_floor.noise_floor stories260K stories.txt results/noise bfloat16
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from harness.engine.run import RunOptions, run
from harness.measurements import ABLATION, compose_settings
from harness.measurements.ablation.summary import MeasuredMetric, measured
from harness.measurements.ablation.tables import read_metrics


def rounded_copy(model: Path, folder: Path, dtype: str) -> Path:
    """Save the model in float32 with weights that `dtype` holds exactly."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    module.save_pretrained(folder)
    for path in model.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    return folder


def study(model: Path, text: Path, folder: Path, dtype: str) -> list[MeasuredMetric]:
    """Measure ablations that cut both ends of the spectrum of every matrix."""
    settings = compose_settings("ablation", [
        "model=pretrained", f"model.name={model}", f"model.dtype={dtype}", "task=text", f"tasks.text.data_files={text}",
        "tasks.text.window=64", "region.kinds=[large,small]", "region.values=[0.02,0.1]", "runtime.edit=branch",
        f"output={folder}",
    ])
    return measured(read_metrics(run(ABLATION, settings, RunOptions(progress=False)).folder))


def main(model: str, text: str, results: str, dtype: str) -> None:
    """Print for each metric the floor, and the shares of ablations whose noise is below it."""
    folder = Path(results)
    rounded = rounded_copy(Path(model), folder / "rounded", dtype)
    low, full = (study(rounded, Path(text), folder / one, one) for one in (dtype, "float32"))
    print("metric  floor  ablations  noise below it  small deltas  noise below it")
    for one, reference in zip(low, full):
        floor = one.noise_floor
        assert floor is not None
        deltas, exact = (each.cells.set_index(["target", "region"])["delta"] for each in (one, reference))
        below, small = (deltas - exact).abs() < floor, exact.abs() < floor
        print(f"{one.metric}  {floor:.3g}  {len(below)}  {below.mean():.0%}  {small.sum()}  {below[small].mean():.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
