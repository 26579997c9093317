"""Write the small tables and the figures of this experiment from the runs that are complete.

    python experiments/base_and_tuned/figures.py OUT FOLDER

Runs that are not complete are named and left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

import harness as sh
from harness.measurements.spectra.change_report import read_changes
from harness.tables.drawing import MARKERS, SERIES_COLOURS, new_figure, save_figure

SPECTRA = ("real", "full", "lora", "doubled")
STUDIES = ("top", "undo", "graft", "own", "lora-top")
METRICS = {"sst2": "accuracy", "text": "nll"}
COLUMNS = ["run", "task", "metric", "region", "n", "value", "stderr", "delta", "delta_stderr", "p_value",
           "energy_removed", "n_removed"]  # fmt: skip


def main(out: Path, folder: Path) -> None:
    for name in SPECTRA:
        if complete(out / f"spectra-{name}"):
            (folder / name).mkdir(exist_ok=True)
            tables = read_changes(out / f"spectra-{name}")
            tables.write_csv(folder / name)
            tables.draw(folder / name)
    rows = [rows_of(out / name) for name in STUDIES if complete(out / name)]
    if rows:
        pd.concat(rows)[COLUMNS].to_csv(folder / "behaviour.csv", index=False, float_format="%.5g")
    for name in ("top", "lora-top"):
        if complete(out / name):
            components(rows_of(out / name), folder / f"{name}.png")


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


def components(rows: pd.DataFrame, path: Path) -> None:
    """Draw the accuracy of the base with some components of the change against their number."""
    rows = rows[rows["task"] == "sst2"]
    figure = new_figure(6.4, 4.2)
    panel = figure.subplots()
    series = {"largest components": "index", "as many at random": "random",
              "values of the largest, random directions": "rotated"}
    for i, (label, kind) in enumerate(series.items()):
        found = rows[rows["region"].str.startswith(kind)]
        k = found["region"].map(lambda region: int(re.search(r"0:(\d+)", region).group(1)))
        found = found.assign(k=k).sort_values("k")
        panel.errorbar(found["k"] * (1 + 0.03 * (i - 1)), found["value"], found["stderr"], label=label, capsize=2,
                       color=SERIES_COLOURS[i], marker=MARKERS[i], markersize=5, linewidth=1.2)
    for region, style in (("unedited", "-"), ("reference", "--")):
        value = rows.loc[rows["region"] == region, "value"].item()
        name = "tuned model" if region == "unedited" else "base"
        panel.axhline(value, color="0.4", linestyle=style, linewidth=0.9, label=f"{name} ({value:.3f})")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("components of the change of each matrix that are kept")
    panel.set_ylabel("accuracy on 436 sentences of SST-2")
    panel.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
