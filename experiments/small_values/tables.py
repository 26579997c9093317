"""The tables and the figure of the experiment, from the parquet files of its runs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import holm, paired
from harness.measurements.ablation.tables import TABLES, read_metrics
from harness.measurements.spectra.tables import read_spectra
from harness.tables.store import read_table

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHOWN = ("down_proj", "up_proj")  # of the trial's table
METRIC = "nll"  # nats per token
DRAWS, SEED = 2_000, 0  # of the bootstrap
WEIGHT, ACTIVATIONS = "type-weight", "type-activations-16x"


class Study:
    """The cells of one study and the scores of their examples. An unfinished study has fewer cells."""

    def __init__(self, folder: Path) -> None:
        rows = read_metrics(folder) if (folder / "manifest.json").exists() else pd.DataFrame()
        self.rows = rows[(rows.metric == METRIC) & (rows.status == "ok")].copy() if len(rows) else rows
        if len(self.rows):
            self.rows["decile"] = self.rows.region.str.extract(r"^decile (\d+) ")[0].astype(float)
            examples = read_table(folder, TABLES, "examples")
            self._examples = dict(iter(examples[examples.metric == METRIC].groupby("cell_id")))

    def scores(self, cell_id: str) -> ExampleScores:
        one = self._examples[cell_id].sort_values("example_id", key=lambda ids: ids.astype(int))
        return ExampleScores(one.score.to_numpy(), one.weight.to_numpy(), clusters=one.cluster.to_numpy())

    def deciles(self) -> pd.DataFrame:
        """The cells that remove a decile, without controls, in the order of tasks, types and deciles."""
        rows = self.rows[self.rows.decile.notna()] if len(self.rows) else self.rows
        return rows.sort_values(["task", "block", "decile"]) if len(rows) else rows


def difference(study: Study, first: str, second: str) -> tuple[float, float, float]:
    """Return how much more the first cell harms than the second, its paired standard error, and its p-value."""
    found = paired(study.scores(first), study.scores(second))
    assert found.stderr is not None and found.p_value is not None
    return found.delta, found.stderr, found.p_value


def deciles(studies: dict[str, Study]) -> pd.DataFrame:
    """Return one row for each removed decile of each study, with the damage per removed norm and output energy."""
    rows = []
    for name, study in studies.items():
        for row in study.deciles().itertuples():
            rows.append({
                "study": name, "text": row.task, "target": row.target, "block": row.block,
                "layer_type": row.layer_type, "decile": int(row.decile), "value": row.value, "stderr": row.stderr,
                "baseline": row.baseline, "delta": row.delta, "delta_stderr": row.delta_stderr,
                "p_value": row.p_value, "norm_removed": row.norm_removed,
                "output_norm_removed": row.output_norm_removed, "energy_removed": row.energy_removed,
                "output_energy_removed": row.output_energy_removed,
                "delta_per_norm": row.delta / row.norm_removed,
                "delta_per_output_energy": row.delta / row.output_norm_removed**2,
            })  # fmt: skip
    return pd.DataFrame(rows)


def exceptions(name: str, study: Study) -> pd.DataFrame:
    """Return, for each text and target, whether the smallest tenth harms more than some larger one.

    Each pair of decile 10 with a larger decile is tested over the same windows, one-sided. `p_some` is that of the pair
    with the smallest one, corrected for all pairs of this target (Holm). An exception is a target whose decile 10 harms
    by itself (p < 0.05) and more than some larger decile (p_some < 0.05). `inversions` counts neighbouring deciles of
    which the smaller values harm more, and `significant` names those with p < 0.05 after correction for all
    neighbours.
    """
    rows = []
    for (text, target), cells in study.deciles().groupby(["task", "target"], sort=False):
        at = dict(zip(cells.decile.astype(int), cells.cell_id))
        damage = dict(zip(cells.decile.astype(int), cells.delta))
        if 10 not in at or 9 not in at:
            continue
        larger = [d for d in at if d < 10]
        tests = {d: difference(study, at[10], at[d]) for d in larger}
        one_sided = [p / 2 if delta > 0 else 1 - p / 2 for delta, _, p in tests.values()]
        corrected = dict(zip(larger, holm(one_sided)))
        beaten = [d for d in larger if tests[d][0] > 0]
        order = sorted(damage)
        neighbours = list(itertools.pairwise(order))
        steps = [difference(study, at[b], at[a]) for a, b in neighbours]
        p_steps = holm([p / 2 if delta > 0 else 1 - p / 2 for delta, _, p in steps])
        own = cells[cells.decile == 10].p_value.iloc[0]
        harms = damage[10] > 0 and own < 0.05
        rows.append({
            "study": name, "text": text, "target": target, "layer_type": cells.layer_type.iloc[0],
            "delta_10": damage[10], "p_10": own, "delta_9": damage[9], "difference_10_9": tests[9][0],
            "difference_stderr": tests[9][1], "p_10_9": tests[9][2],
            "harms_more_than": " ".join(map(str, beaten)), "p_some": min(corrected.values()),
            "exception": bool(harms and min(corrected.values()) < 0.05),
            "inversions": sum(delta > 0 for delta, _, _ in steps),
            "significant": " ".join(f"{b}>{a}" for (a, b), p in zip(neighbours, p_steps) if p < 0.05),
            "spearman": spearmanr(order, [damage[d] for d in order]).statistic,
        })  # fmt: skip
    return pd.DataFrame(rows)


def bootstrap(values: Any, statistic: Any) -> tuple[float, float, float]:
    """Return a statistic of the rows of an array, and its 95 % interval over draws of rows with replacement."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(SEED)
    found = [statistic(values[draws.integers(0, len(values), len(values))]) for _ in range(DRAWS)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(statistic(values)), float(low), float(high)


def rank_correlation(values: np.ndarray) -> float:
    """Return Spearman's correlation of the two columns."""
    a, b = (np.argsort(np.argsort(column, kind="stable")).astype(float) for column in values.T)
    for ranks, column in ((a, values[:, 0]), (b, values[:, 1])):  # equal values get the mean of their ranks
        _, inverse = np.unique(column, return_inverse=True)
        ranks[:] = (np.bincount(inverse, ranks) / np.bincount(inverse))[inverse]
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else np.nan


def overlaps(folder: Path) -> pd.DataFrame:
    """Return the overlap of the input vectors of each tenth of each matrix with the activations, by init.

    excess: the mean over the vectors of (overlap - mean) / standard deviation, those of random vectors of the same
    length, because the overlap of a random vector depends on its length. share_above: the share of vectors above 3.
    """
    vectors, matrices = read_spectra(folder, "vectors"), read_spectra(folder, "matrices")
    vectors = vectors[(vectors.side == "input") & vectors.overlap.notna()]
    vectors = vectors.merge(matrices[["spectrum_id", "rank", "overlap_null_mean", "overlap_null_std"]])
    vectors["decile"] = np.minimum(10, 1 + np.floor(10 * (vectors["index"] + 0.5) / vectors["rank"])).astype(int)
    vectors["excess"] = (vectors.overlap - vectors.overlap_null_mean) / vectors.overlap_null_std
    vectors["above"] = vectors.excess > 3
    found = vectors.groupby(["init", "matrix", "block", "layer_type", "decile"], sort=False).agg(
        overlap=("overlap", "mean"), excess=("excess", "mean"), excess_max=("excess", "max"),
        share_above=("above", "mean"),
    )
    return found.reset_index()


def matrices(cells: pd.DataFrame, overlap: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each matrix and decile: damage in both metrics, removed norms, and the overlap."""
    weight = cells[cells.study == "matrix-weight"]
    activations = cells[cells.study == "matrix-activations"][["target", "decile", "delta", "delta_stderr"]]
    found = weight.merge(activations, how="left", on=["target", "decile"], suffixes=("", "_activations"))
    trained = overlap[overlap.init == "trained"].rename(columns={"matrix": "target"})
    found = found.merge(trained[["target", "decile", "overlap", "excess", "excess_max", "share_above"]],
                        on=["target", "decile"])
    # How much larger the inputs are in the removed directions than in a random one.
    shares = found.output_energy_removed / found.energy_removed
    found["alignment"] = shares
    return found.drop(columns=["study", "text", "value", "stderr", "baseline", "p_value"])


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Return rank correlations of the damage of single matrices with what could explain it, with 95 % intervals."""
    rows = []

    def add(what: str, with_: str, over: str, values: Any, statistic: Any) -> None:
        value, low, high = bootstrap(values, statistic)
        rows.append({"damage": what, "with": with_, "over": over, "n": len(values), "spearman": value, "low": low,
                     "high": high})

    last = found[found.decile == 10]
    names = {"excess": "overlap (mean)", "excess_max": "overlap (largest)", "share_above": "share above the band",
             "alignment": "output energy per energy", "norm_removed": "norm removed",
             "output_norm_removed": "output norm removed"}
    for column, called in names.items():
        add("of decile 10 of W", called, "matrices", last[[column, "delta"]], rank_correlation)
    # The exception itself: does the smallest tenth harm more than the ninth where it overlaps more than the ninth?
    ninth = found[found.decile == 9].set_index("target")
    both = last.set_index("target").join(ninth, rsuffix="_9")
    more = pd.DataFrame({"delta": both.delta - both.delta_9})
    for column in ("excess", "excess_max", "share_above", "alignment"):
        more[column] = both[column] - both[f"{column}_9"]
        add("of decile 10 less that of decile 9", f"the same of {names[column]}", "matrices", more[[column, "delta"]],
            rank_correlation)
    # Layer types differ in both, so that ranks within a layer type are compared, too.
    for column in ("excess", "share_above", "alignment", "output_norm_removed"):
        within = last.groupby("layer_type")[[column, "delta"]].rank()
        add("of decile 10 of W, ranked within its layer type", names[column], "matrices", within, rank_correlation)
    # Within a matrix: which quantity orders the deciles by damage?
    for few, called in ((range(1, 11), "all deciles"), (range(7, 11), "deciles 7 to 10")):
        part = found[found.decile.isin(few)]
        for column in names:
            inside = [rank_correlation(one[[column, "delta"]].to_numpy()) for _, one in part.groupby("target")]
            add("of deciles of one matrix", names[column], called, np.array(inside)[:, None],
                lambda values: float(np.nanmean(values)))
    return pd.DataFrame(rows)


def outliers(study: Study) -> pd.DataFrame:
    """Return, for each target, the damage of its values above and below the bulk and of as many from the lower bulk."""
    rows = []
    for (target, layer_type), cells in study.rows.groupby(["target", "layer_type"], sort=False):
        by_region = {row.region: row for row in cells.itertuples()}
        for side in ("above", "below"):
            one = next((row for label, row in by_region.items() if label.startswith(f"mp {side}")), None)
            control = next((row for label, row in by_region.items()
                            if label.startswith("lower_bulk") and f"mp {side}" in label), None)
            if one is None or control is None or not one.n_removed:
                continue
            more, stderr, p = difference(study, one.cell_id, control.cell_id)
            rows.append({
                "target": target, "layer_type": layer_type, "outliers": side, "n_removed": int(one.n_removed),
                "n_values": int(one.n_values), "delta": one.delta, "delta_stderr": one.delta_stderr,
                "n_lower_bulk": int(control.n_removed), "delta_lower_bulk": control.delta,
                "delta_lower_bulk_stderr": control.delta_stderr, "difference": more, "difference_stderr": stderr,
                "p_value": p, "delta_per_norm": one.delta / one.norm_removed,
                "delta_per_norm_lower_bulk": control.delta / control.norm_removed,
            })  # fmt: skip
    return pd.DataFrame(rows)


def controls(study: Study) -> pd.DataFrame:
    """Return the damage of decile 10 of a type beside draws of as many values, and of values of as much energy."""
    rows = []
    for target, cells in study.rows.groupby("target", sort=False):
        own = cells[cells.decile.notna()]
        for kind in ("random", "energy_matched"):
            drawn = cells[cells.region_kind == kind]
            if len(own) and len(drawn):
                rows.append({
                    "target": target, "delta_10": own.delta.iloc[0], "delta_10_stderr": own.delta_stderr.iloc[0],
                    "control": kind, "draws": len(drawn), "delta_mean": drawn.delta.mean(),
                    "delta_min": drawn.delta.min(), "delta_max": drawn.delta.max(),
                })  # fmt: skip
    return pd.DataFrame(rows)


def additivity(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the sum of the damage of single matrices beside the damage of all of the type at once."""
    one = cells[cells.study == "matrix-weight"].groupby(["layer_type", "decile"]).delta.agg(["sum", "max"])
    whole = cells[(cells.study == WEIGHT) & (cells.text == "stories")].set_index(["layer_type", "decile"]).delta
    found = one.join(whole.rename("together"), how="inner").reset_index()
    found["together_per_sum"] = found["together"] / found["sum"]
    return found


def with_error(value: float, stderr: float) -> str:
    return f"{value:.3f} ± {stderr:.3f}".replace("0.", ".", 2) if abs(value) < 1 else f"{value:.3f} ± {stderr:.3f}"


def trial(cells: pd.DataFrame) -> str:
    """Return the table of the damage by decile, in both metrics, as Markdown."""
    lines = ["| removed tenth | " + " | ".join(f"{d}" for d in range(1, 11)) + " |", "|---|" + "--:|" * 10]
    for layer_type in reversed(TYPES):
        for study, called in ((WEIGHT, "W"), (ACTIVATIONS, "W C^(1/2)")):
            rows = cells[(cells.study == study) & (cells.text == "stories") & (cells.target == layer_type)]
            if len(rows) == 10:
                texts = [with_error(row.delta, row.delta_stderr) for row in rows.sort_values("decile").itertuples()]
                lines.append(f"| {layer_type}, of {called} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, here: Path) -> None:
    """Write all tables and the figure. folder: with the runs. here: where tables and figure go."""
    names = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    studies = {name: Study(folder / name) for name in names if name != "spectra"}
    out = here / "tables"
    out.mkdir(exist_ok=True)
    cells = deciles(studies)
    overlap = overlaps(folder / "spectra")
    of_matrices = matrices(cells, overlap)
    correlated = correlations(of_matrices)
    excepted = pd.concat([exceptions(name, study) for name, study in studies.items()])
    tables = {
        "deciles": cells, "exceptions": excepted, "matrices": of_matrices, "correlations": correlated,
        "overlaps": overlap, "outliers": outliers(studies["outliers"]), "controls": controls(studies["draws"]),
        "additivity": additivity(cells),
    }  # fmt: skip
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.6g")
    (out / "trial.md").write_text(trial(cells))
    print(trial(cells))
    for name in ("exceptions", "correlations", "controls"):
        print(f"\n{name}\n{tables[name].to_string(index=False, float_format=lambda value: f'{value:.3g}')}")
    from figure import draw

    draw(cells, of_matrices, correlated, tables["controls"], here / "small_values.png")
