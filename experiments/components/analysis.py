"""Tables and the figure of experiments/components, from the tables of its runs.

    python experiments/components/analysis.py COMPONENTS EXACT OUT [--mean STUDY] [--activations STUDY]

COMPONENTS: the folder of `harness components`. EXACT: a study of region=component region.all=true. --mean: a study of
some of them with region.replace=mean. --activations: a study of region=component region.all=true in the metric of the
activations. OUT: where the CSV files and components.png are written.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from harness.measurements.ablation.tables import read_metrics
from harness.measurements.components import summary
from harness.measurements.components.tables import read_components
from harness.tables.drawing import new_figure, save_figure

COMMITTED = ["task", "matrix", "index", "improvement", "p_value", "predicted_improvement", "sigma", "output_rms",
             "output_rank", "constant_share", "mean_cosine", "stability_rounded"]  # columns of components.csv
METRICS = {"text": "nll", "ioi": "logit_difference", "factual": "logprob"}  # the metric of each task that is looked at


def half(effects: np.ndarray) -> np.ndarray:
    """Return the positions, int64 [k], of the fewest components whose |effects| sum to half of the sum of all."""
    order = np.argsort(-np.abs(effects), kind="stable")
    share = np.abs(effects)[order].cumsum()
    return order[: int((share < 0.5 * share[-1]).sum()) + 1]


def rank_correlation(one: pd.Series, other: pd.Series) -> float:
    """Return Spearman's correlation, NaN where one is constant or there are fewer than three."""
    if len(one) < 3 or one.nunique() < 2 or other.nunique() < 2:
        return math.nan
    return float(spearmanr(one, other).statistic)


def joined(components: pd.DataFrame, predictions: pd.DataFrame, exact: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each component and task that was measured: what it is, its prediction, and its effect."""
    chosen = exact[[METRICS.get(task) == metric for task, metric in zip(exact["task"], exact["metric"])]]
    rows = summary.compared(predictions, chosen)
    names = ["matrix", "index", "layer_type", "block", "sigma", "energy", "output_rms", "output_rank",
             "constant_share", "mean_cosine", "leading_share", "stability_rounded"]
    rows = rows.drop(columns=["output_constant_share", "cell_id"]).merge(components[names], on=["matrix", "index"])
    return rows.sort_values(["task", "block", "layer_type", "index"], kind="stable")


def by_matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each matrix and task: how many components carry half of its effect, and where they are.

    at: the median position of those components as a share of the rank, by singular value and by the size of the output.
    with_...: the rank correlation of |effect| with a column.
    """
    found = []
    for (task, matrix), one in rows.groupby(["task", "matrix"], sort=False):
        carrying = one.iloc[half(one["improvement"].to_numpy())]
        size = one["improvement"].abs()
        found.append({
            "task": task, "matrix": matrix, "n": len(one), "half": len(carrying),
            "at_sigma": carrying["index"].median() / len(one), "at_output": carrying["output_rank"].median() / len(one),
            "in_smallest_tenth": int((carrying["index"] >= 0.9 * len(one)).sum()),
            "with_sigma": rank_correlation(size, one["sigma"]),
            "with_output": rank_correlation(size, one["output_rms"]),
            "with_constant_share": rank_correlation(size, one["constant_share"]),
            "first_order": rank_correlation(one["predicted_improvement"], one["improvement"]),
        })  # fmt: skip
    return pd.DataFrame(found)


def first_order(rows: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each task and prediction: how well it ranks all components together.

    The predictions are those of the task's own examples, and for the text's loss also those of the calibration text.
    """
    of_text = predictions[predictions["task"] == summary.TEXT][["matrix", "index", "predicted_improvement"]]
    found = []
    for task, one in rows.groupby("task", sort=False):
        found.append({"task": task, "derived on": "the same examples", **summary.agreement(one)})
        if task == "text":
            other = one.drop(columns="predicted_improvement").merge(of_text, on=["matrix", "index"])
            found.append({"task": task, "derived on": summary.TEXT, **summary.agreement(other)})
    return pd.DataFrame(found)


def replaced_by_mean(rows: pd.DataFrame, study: Path) -> pd.DataFrame:
    """Return the effects of components that are removed and those of the same ones that are replaced by their mean."""
    metrics = read_metrics(study)
    metrics = metrics[(metrics["status"] == "ok") & metrics["component"].notna() & (metrics["region_by"] == "component")
                      & (metrics["region_replace"] == "mean")]
    metrics = metrics[[METRICS.get(task) == metric for task, metric in zip(metrics["task"], metrics["metric"])]]
    sign = metrics["higher_is_better"].map({True: 1.0, False: -1.0})
    place = metrics["component"].str.rpartition(":")
    metrics = metrics.assign(matrix=place[0], index=place[2].astype(int), improvement_mean=metrics["delta"] * sign)
    return rows.merge(metrics[["matrix", "index", "task", "improvement_mean"]], on=["matrix", "index", "task"])


def what_is_left(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return for each task what is left of the effect: sum |effect of the mean| / sum |effect of the removal|.

    constant: for components whose output is at least half constant; varying: for the others.
    """
    found = []
    for task, one in pairs.groupby("task", sort=False):
        row: dict[str, object] = {"task": task, "n": len(one)}
        constant = one["constant_share"] >= 0.5
        for name, part in (("all", one), ("constant", one[constant]), ("varying", one[~constant])):
            whole = part["improvement"].abs().sum()
            left = part["improvement_mean"].abs().sum() / whole if whole else math.nan
            row |= {f"n_{name}": len(part), f"left_{name}": left}
        found.append(row)
    return pd.DataFrame(found)


def draw(rows: pd.DataFrame, pairs: pd.DataFrame | None, path: Path) -> None:
    """Draw |effect| over the spectrum and over the size of the output, first order, and removal beside mean."""
    figure = new_figure(11.0, 8.0)
    axes = figure.subplots(2, 2).ravel()
    text = rows[rows["task"] == "text"]
    for colour, (matrix, one) in zip(("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f"), text.groupby("matrix", sort=False)):
        size = one["improvement"].abs()
        axes[0].semilogy(one["index"], size, ".", color=colour, markersize=4, label=matrix)
        axes[1].loglog(one["output_rms"], size, ".", color=colour, markersize=4, label=matrix)
    axes[0].set_xlabel("position in the spectrum, 0 = the largest value")
    axes[1].set_xlabel("root mean square of the component's output")
    for panel in axes[:2]:
        panel.set_ylabel("|change of the text's loss| (nats per token)")
    axes[1].legend(frameon=False, fontsize="small")
    limit = float(text[["predicted_improvement", "improvement"]].abs().to_numpy().max())
    axes[2].plot(text["predicted_improvement"], text["improvement"], ".", color="#444444", markersize=3)
    axes[2].plot([-limit, limit], [-limit, limit], "--", color="0.6", linewidth=0.8)
    for axis, scale in ((axes[2].xaxis, axes[2].set_xscale), (axes[2].yaxis, axes[2].set_yscale)):
        scale("symlog", linthresh=1e-3)
        axis.set_ticks([-0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1])
    axes[2].set_xlabel("first-order prediction of the improvement, same text (nats per token)")
    axes[2].set_ylabel("measured improvement (nats per token)")
    if pairs is not None and len(pairs):
        shown = pairs[pairs["task"] == "text"]
        points = axes[3].scatter(shown["improvement"].abs(), shown["improvement_mean"].abs(),
                                 c=shown["constant_share"], cmap="viridis", s=10, vmin=0, vmax=1)
        low, high = (function(shown[["improvement", "improvement_mean"]].abs().to_numpy().ravel())
                     for function in (np.min, np.max))
        axes[3].plot([low, high], [low, high], "--", color="0.6", linewidth=0.8)
        axes[3].set_xscale("log")
        axes[3].set_yscale("log")
        axes[3].set_xlabel("|effect| of the removal (nats per token)")
        axes[3].set_ylabel("|effect| if replaced by its mean")
        figure.colorbar(points, ax=axes[3], label="share of the mean in the output")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("components", type=Path)
    parser.add_argument("exact", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mean", type=Path)
    parser.add_argument("--activations", type=Path)
    asked = parser.parse_args()
    components, predictions = read_components(asked.components), summary.predicted(asked.components)
    rows = joined(components, predictions, summary.exact(str(asked.exact), asked.components))
    asked.out.mkdir(parents=True, exist_ok=True)
    tables = {"components": rows, "matrices": by_matrix(rows), "first-order": first_order(rows, predictions)}
    pairs = None
    if asked.mean is not None:
        pairs = replaced_by_mean(rows, asked.mean)
        tables |= {"mean": what_is_left(pairs)}
    if asked.activations is not None:
        tables |= {"activations": activations(asked.activations)}
    tables["components"] = rows[COMMITTED]
    for name, table in tables.items():
        table.to_csv(asked.out / f"{name}.csv", index=False, float_format="%.4g")
        if name != "components":
            print(table.to_string(index=False), "\n")
    draw(rows, pairs, asked.out / "components.png")


def activations(study: Path) -> pd.DataFrame:
    """Return where the components with half of the effect are in the metric of the activations, by matrix and task."""
    metrics = read_metrics(study)
    metrics = metrics[(metrics["status"] == "ok") & metrics["component"].notna()
                      & (metrics["region_metric"] == "activations")]
    metrics = metrics[[METRICS.get(task) == metric for task, metric in zip(metrics["task"], metrics["metric"])]]
    metrics = metrics.assign(index=metrics["component"].str.rpartition(":")[2].astype(int))
    found = []
    for (task, matrix), one in metrics.groupby(["task", "target"], sort=False):
        carrying = one.iloc[half(one["delta"].to_numpy())]
        found.append({"task": task, "matrix": matrix, "n": len(one), "half": len(carrying),
                      "at": carrying["index"].median() / len(one),
                      "with_sigma": rank_correlation(one["delta"].abs(), one["sigma_max_removed"])})
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()
