"""Write the small tables and the figures of this experiment from the runs that are complete.

    python experiments/base_and_tuned/figures.py OUT FOLDER

Runs that are not complete are named and left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

import harness as sh
from harness.measurements.spectra.change_report import read_changes
from harness.tables.drawing import MARKERS, SERIES_COLOURS, new_figure, save_figure

SPECTRA = ("real", "full", "lora", "doubled")
STUDIES = ("top", "undo", "graft", "lora-top")
REWEIGHTED = ("reweight", "reweight-full")
METRICS = {"sst2": "accuracy", "text": "nll"}
LABELS = {"sst2": "accuracy on 436 sentences of SST-2", "text": "nats per token of TinyStories"}
COMPONENTS = {"largest components": "index", "as many at random": "random",
              "values of the largest, random directions": "rotated"}  # fmt: skip
COLUMNS = ["run", "task", "metric", "region", "n", "value", "stderr", "delta", "delta_stderr", "p_value",
           "energy_removed", "n_removed"]  # fmt: skip


def main(out: Path, folder: Path) -> None:
    for name in SPECTRA:
        if complete(out / f"spectra-{name}"):
            (folder / name).mkdir(exist_ok=True)
            tables = read_changes(out / f"spectra-{name}")
            tables.write_csv(folder / name)
            tables.draw(folder / name)
    if complete(out / "spectra-overlaps"):
        overlaps = pd.DataFrame(read_changes(out / "spectra-overlaps").overlap_summary())
        overlaps.to_csv(folder / "overlaps.csv", index=False, float_format="%.5g")
    rows = [rows_of(out / name) for name in STUDIES if complete(out / name)]
    if rows:
        pd.concat(rows)[COLUMNS].to_csv(folder / "behaviour.csv", index=False, float_format="%.5g")
    found = [reweighted(out / name) for name in REWEIGHTED if complete(out / name)]
    if found:
        pd.concat(found)[COLUMNS].to_csv(folder / "reweight.csv", index=False, float_format="%.5g")
    for name in ("top", "lora-top"):
        if complete(out / name):
            components(rows_of(out / name), folder / f"{name}.png")
    if complete(out / "undo") and complete(out / "graft"):
        tenths(rows_of(out / "undo"), rows_of(out / "graft"), folder / "tenths.png")


def complete(folder: Path) -> bool:
    there = (folder / "manifest.json").exists() and set(sh.open(folder).states.values()) == {"ok"}
    if not there:
        print(f"{folder.name}: not complete, left out")
    return there


def rows_of(folder: Path) -> pd.DataFrame:
    """The rows of one metric for each task, with the baseline first."""
    metrics = sh.open(folder).metrics
    wanted = metrics[metrics["metric"] == metrics["task"].map(METRICS)]
    wanted = wanted.assign(run=folder.name, region=wanted["region"].where(wanted["target"] != "baseline", "unedited"))
    return wanted.drop_duplicates(["task", "region"])


def reweighted(folder: Path) -> pd.DataFrame:
    """The accuracy and the cross-entropy of a study of factors, with the baseline first."""
    metrics = sh.open(folder).metrics
    wanted = metrics[metrics["metric"].isin(["accuracy", "cross_entropy"])]
    return wanted.assign(run=folder.name, region=wanted["region"].where(wanted["target"] != "baseline", "unedited"))


def components(rows: pd.DataFrame, path: Path) -> None:
    """Draw what the base with some components of the change does, against their number: accuracy and nats per token."""
    figure = new_figure(10.4, 4.2)
    for panel, (task, label) in zip(figure.subplots(1, 2), LABELS.items()):
        of_task = rows[rows["task"] == task]
        for i, (name, kind) in enumerate(COMPONENTS.items()):
            found = of_task[of_task["region"].str.startswith(kind)]
            found = found.assign(k=found["region"].map(lambda region: int(re.search(r"0:(\d+)", region).group(1))))
            mean = found.groupby("k").agg({"value": "mean", "stderr": "max"})  # of the seeds of a control
            x = mean.index * (1 + 0.03 * (i - 1))
            panel.errorbar(x, mean["value"], mean["stderr"], label=name, capsize=2, color=SERIES_COLOURS[i],
                           marker=MARKERS[i], markersize=5, linewidth=1.2)
        _lines(panel, of_task, label)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("components of the change of each matrix that are kept")
    save_figure(figure, path)


def tenths(undo: pd.DataFrame, graft: pd.DataFrame, path: Path) -> None:
    """Draw what it does to undo the change in a tenth of the base's directions, and to have it in that tenth alone.

    The random tenths are all draws of the same kind, so that they make one band, from the least to the greatest value.
    """
    figure = new_figure(10.4, 7.6)
    for line, (said, rows, beside) in zip(figure.subplots(2, 2), (
        ("undone in one tenth", undo, "unedited"), ("kept in one tenth alone", graft, "reference"),
    )):  # fmt: skip
        for panel, (task, label) in zip(line, LABELS.items()):
            of_task = rows[rows["task"] == task]
            random = of_task.loc[of_task["region"].str.startswith("rotated"), "value"]
            panel.axhspan(random.min(), random.max(), color=SERIES_COLOURS[1], alpha=0.2, linewidth=0,
                          label=f"{len(random)} random tenths")
            found = of_task[of_task["region"].str.startswith("decile")]
            tenth = found["region"].map(lambda region: int(re.search(r"decile (\d+)", region).group(1)))
            found = found.assign(tenth=tenth).sort_values("tenth")
            panel.plot(found["tenth"], found["value"], label="tenths of the base's directions", color=SERIES_COLOURS[0],
                       marker=MARKERS[0], markersize=5, linewidth=1.2)
            _lines(panel, of_task, label, [beside])
            panel.set_title(f"the change is {said}", fontsize="medium")
            panel.set_xlabel("tenth (1: largest singular values of the base)")
            panel.set_xticks(range(1, 11))
    save_figure(figure, path)


def _lines(panel: Any, of_task: pd.DataFrame, label: str, regions: Sequence[str] = ("unedited", "reference")) -> None:
    for region in regions:
        name, style = {"unedited": ("tuned model", "-"), "reference": ("base", "--")}[region]
        value = of_task.loc[of_task["region"] == region, "value"].item()
        panel.axhline(value, color="0.4", linestyle=style, linewidth=0.9, label=f"{name} ({value:.3f})")
    panel.set_ylabel(label)
    panel.legend(frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
