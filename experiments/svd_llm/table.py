"""Write compression.csv and compression.png from the two studies of this experiment, and print the README's table.

    python experiments/svd_llm/table.py results/svd_llm/weight results/svd_llm/activations
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from harness.measurements.ablation.tables import read_metrics

HERE = Path(__file__).parent
METRICS = {"weight": "W", "activations": "W C^(1/2)"}
RANKS = {"uniform": "uniform ranks", "zero_sum": "one budget (zero sum)"}


def rows_of(folders: list[str]) -> pd.DataFrame:
    """Return one row for each truncation and each of its random controls, and the baseline, of all studies."""
    rows = pd.concat([read_metrics(folder) for folder in folders])
    rows = rows[(rows.metric == "token_perplexity") & (rows.status == "ok") & (rows.target_kind != "control")]
    found = rows.region.str.extract(r"compression (?P<ratio>[\d.]+)(?P<shared> zero_sum)?")
    return pd.DataFrame({
        "metric": rows.region_metric, "ratio": found.ratio.astype(float),
        "ranks": found.shared.notna().map({True: "zero_sum", False: "uniform"}).where(found.ratio.notna()),
        "random_seed": rows.region_seed, "perplexity": rows.value, "stderr": rows.stderr,
        "n_removed": rows.n_removed, "n_values": rows.n_values, "energy_removed": rows.energy_removed,
        "output_energy_removed": rows.output_energy_removed,
    }).drop_duplicates().sort_values(["metric", "ranks", "ratio", "random_seed"], na_position="first")


def draw(rows: pd.DataFrame, baseline: float, path: Path) -> None:
    """Draw the perplexity against the share of parameters that is removed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (metric, ranks), part in rows.groupby(["metric", "ranks"]):
        axes.errorbar(part.ratio, part.perplexity, part.stderr, label=f"{METRICS[metric]}, {RANKS[ranks]}",
                      marker="o", linestyle="-" if metric == "activations" else "--",
                      color="C0" if ranks == "uniform" else "C1")
    axes.axhline(baseline, color="grey", linewidth=0.8, label="uncompressed")
    axes.set(yscale="log", xlabel="share of the matrices' parameters that is removed", ylabel="perplexity per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(folders: list[str]) -> None:
    rows = rows_of(folders)
    rows.to_csv(HERE / "compression.csv", index=False, float_format="%.6g")
    baseline = rows[rows.ratio.isna()].iloc[0]
    whole = rows[rows.ratio.notna() & rows.random_seed.isna()]
    draw(whole, baseline.perplexity, HERE / "compression.png")
    print(f"baseline {baseline.perplexity:.2f} +- {baseline.stderr:.2f}\n")
    columns = [(metric, ranks) for ranks in RANKS for metric in METRICS]
    print("| removed | " + " | ".join(f"{METRICS[metric]}, {RANKS[ranks]}" for metric, ranks in columns) + " |")
    print("|--:" * (1 + len(columns)) + "|")
    for ratio in sorted(whole.ratio.unique()):
        cells = []
        for metric, ranks in columns:
            one = whole[(whole.ratio == ratio) & (whole.metric == metric) & (whole.ranks == ranks)].iloc[0]
            cells.append(f"{one.perplexity:.4g} +- {one.stderr:.2g}")
        print(f"| {ratio:.0%} | " + " | ".join(cells) + " |")
    drawn = rows[rows.random_seed.notna()].set_index(["metric", "ranks", "ratio"]).perplexity.groupby(level=[0, 1, 2])
    over = drawn.min() / whole.set_index(["metric", "ranks", "ratio"]).perplexity
    print(f"\nrandom directions, as many of each matrix: {over.min():.2g} to {over.max():.2g} times the perplexity")


if __name__ == "__main__":
    main(sys.argv[1:])
