"""The figure of README.md, from the committed tables of experiments/recall and experiments/laser.

    python experiments/main_result.py        # writes experiments/main_result.png
"""

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy.stats import t as student

HERE = Path(__file__).parent
CONTROLS = {
    "random": "as many random values",
    "random_disjoint": "as many random other values",
    "energy_matched": "random values of as much energy",
    "energy_matched_disjoint": "random other values of as much energy",
}
SEARCHES = {
    "600 facts": ("smollm2-full-verdict.csv", "factual"),
    "500 Wikidata questions": ("smollm2-qa_wikidata-verdict.csv", "qa_wikidata"),
}
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"


def recall(axis: plt.Axes) -> None:
    """Clean accuracy of the two-layer transformer against noise, whole and without the last feed-forward layer."""
    rows = pd.read_csv(HERE / "recall" / "summary.csv", keep_default_na=False, na_values=[""])
    rows = rows[(rows.feed_forward == "mlp") & (rows.n_triggers == 1) & (rows.step == 400)]
    whole = rows[rows.matrix == "none"].sort_values("noise")
    removed = rows[(rows.matrix == "1.up_proj") & (rows["rank"] == 0)].sort_values("noise")
    for found, colour, marker, label in ((whole, GREY, "s", "whole model"),
                                         (removed, BLUE, "o", "last feed-forward\nlayer removed")):
        axis.errorbar(found.noise, found.accuracy_clean_mean, found.accuracy_clean_std, color=colour, marker=marker,
                      capsize=3, label=label)
    axis.set(xlabel="share of noise in the training text", ylabel="accuracy of recall", ylim=(-0.03, 1.03),
             xticks=list(whole.noise))
    axis.set_title("Two-layer transformer\nmean and standard deviation of 5 seeds", fontsize=9)
    axis.legend(fontsize=8, loc="lower left", frameon=False, bbox_to_anchor=(0, 0.12))


def search(axis: plt.Axes, title: str, row: pd.Series) -> None:
    """The best cell of a search on fresh examples, beside where a new draw of each control falls in 95 % of cases."""
    axis.errorbar(100 * row.delta, 0, xerr=[[100 * (row.delta - row.delta_low)], [100 * (row.delta_high - row.delta)]],
                  color=ORANGE, marker="o", capsize=3)
    for place, name in enumerate(CONTROLS, start=1):
        draws = row[f"{name}_draws"]
        reach = student.ppf(0.975, draws - 1) * row[f"{name}_spread"] * (1 + 1 / draws) ** 0.5
        axis.errorbar(100 * row[f"{name}_delta"], place, xerr=100 * reach, color=GREY, marker="s", capsize=3)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(yticks=range(5), yticklabels=["best of the search", *CONTROLS.values()], ylim=(4.6, -0.6),
             xlabel="change of accuracy, percentage points")
    axis.set_title(f"SmolLM2-135M, {title}\nverdict: {row.verdict}", fontsize=9)


def draw() -> Figure:
    """Draw the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    recall(axes[0])
    for axis, (title, (file, task)) in zip(axes[1:], SEARCHES.items()):
        rows = pd.read_csv(HERE / "laser" / file)
        search(axis, title, rows[(rows.task == task) & (rows.metric == "accuracy")].iloc[0])
    axes[2].set_yticklabels([])
    axes[2].sharex(axes[1])
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "main_result.png", dpi=110)
