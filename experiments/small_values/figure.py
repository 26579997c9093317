"""The figure of the experiment: damage by tenth of the spectrum in both metrics, and damage beside the overlap."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.tables.drawing import new_figure, save_figure

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STUDIES = {
    "type-weight": ("of W", "#0072b2", "o"),
    "type-activations-16x": ("of W C$^{1/2}$", "#d55e00", "s"),
}  # fmt: skip
COLOURS = dict(zip(TYPES, ("#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00")))
MARKERS = dict(zip(TYPES, "osDv^P*"))


def draw(
    cells: pd.DataFrame, matrices: pd.DataFrame, correlated: pd.DataFrame, controls: pd.DataFrame, path: Path
) -> None:
    """Save the figure. The arguments are tables of tables.py."""
    figure = new_figure(11.0, 5.6)
    axes = figure.subplots(2, 4).ravel()
    for panel, target in zip(axes, TYPES):
        for study, (called, colour, marker) in STUDIES.items():
            rows = cells[(cells.study == study) & (cells.text == "stories") & (cells.target == target)]
            rows = rows.sort_values("decile")
            panel.errorbar(rows.decile, rows.delta, rows.delta_stderr, color=colour, marker=marker, markersize=4,
                           linewidth=1.2, capsize=2, label=f"removed tenth {called}")
        drawn = controls[(controls.control == "random") & (controls.target == target)]
        if len(drawn):
            one = drawn.iloc[0]
            panel.errorbar([10.6], [one.delta_mean],
                           [[one.delta_mean - one.delta_min], [one.delta_max - one.delta_mean]], color="0.4",
                           marker="x", markersize=5, linewidth=1, capsize=2, label="a random tenth of W (3 draws)")
        panel.set_title(target, fontsize="medium")
        panel.set_yscale("symlog", linthresh=0.02, linscale=0.5)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xticks(range(1, 11))
        panel.set_yticks([0, 0.02, 0.1, 1, 10], ["0", "0.02", "0.1", "1", "10"])
        panel.minorticks_off()
        panel.set_xlim(0.4, 11.1)
        panel.grid(axis="y", color="0.92", linewidth=0.8)
        panel.set_axisbelow(True)
    low = min(0.0, cells.loc[cells.study.isin(STUDIES) & (cells.text == "stories"), "delta"].min())
    high = cells.loc[cells.study.isin(STUDIES) & (cells.text == "stories"), "delta"].max()
    for panel in axes[:7]:
        panel.set_ylim(low - 0.01, 1.5 * high)
    for panel in (axes[0], axes[4]):
        panel.set_ylabel("added loss (nats per token)")
    for panel in axes[4:7]:
        panel.set_xlabel("removed tenth (1 = largest values)")
    last, panel = matrices[matrices.decile == 10], axes[7]
    for target in TYPES:
        rows = last[last.layer_type == target]
        panel.errorbar(rows.excess, rows.delta, rows.delta_stderr, fmt=MARKERS[target], color=COLOURS[target],
                       markersize=4.5, linewidth=0.7, markeredgecolor="0.2", markeredgewidth=0.4, label=target)
    one = correlated.iloc[0]
    panel.set_title(f"42 matrices, tenth 10 of W:\nSpearman {one.spearman:.2f} [{one.low:.2f}, {one.high:.2f}]",
                    fontsize="medium")
    panel.set_xlabel("overlap with the activations\n(s.d. of random vectors)")
    panel.axhline(0, color="0.6", linewidth=0.8)
    panel.grid(color="0.92", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(fontsize="x-small", frameon=False, loc="upper right", handletextpad=0.1, labelspacing=0.3)
    for name in ("0.up_proj", "0.gate_proj"):
        for row in last[last.target == name].itertuples():
            panel.annotate(name, (row.excess, row.delta), (-4, 5), textcoords="offset points", fontsize="x-small",
                           ha="right")
    handles, labels = axes[6].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, path)
