"""The figures of the experiment, from its tables alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.tables.drawing import MARKERS, SERIES_COLOURS, new_figure, save_figure
from harness.tables.text import LAYER_ORDER

NULL = {"color": "0.35", "linestyle": "--", "linewidth": 1.0}


def training_figure(rows: pd.DataFrame, path: Path, k: int = 5) -> None:
    """Coupling, line-shape score and loss over training, and coupling against loss; one line for each seed."""
    figure = new_figure(11.5, 7.4)
    axes = figure.subplots(2, 2)
    rows = rows[rows["k"] == k]
    for i, (seed, of_seed) in enumerate(rows.groupby("seed")):
        style = {"color": SERIES_COLOURS[i], "marker": MARKERS[i], "markersize": 4, "linewidth": 1.2}
        for pairs, line in (("all", "-"), ("neighbours", ":")):
            one = of_seed[of_seed["pairs"] == pairs].sort_values("step")
            axes[0, 0].errorbar(one["step"] + 1, one["coupling"], one["coupling_stderr"], **style, linestyle=line,
                                capsize=2, label=f"seed {seed}, {pairs}")
        one = of_seed[of_seed["pairs"] == "all"].sort_values("step")
        axes[0, 1].errorbar(one["step"] + 1, one["lss"], one["lss_stderr"], **style, capsize=2, label=f"seed {seed}")
        axes[1, 0].plot(one["step"] + 1, one["nll"], **style, label=f"seed {seed}")
        axes[1, 1].plot(one["nll"], one["coupling"], **style, label=f"seed {seed}")
    axes[0, 0].axhline(0, **NULL, label="unrelated vectors")
    axes[1, 1].axhline(0, **NULL, label="unrelated vectors")
    axes[0, 1].axhline(rows["lss_null"].iloc[0], **NULL, label="random directions, sqrt(L)")
    for panel in axes.flat[:3]:
        panel.set_xscale("log")
        panel.set_xlabel("training steps + 1", fontsize="small")
    axes[1, 1].invert_xaxis()
    axes[1, 1].set_xlabel("validation loss in nats per token, falling to the right", fontsize="small")
    titles = (f"coupling, K = {k}", "line-shape score (1 = straight)", "validation loss, nats per token",
              f"coupling of all pairs against the loss, K = {k}")
    for panel, title in zip(axes.flat, titles):
        panel.set_title(title, fontsize="medium")
        panel.legend(frameon=False, fontsize="x-small")
        panel.grid(color="0.93", linewidth=0.8)
    save_figure(figure, path)


def ablation_figure(rows: pd.DataFrame, path: Path) -> None:
    """What each removal does to coupling, beside what it does to the loss."""
    rows = rows[rows["pairs"] == "all"]
    types = [name for name in LAYER_ORDER if name in set(rows["layer_type"])]
    figure = new_figure(10.5, 4.4)
    left, middle, right = figure.subplots(1, 3)
    for i, (region, of_region) in enumerate(rows.groupby("region", sort=False)):
        one = of_region.set_index("layer_type").reindex(types)
        places = [y + 0.16 * (2 * i - 1) for y in range(len(types))]
        style = {"color": SERIES_COLOURS[i], "marker": MARKERS[i], "markersize": 5, "linestyle": "none", "capsize": 2}
        left.errorbar(one["coupling_delta"], places, xerr=one["coupling_delta_stderr"], **style, label=region)
        middle.errorbar(one["nll_delta"], places, xerr=one["nll_delta_stderr"], **style, label=region)
        right.errorbar(one["nll_delta"], one["coupling_delta"], xerr=one["nll_delta_stderr"],
                       yerr=one["coupling_delta_stderr"], **style, label=region)
        if region.startswith("large"):
            for name, row in one.iterrows():
                right.annotate(name, (row["nll_delta"], row["coupling_delta"]), fontsize=6, xytext=(4, 3),
                               textcoords="offset points")
    for panel, title in ((left, "change of coupling, all pairs"), (middle, "change of the loss, nats per token")):
        panel.set_yticks(range(len(types)), types, fontsize="small")
        panel.invert_yaxis()
        panel.axvline(0, **NULL)
        panel.set_title(title, fontsize="medium")
    right.axhline(0, **NULL)
    right.set_title("coupling against the loss", fontsize="medium")
    for panel in (middle, right):
        panel.set_xscale("symlog", linthresh=0.01)
        panel.set_xlim(-0.01, 4 * rows["nll_delta"].max())
    left.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def trial_figure(rows: pd.DataFrame, path: Path) -> None:
    """Raw values beside calibrated ones: trained weights and each draw of random ones, for every model and K."""
    rows = rows[rows["pairs"] == "all"]
    names = list(dict.fromkeys(zip(rows["model"], rows["k"])))
    figure = new_figure(10.0, 1.4 + 0.4 * len(names))
    left, right = figure.subplots(1, 2)
    for panel, value, null in ((left, "m_abs", "m_abs_null"), (right, "coupling", None)):
        for y, (model, k) in enumerate(names):
            of_model = rows[(rows["model"] == model) & (rows["k"] == k)]
            for _, row in of_model.iterrows():
                trained = row["weights"] == "trained"
                panel.errorbar(row[value], y, xerr=row[f"{value}_stderr"], capsize=2, markersize=5,
                               marker="o" if trained else "x", color=SERIES_COLOURS[0 if trained else 1])
            if null:
                panel.plot(of_model[null], [y] * len(of_model), "|", color="black", markersize=11)
        panel.set_yticks(range(len(names)), [f"{model}, K = {k}" for model, k in names], fontsize="small")
        panel.set_ylim(len(names) - 0.4, -0.6)
    right.axvline(0, **NULL)
    left.set_title("raw value with |.|; bars: analytic null", fontsize="medium")
    right.set_title("coupling (0 = unrelated vectors)", fontsize="medium")
    figure.suptitle("circles: trained, crosses: draws of random weights; means over pairs and prompts, standard errors")
    save_figure(figure, path)
