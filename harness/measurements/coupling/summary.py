"""The summary of coupling: means over pairs within each prompt, then mean and standard error over prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from harness.tables.labels import region_words

if TYPE_CHECKING:
    import pandas

VALUES = ("m", "m_abs", "m_null", "m_abs_null", "coupling", "coupling_abs")
WEIGHTS = ["init", "checkpoint", "target", "region"]
PAIRS = ("all", "without block 0", "neighbours", "neighbours without block 0")
OF_TRAJECTORIES = ("lss", "lss_null", "growth_mean", "growth_std", "expodistance")
OF_BLOCKS = ("sigma_max", "frobenius_norm", "effective_rank", "symmetry", "departure_normality",
             "product_effective_rank", "gap_k")  # fmt: skip


def label(row: Any) -> str:
    """Return the weights of a row: "trained", "random", "reference" or the checkpoint; with the ablation if any."""

    def text(name: str) -> str | None:
        return row[name] if isinstance(row[name], str) else None  # NaN instead of None if the whole column is null

    name = row["init"] if row["init"] != "trained" else text("checkpoint") or "trained"
    region = text("region")
    return name if region is None else f"{name}, {text('target')}: {region_words(region)}"


def with_label(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return the rows with the column `weights`, which `label` makes."""
    keys = rows[WEIGHTS].drop_duplicates()
    labels = {tuple(map(str, key)): label(row) for key, (_, row) in zip(keys.values, keys.iterrows())}
    return rows.assign(weights=[labels[tuple(map(str, key))] for key in rows[WEIGHTS].values])


def of_pairs(couplings: pandas.DataFrame, which: str) -> pandas.DataFrame:
    """Return the rows of some of the pairs. Pairs of a Jacobian with itself are left out of all of them.

    which: one of PAIRS. Neighbours are pairs in which the vectors are those of the block after.
    """
    same = (couplings["block_i"] == couplings["block_j"]) & (couplings["token_in_i"] == couplings["token_in_j"])
    chosen = ~(same & (couplings["token_out_i"] == couplings["token_out_j"]))
    if which.endswith("without block 0"):
        chosen &= (couplings["block_i"] > 0) & (couplings["block_j"] > 0)
    if which.startswith("neighbours"):
        chosen &= (couplings["kind"] == "depth") & (couplings["block_j"] == couplings["block_i"] + 1)
    return couplings[chosen]


def summarise(couplings: pandas.DataFrame) -> pandas.DataFrame:
    """Return one row for each set of weights, kind, order, K and choice of pairs.

    couplings: with the column `weights`. Columns: weights, kind, order, k, pairs, n_prompts, and for each of VALUES its
    mean over prompts and, as `<name>_stderr`, the standard error of this mean, which is NaN for one prompt.
    """
    import pandas as pd

    keys, tables = ["weights", "kind", "order", "k"], []
    for which in PAIRS:
        rows = of_pairs(couplings, which)
        if rows.empty:
            continue
        per_prompt = rows.groupby([*keys, "prompt_id"], sort=False)[list(VALUES)].mean()
        tables.append(_over_prompts(per_prompt.groupby(level=keys, sort=False), VALUES).assign(pairs=which))
    if not tables:
        return pd.DataFrame(columns=[*keys, "pairs", "n_prompts"])
    table = pd.concat(tables).reset_index()
    place = {name: i for i, name in enumerate(couplings["weights"].unique())}
    table = table.sort_values("weights", key=lambda column: column.map(place), kind="stable")
    first = [*keys, "pairs", "n_prompts"]
    return table[[*first, *(name for name in table if name not in first)]].reset_index(drop=True)


def of_trajectories(trajectories: pandas.DataFrame) -> pandas.DataFrame:
    """Return one row for each set of weights with the means over prompts and their standard errors."""
    per_prompt = trajectories.groupby(["weights", "prompt_id"], sort=False)[list(OF_TRAJECTORIES)].mean()
    return _over_prompts(per_prompt.groupby(level="weights", sort=False), OF_TRAJECTORIES).reset_index()


def of_blocks(jacobians: pandas.DataFrame) -> pandas.DataFrame:
    """Return one row for each set of weights and block, of Jacobians from a token to itself."""
    own = jacobians[jacobians["token_in"] == jacobians["token_out"]]
    per_prompt = own.groupby(["weights", "block", "prompt_id"], sort=False)[list(OF_BLOCKS)].mean()
    return _over_prompts(per_prompt.groupby(level=["weights", "block"], sort=False), OF_BLOCKS).reset_index()


def _over_prompts(groups: Any, names: tuple[str, ...]) -> pandas.DataFrame:
    n = groups.size()
    means, errors = groups.mean(), groups.std(ddof=1).div(n.map(math.sqrt), axis=0)
    table = n.rename("n_prompts").to_frame()
    for name in names:
        table[name], table[f"{name}_stderr"] = means[name], errors[name]
    return table
