"""Tables and the figure of whole models: every component to first order, and some of them measured.

    python experiments/components/whole.py COMPONENTS OUT NAME --exact STUDY [STUDY ...] [--mean STUDY ...] --random N

COMPONENTS: the folder of `harness components`. OUT: where the CSV files and the figure are written, with NAME in their
names. --exact: studies of region=named region.each=true. --mean: the same with region.replace=mean. --random: how many
of the measured components choose.py has drawn for each task, with the seed 0.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from analysis import METRICS, half, joined, rank_correlation, replaced_by_mean, what_is_left
from choose import drawn

from harness.measurements.components import summary
from harness.measurements.components.tables import read_components
from harness.tables.drawing import new_figure, save_figure

TASKS = {**METRICS, summary.TEXT: "loss"}
COMMITTED = ["task", "matrix", "index", "random", "improvement", "delta_stderr", "p_value", "predicted_improvement",
             "sigma", "output_rms", "output_rank", "constant_share", "mean_cosine"]  # of the measured components


def by_matrix(components: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each matrix and task: how many components carry half of its predicted |effects|, and where.

    at: the median position of those components as a share of the rank, by singular value and by the size of the output.
    with_...: the rank correlation of |prediction| with a column.
    """
    names = ["matrix", "index", "layer_type", "block", "output_rms", "output_rank", "constant_share"]
    rows = predictions.merge(components[names], on=["matrix", "index"])
    found = []
    for (task, matrix), one in rows.groupby(["task", "matrix"], sort=False):
        one = one.sort_values("index", kind="stable")
        carrying, size = one.iloc[half(one["predicted_improvement"].to_numpy())], one["predicted_improvement"].abs()
        best, worst = (one.iloc[int(f(one["predicted_improvement"].to_numpy()))] for f in (np.argmax, np.argmin))
        found.append({
            "task": task, "matrix": matrix, "layer_type": one["layer_type"].iloc[0], "n": len(one),
            "half": len(carrying), "sum": size.sum(),
            "at_sigma": carrying["index"].median() / len(one), "at_output": carrying["output_rank"].median() / len(one),
            "in_smallest_tenth": size[one["index"] >= 0.9 * len(one)].sum() / size.sum(),
            "in_largest_tenth": size[one["index"] < 0.1 * len(one)].sum() / size.sum(),
            "with_output": rank_correlation(size, one["output_rms"]),
            "with_constant_share": rank_correlation(size, one["constant_share"]),
            "gain": best["predicted_improvement"], "gain_index": best["index"],
            "harm": worst["predicted_improvement"], "harm_index": worst["index"],
        })  # fmt: skip
    return pd.DataFrame(found)


def by_layer_type(matrices: pd.DataFrame) -> pd.DataFrame:
    """Return the medians over the matrices of each layer type, and of all."""
    columns = ["half", "at_sigma", "at_output", "in_smallest_tenth", "in_largest_tenth", "with_output",
               "with_constant_share"]
    matrices = matrices.assign(share=matrices["half"] / matrices["n"])
    groups = [*matrices.groupby(["task", "layer_type"], sort=False),
              *(((task, "all"), one) for task, one in matrices.groupby("task", sort=False))]
    return pd.DataFrame([{"task": task, "layer_type": kind, "matrices": len(one), "n": one["n"].median(),
                          "share": one["share"].median(), **one[columns].median().to_dict()}
                         for (task, kind), one in groups])


def concentrated(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return for each task in how many components of the whole model half of the predicted |effects| are."""
    found = []
    for task, one in predictions.groupby("task", sort=False):
        values = one["predicted_improvement"].to_numpy()
        carrying = one.iloc[half(values)]
        found.append({"task": task, "n": len(one), "half": len(carrying),
                      "largest_hundred": np.sort(np.abs(values))[::-1][:100].sum() / np.abs(values).sum(),
                      "matrices_of_the_hundred": one.iloc[np.argsort(-np.abs(values))[:100]]["matrix"].nunique()})
    return pd.DataFrame(found)


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each task how well first order ranks what was measured: for the random components, and for the others.

    median: of |improvement|. significant: components with p below 0.05 after the correction of Holm. sign: the share
    whose sign was predicted. too_hopeful: the share whose improvement is below the prediction. with_output,
    with_constant_share: rank correlations of |improvement|.
    """
    found = []
    for (task, random), one in rows.groupby(["task", "random"], sort=False):
        size, ten, p = one["improvement"].abs(), summary.agreement(one), np.sort(one["p_value"])
        holm = np.maximum.accumulate(p * np.arange(len(one), 0, -1))
        found.append({"task": task, "components": "random" if random else "largest predictions", "n": len(one),
                      "median": size.median(), "significant": int((holm < 0.05).sum()),
                      "first_order": ten["spearman"], "of_ten_best": ten["found_best"],
                      "of_ten_worst": ten["found_worst"],
                      "sign": float((np.sign(one["improvement"]) == np.sign(one["predicted_improvement"])).mean()),
                      "too_hopeful": float((one["improvement"] < one["predicted_improvement"]).mean()),
                      "with_output": rank_correlation(size, one["output_rms"]),
                      "with_constant_share": rank_correlation(size, one["constant_share"])})
    return pd.DataFrame(found)


def bent(panel: Any, values: np.ndarray, sides: str) -> None:
    """Put axes of a panel on a scale that is linear about zero, up to the power of ten below the median size."""
    sizes = np.abs(values[values != 0])
    first, last = math.floor(math.log10(np.median(sizes))), math.ceil(math.log10(sizes.max()))
    ticks = [10.0**k for k in range(first, last + 1)]
    for side in sides:
        getattr(panel, f"set_{side}scale")("symlog", linthresh=ticks[0])
        shown = ticks[::-2][::-1]  # every second, with the largest
        getattr(panel, f"set_{side}ticks")([*(-tick for tick in shown[::-1]), 0, *shown])


def draw(rows: pd.DataFrame, pairs: pd.DataFrame, path: Path) -> None:
    """Draw first order beside the measurement, and |effect| over the size of the output, for each task; and removal
    beside replacement by the mean for all."""
    tasks = list(dict.fromkeys(rows["task"]))
    figure = new_figure(4.6 * (len(tasks) + 1), 7.8)
    axes = figure.subplots(2, len(tasks) + 1, squeeze=False)
    for (upper, lower), task in zip(axes[:, : len(tasks)].T, tasks):
        one = rows[rows["task"] == task]
        both = one[["predicted_improvement", "improvement"]].to_numpy()
        limit = float(np.abs(both).max())
        upper.plot([-limit, limit], [-limit, limit], "--", color="0.6", linewidth=0.8)
        for random, marker in ((False, "o"), (True, "x")):
            part = one[one["random"] == random]
            colours = {"c": part["constant_share"], "cmap": "viridis", "vmin": 0, "vmax": 1}
            upper.scatter(part["predicted_improvement"], part["improvement"], s=12, marker=marker, **colours)
            points = lower.scatter(part["output_rms"], part["improvement"].abs().clip(lower=1e-5), s=12, marker=marker,
                                   label="random" if random else "largest predictions", **colours)
        bent(upper, both, "xy")
        upper.set_title(f"{task}: {TASKS[task]}", fontsize="medium")
        upper.set_xlabel("first-order prediction of the improvement")
        upper.set_ylabel("measured improvement")
        lower.set_xscale("log")
        lower.set_yscale("log")
        lower.set_xlabel("root mean square of the component's output")
        lower.set_ylabel("|measured improvement|")
        lower.legend(frameon=False, fontsize="small")
    upper, lower = axes[:, -1]
    for task, colour in zip(tasks, ("#1b6ca8", "#d1495b", "#66a182")):
        one = pairs[pairs["task"] == task]
        upper.plot(one["improvement"], one["improvement_mean"], ".", color=colour, label=task)
        left = one["improvement_mean"].abs() / one["improvement"].abs()
        lower.plot(one["constant_share"], left.clip(upper=2), ".", color=colour, label=task)
    both = pairs[["improvement", "improvement_mean"]].to_numpy()
    limit = float(np.abs(both).max())
    upper.plot([-limit, limit], [-limit, limit], "--", color="0.6", linewidth=0.8)
    bent(upper, both, "xy")
    upper.set_xlabel("improvement by the removal")
    upper.set_ylabel("improvement if replaced by the mean")
    upper.set_title("zero or mean", fontsize="medium")
    upper.legend(frameon=False, fontsize="small")
    lower.axhline(1, color="0.6", linestyle="--", linewidth=0.8)
    lower.set_xlabel("share of the mean in the output")
    lower.set_ylabel("|effect of the mean| / |effect of the removal|")
    figure.colorbar(points, ax=axes.ravel().tolist(), label="share of the mean in the output", shrink=0.6)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("components", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--exact", type=Path, nargs="+", required=True)
    parser.add_argument("--mean", type=Path, nargs="*", default=[])
    parser.add_argument("--random", type=int, default=0)
    asked = parser.parse_args()
    components, predictions = read_components(asked.components), summary.predicted(asked.components)
    exact = pd.concat([summary.exact(str(study), asked.components) for study in asked.exact])
    exact = exact[[TASKS.get(task) == metric for task, metric in zip(exact["task"], exact["metric"])]]
    rows = joined(components, predictions, exact)
    fair = [drawn(predictions[predictions["task"] == task].reset_index(drop=True), asked.random, 0).assign(random=True)
            for task in dict.fromkeys(rows["task"])]
    fair_rows = pd.concat(fair)[["task", "matrix", "index", "random"]]
    rows = rows.merge(fair_rows, on=["task", "matrix", "index"], how="left")
    rows["random"] = rows["random"].fillna(False).astype(bool)
    matrices = by_matrix(components, predictions)
    pairs = pd.concat([replaced_by_mean(rows, study) for study in asked.mean]) if asked.mean else rows.iloc[:0]
    tables = {"atlas": matrices, "layer-types": by_layer_type(matrices), "concentrated": concentrated(predictions),
              "first-order": agreement(rows)}
    if len(pairs):
        tables["mean"] = what_is_left(pairs)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(asked.out / f"{asked.name}-{name}.csv", index=False, float_format="%.4g")
        if name != "atlas":
            print(table.to_string(index=False, float_format="%.3g"), "\n")
    measured = rows[COMMITTED]
    if len(pairs):
        measured = measured.merge(pairs[["task", "matrix", "index", "improvement_mean"]],
                                  on=["task", "matrix", "index"], how="left")
    measured.to_csv(asked.out / f"{asked.name}-measured.csv", index=False, float_format="%.4g")
    if len(pairs):
        draw(rows, pairs, asked.out / f"{asked.name}.png")


if __name__ == "__main__":
    main()
