"""tables.md: the tables of the experiment as Markdown, from its CSV files alone."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.tables.text import markdown_table, plus_minus


def write_tables(here: Path) -> None:
    """Write tables.md beside the CSV files that are there."""
    there = {path.stem: pd.read_csv(path) for path in sorted(here.glob("*.csv"))}
    lines = ["# Tables of experiments/coupling", "", "`run.py` writes this page from the CSV files beside it.", ""]
    for title, name, make in SECTIONS:
        if name in there:
            lines += [f"## {title}", "", markdown_table(make(there[name])), ""]
    trials = [rows for name, rows in there.items() if name.startswith("trial-")]
    if trials:
        lines += ["## Trained and random weights", "", markdown_table(_trial(pd.concat(trials))), ""]
    (here / "tables.md").write_text("\n".join(lines).rstrip() + "\n")


def _trial(rows: pd.DataFrame) -> list[dict]:
    """Trained weights with the standard error over prompts; random ones with that over the draws of the weights."""
    table = []
    rows = rows[rows["pairs"].isin(["all", "without block 0", "neighbours"])]
    for (model, k, pairs), group in rows.groupby(["model", "k", "pairs"], sort=False):
        trained, random = (group[(group["weights"] == "trained") == one] for one in (True, False))
        one = trained.iloc[0]
        table.append({
            "model": model, "K": k, "pairs": pairs, "prompts": int(one["n_prompts"]),
            **{f"{name}": plus_minus(one[key], one[f"{key}_stderr"]) for name, key in
               (("|m|", "m_abs"), ("coupling", "coupling"))},
            "null": f"{one['m_abs_null']:.4f}", "draws": len(random),
            **{f"{name}, random": plus_minus(random[key].mean(), random[key].sem()) for name, key in
               (("|m|", "m_abs"), ("coupling", "coupling"))},
            "null, random": f"{random['m_abs_null'].mean():.4f}",
            "LSS": plus_minus(one["lss"], one["lss_stderr"]),
            "LSS, random": plus_minus(random["lss"].mean(), random["lss"].sem()), "sqrt(L)": f"{one['lss_null']:.3f}",
            "growth": plus_minus(one["growth_mean"], one["growth_mean_stderr"]),
            "growth, random": plus_minus(random["growth_mean"].mean(), random["growth_mean"].sem()),
        })  # fmt: skip
    return table


def _families(rows: pd.DataFrame) -> list[dict]:
    wide = rows.pivot(index="family", columns="dtype")
    path = rows.drop_duplicates("family").set_index("family")["path"]
    return [{"family": family, "path": path[family],
             **{f"{key.replace('_', ' ')}, {dtype}": f"{wide.loc[family, (key, dtype)]:.1e}"
                for dtype in ("float32", "float64")
                for key in ("one_token_against_whole", "forward_products", "adjoint_products")}}
            for family in dict.fromkeys(rows["family"])]


def _krylov(rows: pd.DataFrame) -> list[dict]:
    table = []
    for (model, k), group in rows.groupby(["model", "k"], sort=False):
        for name, part in (("gap at least 1.005", group[group["gap"] >= 1.005]), ("ties", group[group["gap"] < 1.005])):
            if len(part):
                table.append({
                    "model": model, "d": int(part["d"].iloc[0]), "K": k, "Jacobians": f"{len(part)} ({name})",
                    "products": f"{part['n_products'].min()} to {part['n_products'].max()}",
                    "largest error of sigma": f"{part['sigma_error'].max():.1e}",
                    "smallest cosine": f"{part['smallest_cosine'].min():.5f}",
                    "largest error of the Frobenius norm": f"{part['frobenius_error'].abs().max():.1e}",
                })  # fmt: skip
    return table


def _null(rows: pd.DataFrame) -> list[dict]:
    return [{"model": one["model"], "d": one["d"], "K": one["k"], "value": one["value"],
             "analytic": f"{one['analytic']:.4f}", "simulated": plus_minus(one["simulated"], one["stderr"])}
            for _, one in rows.iterrows()]


def _lines(rows: pd.DataFrame) -> list[dict]:
    return [{"model": model, "draws": len(group), "LSS": plus_minus(group["lss"].mean(), group["lss"].sem()),
             "of one draw": f"{group['lss'].min():.3f} to {group['lss'].max():.3f}",
             "sqrt(L)": f"{group['lss_null'].iloc[0]:.3f}",
             "ratio": f"{group['lss'].mean() / group['lss_null'].iloc[0]:.4f}"}
            for model, group in rows.groupby("model", sort=False)]


def _training(rows: pd.DataFrame) -> list[dict]:
    table = []
    rows = rows[rows["k"] == rows["k"].min()]
    for step, group in rows.groupby("step"):
        one = {pairs: of_pairs for pairs, of_pairs in group.groupby("pairs")}
        both = one["all"]
        table.append({
            "step": int(step), "seeds": len(both), "nats per token": plus_minus(both["nll"].mean(), both["nll"].sem()),
            **{f"coupling, {pairs}": plus_minus(one[pairs]["coupling"].mean(), one[pairs]["coupling"].sem())
               for pairs in ("all", "without block 0", "neighbours")},
            "|m|, all": plus_minus(both["m_abs"].mean(), both["m_abs"].sem()),
            "|m| null": f"{both['m_abs_null'].mean():.4f}",
            "LSS": plus_minus(both["lss"].mean(), both["lss"].sem()),
        })  # fmt: skip
    return table


def _ablations(rows: pd.DataFrame) -> list[dict]:
    rows = rows[rows["pairs"] == "all"]
    return [{"layer type": one["layer_type"], "removed": one["region"], "energy": f"{one['energy_removed']:.4f}",
             "change of coupling": plus_minus(one["coupling_delta"], one["coupling_delta_stderr"]),
             "change of LSS": plus_minus(one["lss_delta"], one["lss_delta_stderr"]),
             "change of nats per token": plus_minus(one["nll_delta"], one["nll_delta_stderr"])}
            for _, one in rows.iterrows()]


def _jacobian_cost(rows: pd.DataFrame) -> list[dict]:
    return [{"tokens": int(one["tokens"]), "prompt": int(one["prompt"]), "block": int(one["block"]),
             "ours, s": f"{one['ours_seconds']:.3f}",
             "published, s": f"{one['published_seconds']:.2f}" if one["finished"] else
                             f"not finished in {int(one['limit_seconds'])}",
             "ratio": f"{'' if one['finished'] else 'more than '}{one['ratio']:.1f}",
             "relative difference": f"{one['relative_difference']:.1e}" if one["finished"] else "-",
             "ours, all blocks, s": f"{one['ours_all_blocks_seconds']:.2f}"} for _, one in rows.iterrows()]


def _pair_cost(rows: pd.DataFrame) -> list[dict]:
    return [{"prompt": int(one["prompt"]), "triples, s": f"{one['ours_triples_seconds']:.2f}",
             "full SVD, s": f"{one['published_svd_seconds']:.2f}", "ratio": f"{one['triples_ratio']:.1f}",
             "stacked pairs, s": f"{one['ours_pairs_seconds']:.2f}",
             "one by one, s": f"{one['published_pairs_seconds']:.2f}", "ratio of pairs": f"{one['pairs_ratio']:.1f}",
             "largest difference of |m|": f"{one['largest_difference']:.1e}"} for _, one in rows.iterrows()]


SECTIONS = (
    ("Exactness for every causal family (relative, largest over blocks)", "families", _families),
    ("Exactness on real weights, float32", "real_models", lambda rows: [
        {**one, "one_token_against_whole": f"{one['one_token_against_whole']:.1e}"}
        for one in rows.to_dict("records")]),
    ("Matrix-free triples against dense ones", "krylov", _krylov),
    ("The null against 200 pairs of random frames", "null_simulation", _null),
    ("Line-shape score of random weights", "random_lines", _lines),
    ("A training from scratch, K = 5; standard errors over seeds", "training", _training),
    ("Removing the largest and the smallest tenth of each layer type, stories260K, K = 5", "ablations", _ablations),
    ("The same for stories15M", "ablations-stories15M", _ablations),
    ("Processor seconds of one Jacobian, SmolLM2", "cost_jacobians", _jacobian_cost),
    ("Processor seconds of decompositions and pairs, SmolLM2, K = 10, 30 and 50", "cost_pairs", _pair_cost),
)
