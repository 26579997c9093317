"""The part of the report of spectra that says what tuning did to the weights, from the tables of changes alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measurements.spectra.change_figures import change_figure, relative_figure
from harness.measurements.spectra.tables import read_spectra
from harness.tables.text import aligned, figure_text, file_stem, markdown_table, markdown_text, safe_for_csv

if TYPE_CHECKING:
    import pandas

TOP = 10  # singular vectors of each matrix and side that are examined for intruders
CONTROLS = ("real", "rotated", "noise")
_WORDS = {"rotated": "the same singular values in random directions", "noise": "Gaussian noise of the same norm"}


@dataclass(frozen=True)
class ChangeTables:
    """The three tables of changes, each with the column `weights`: the name of the checkpoint, or "trained"."""

    changes: pandas.DataFrame
    regions: pandas.DataFrame
    overlaps: pandas.DataFrame

    def text(self) -> list[str]:
        """Return the lines for the terminal; none without changes."""
        if self.changes.empty:
            return []
        lines = ["", *self.sentences(), ""]
        for table in self._tables():
            head, *rows = [list(table[0]), *(list(map(_short, row.values())) for row in table)]
            lines += [*aligned([head, *rows], n_left=2), ""]
        return lines[:-1]

    def markdown(self) -> list[str]:
        """Return the lines for the page; none without changes."""
        if self.changes.empty:
            return []
        lines = ["## What tuning did to the weights", ""]
        lines += [f"- {markdown_text(one)}" for one in self.sentences()]
        for table in self._tables():
            lines += ["", markdown_table(table)]
        return lines

    def write_csv(self, out: Path) -> None:
        """Write the summaries into a folder as CSV files; none without changes."""
        import pandas as pd

        for name, rows in (("changes", self.summary()), ("change_regions", self.tenths()),
                           ("change_overlaps", self.overlap_summary())):
            if rows:
                safe_for_csv(pd.DataFrame(rows)).to_csv(out / f"{name}.csv", index=False, float_format="%.6g")

    def figures(self) -> Iterator[tuple[str, Callable[..., object], list[Any], str]]:
        """Yield the file name of each figure of each tuned model, the function that draws it, what it shows, and its
        title."""
        for weights, rows in self.changes.groupby("weights", sort=False):
            names = [Path(rows[key].iloc[0]).name for key in ("model", "reference")]
            title = figure_text(f"{names[0]}, {weights}: changes from {names[1]}")
            tenths = [row for row in self.tenths() if row["weights"] == weights]
            summary = [row for row in self.summary() if row["weights"] == weights]
            end = f"-{file_stem(str(weights))}.png"
            if tenths:
                yield f"changes{end}", change_figure, [tenths, summary], title
            yield f"relative_change{end}", relative_figure, [rows[rows["control"] == "real"]], title

    def summary(self) -> list[dict[str, Any]]:
        """Return one row for each tuned model and control, with means over the matrices that changed."""
        rows: list[dict[str, Any]] = []
        for weights, of_weights in self.changes.groupby("weights", sort=False):
            for control in CONTROLS:
                found = of_weights[(of_weights["control"] == control) & of_weights["change_sigma_max"].notna()]
                if found.empty:
                    continue
                n_seeds = max(1, found["control_seed"].nunique())
                rows.append({
                    "weights": weights, "control": control, "matrices": found["matrix"].nunique(),
                    "relative change": found["relative_change"].mean(),
                    "largest value / reference's": (found["change_sigma_max"] / found["reference_sigma_max"]).mean(),
                    "stable rank": found["change_stable_rank"].mean(),
                    "effective rank": found["change_effective_rank"].mean(),
                    "rank of 90 %": found["change_rank_90"].mean(),
                    "above MP": found["change_n_above"].mean(),
                    "intruders output": found["intruders_output"].sum() / n_seeds,
                    "intruders input": found["intruders_input"].sum() / n_seeds,
                    "rotation consistency": found["rotation_consistency"].mean(),
                    "value share": found["value_share"].mean(),
                    "amplification": found["amplification"].mean(),
                    "overlap output": found["overlap_top_k_output"].mean(),
                    "overlap input": found["overlap_top_k_input"].mean(),
                })  # fmt: skip
        return rows

    def tenths(self) -> list[dict[str, Any]]:
        """Return one row for each tuned model, side, control and tenth: the energy over its expectation, and more.

        The ratio is that of the means over matrices. Its standard error treats the matrices as independent.
        """
        rows = []
        keys = ["weights", "side", "control", "decile"]
        for key, found in self.regions.groupby(keys, sort=False):
            expected = found["energy_expected"].mean()
            rows.append({
                **dict(zip(keys, key)), "matrices": found["matrix"].nunique(),
                "energy_ratio": found["energy"].mean() / expected if expected else None,
                "energy_ratio_stderr": _stderr(found["energy"] - found["energy_expected"]) / expected
                if expected else None,
                "sigma_shift": found["sigma_shift"].mean(), "best_cosine": found["best_cosine"].mean(),
            })  # fmt: skip
        return rows

    def overlap_summary(self) -> list[dict[str, Any]]:
        """Return one row for each pair of tuned models and control, with means over the matrices."""
        columns = ["energy_kept_output", "energy_kept_input", "mode_overlap_output", "mode_overlap_input",
                   "interference"]  # fmt: skip
        rows = []
        for key, found in self.overlaps.groupby(["weights", "other", "control"], sort=False):
            rows.append({**dict(zip(("change of", "within that of", "control"), key)),
                         "matrices": found["matrix"].nunique(), **{name: found[name].mean() for name in columns}})
        return rows

    def sentences(self) -> list[str]:
        """Return what can be said of each tuned model, each statistic beside its controls."""
        lines = []
        for weights, rows in self.changes.groupby("weights", sort=False):
            real = rows[rows["control"] == "real"]
            changed = real[real["change_sigma_max"].notna()]
            lines.append(
                f"{weights}: {len(changed)} of {len(real)} matrices changed, by {_percent(changed['relative_change'])}"
                f" of their norm on average; rounding to the type of the checkpoint alone makes"
                f" {_percent(real['rounding_floor'])}"
            )
            lines += self._of_controls(str(weights))
        return lines

    def _of_controls(self, weights: str) -> list[str]:
        summary = {row["control"]: row for row in self.summary() if row["weights"] == weights}
        if "real" not in summary:
            return []
        lines = []
        for side in ("output", "input"):
            found = summary["real"][f"intruders {side}"]
            beside = [f"{row[f'intruders {side}']:g} with {_WORDS[control]}"
                      for control, row in summary.items() if control != "real"]
            n = TOP * summary["real"]["matrices"]
            lines.append(f"{weights}: {found:g} of {n} first {side} vectors are intruders"
                         + (f"; {', '.join(beside)}" if beside else ""))
        for side in ("output", "input"):
            shares = {row["control"]: row for row in self.tenths()
                      if (row["weights"], row["side"], row["decile"]) == (weights, side, 1)}
            said = [f"{row['energy_ratio']:.2f} ± {row['energy_ratio_stderr']:.2f} ({control})"
                    for control, row in shares.items() if row["energy_ratio"] is not None]
            if said:
                lines.append(f"{weights}: the largest tenth of the reference's {side} directions has {', '.join(said)}"
                             " times the energy of the change that random directions have")
        return lines

    def _tables(self) -> list[list[dict[str, Any]]]:
        """Return the tables that are shown; the one of tenths has a column for each tenth."""
        wide: dict[tuple[Any, ...], dict[str, Any]] = {}
        for row in self.tenths():
            key = (row["weights"], row["side"], row["control"])
            wide.setdefault(key, {"weights": key[0], "energy ratio": f"{key[1]} {key[2]}"})[str(row["decile"])] = (
                row["energy_ratio"]
            )
        return [table for table in (self.summary(), list(wide.values()), self.overlap_summary()) if table]


def read_changes(folder: str | os.PathLike) -> ChangeTables:
    """Return the tables of changes in a folder, which are empty without a reference. Raises SchemaVersionError."""
    found = [read_spectra(folder, name) for name in ("changes", "change_regions", "change_overlaps")]
    return ChangeTables(*(one.assign(weights=one["checkpoint"].fillna("trained")) for one in found))


def _percent(values: pandas.Series) -> str:
    return f"{100 * values.mean():.2g} %" if len(values) else "-"


def _stderr(values: pandas.Series) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
