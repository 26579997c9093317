"""Coupling and performance over models, with what the published correlation leaves out: models come in families.

    python -m harness.measurements.coupling.leaderboard scores.csv results/coupling-*

scores.csv has one row per model with the columns model (as `model.name` of its run), family, score and parameters.
Models of one family share data, architecture and often weights; models of another width have another null. So the raw
value stands beside the calibrated one, R^2 is predicted for families that the fit has not seen, intervals come from a
bootstrap that draws whole families, and the correlation is also given for models of equal size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from harness.errors import InputError
from harness.measurements.coupling.summary import summarise, with_label
from harness.measurements.coupling.tables import read_coupling
from harness.tables.text import markdown_table

if TYPE_CHECKING:
    import pandas

COLUMNS = ("model", "family", "score", "parameters")
PREDICTORS = {"published": "-m_abs", "calibrated": "coupling"}
N_DRAWS = 2000


def collect(folders: Sequence[Path], scores: pandas.DataFrame, pairs: str = "all") -> pandas.DataFrame:
    """Return one row for each model and K: the columns of the scores, k, m_abs and coupling of its trained weights.

    Raises InputError for a folder without trained weights, for scores without one of COLUMNS, and for a model without a
    score.
    """
    import pandas as pd

    for name in COLUMNS:
        if name not in scores:
            raise InputError(f"scores: there is no column {name!r}; needed are {', '.join(COLUMNS)}")
    rows = []
    for folder in folders:
        couplings = read_coupling(folder, "couplings")
        couplings = couplings[(couplings["init"] == "trained") & couplings["region"].isna()]
        if couplings.empty:
            raise InputError(f"{folder}: no coupling of trained weights; run harness coupling with init=trained")
        model = couplings["model"].iloc[0]
        of_model = scores[scores["model"] == model]
        if of_model.empty:
            raise InputError(f"scores: there is no row for the model {model!r} of {folder}")
        summary = summarise(with_label(couplings))
        chosen = summary[(summary["kind"] == "depth") & (summary["order"] == "ujv") & (summary["pairs"] == pairs)]
        rows.append(chosen[["k", "m_abs", "coupling"]].assign(**of_model.iloc[0][list(COLUMNS)].to_dict()))
    return pd.concat(rows, ignore_index=True)


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Return the share of the variance of y [n] that a line in x [n] explains; nan if one of them is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return _correlation(x, y) ** 2


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def unseen_families(x: np.ndarray, y: np.ndarray, families: Sequence[str]) -> float:
    """Return R^2 of predictions for each family from a line that was fitted to all others.

    It is 1 - sum (y - prediction)^2 / sum (y - mean of the others)^2, at most 1, and negative where the line predicts
    worse than the mean.
    """
    groups = np.asarray(families)
    errors = baseline = 0.0
    for family in np.unique(groups):
        inside = groups == family
        slope, offset = np.polyfit(x[~inside], y[~inside], 1)
        errors += float(((y[inside] - slope * x[inside] - offset) ** 2).sum())
        baseline += float(((y[inside] - y[~inside].mean()) ** 2).sum())
    return 1 - errors / baseline


def without_each_family(x: np.ndarray, y: np.ndarray, families: Sequence[str]) -> dict[str, float]:
    """Return R^2 over the models of all families but one, by the family that is left out."""
    groups = np.asarray(families)
    return {str(family): r_squared(x[groups != family], y[groups != family]) for family in np.unique(groups)}


def partial_correlation(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Return the correlation of what is left of x and y after a line in `given` [n] is subtracted from each."""
    left = [one - np.polyval(np.polyfit(given, one, 1), given) for one in (x, y)]
    return _correlation(*left)


def family_bootstrap(
    x: np.ndarray, y: np.ndarray, given: np.ndarray, families: Sequence[str], seed: int = 0, draws: int = N_DRAWS
) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals of R^2 and of the partial correlation, from draws of whole families with replacement.

    Draws in which a value is not defined (fewer than three different models) are left out.
    """
    rng, groups = np.random.default_rng(seed), np.asarray(families)
    members = [np.flatnonzero(groups == family) for family in np.unique(groups)]
    found: dict[str, list[float]] = {"r_squared": [], "partial": []}
    for _ in range(draws):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        if len(np.unique(chosen)) < 3 or np.ptp(given[chosen]) == 0:
            continue
        found["r_squared"].append(r_squared(x[chosen], y[chosen]))
        found["partial"].append(partial_correlation(x[chosen], y[chosen], given[chosen]))
    low, high = zip(*(np.nanpercentile(values, [2.5, 97.5]) for values in found.values()))
    return {name: (float(a), float(b)) for name, a, b in zip(found, low, high)}


def verdicts(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Return one row for each K and predictor (published: -m_abs; calibrated: coupling). rows: as `collect` returns.

    Raises InputError for fewer than three families.
    """
    import pandas as pd

    table = []
    for k in sorted(set(rows["k"])):
        group = rows[rows["k"] == k]
        if group["family"].nunique() < 3:
            raise InputError(f"scores: {group['family'].nunique()} families are too few; at least 3 are needed")
        y, given = group["score"].to_numpy(float), np.log(group["parameters"].to_numpy(float))
        families = group["family"].astype(str).tolist()
        for name, column in PREDICTORS.items():
            x = -group["m_abs"].to_numpy(float) if column == "-m_abs" else group[column].to_numpy(float)
            interval, without = family_bootstrap(x, y, given, families), without_each_family(x, y, families)
            table.append({
                "k": int(k), "value": name, "models": len(group), "families": len(set(families)),
                "r_squared": r_squared(x, y), "low": interval["r_squared"][0], "high": interval["r_squared"][1],
                "unseen_families": unseen_families(x, y, families), "least_without_one": min(without.values()),
                "partial": partial_correlation(x, y, given), "partial_low": interval["partial"][0],
                "partial_high": interval["partial"][1], "r_squared_of_size": r_squared(given, y),
            })  # fmt: skip
    return pd.DataFrame(table)


def main(arguments: Sequence[str]) -> int:
    """Print the verdicts for a file of scores and folders of runs. Returns the exit status."""
    import pandas as pd

    if len(arguments) < 2:
        print("usage: python -m harness.measurements.coupling.leaderboard scores.csv FOLDER ...", file=sys.stderr)
        return 2
    try:
        scores = pd.read_csv(arguments[0])
        table = verdicts(collect([Path(one) for one in arguments[1:]], scores))
    except (InputError, OSError) as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    print(markdown_table([dict(row) for _, row in table.iterrows()]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
