"""The report of spectra as text, CSV and figures, from the tables alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.page import captioned, write_run_page
from harness.errors import InputError, printable
from harness.files import write_text
from harness.measurements.spectra.change_report import ChangeTables, read_changes
from harness.measurements.spectra.figures import checkpoint_figure, outlier_figure, overlap_figure, spectrum_figure
from harness.measurements.spectra.tables import TABLES, read_spectra
from harness.optional import require
from harness.tables.charts import block_maps
from harness.tables.drawing import can_draw, why_no_figures
from harness.tables.failures import failure_lines
from harness.tables.figure_record import FigureRecord, clear, digest_of
from harness.tables.page import Chart, Page, Section, frame_table
from harness.tables.text import aligned, count, figure_text, file_stem, markdown_lines, markdown_text, safe_for_csv

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

CSV_FORMAT = "%.6g"  # the parquet files have all digits
SHORT_TAIL = 20  # values; the standard error of alpha, (alpha - 1) / sqrt(n), is above a fifth of alpha - 1 then
# The statistics that the page draws by block and layer type, and the columns of its table; the others are in details.
CHARTED = {"above": "% above the bulk", "below": "% below the bulk", "stable_rank": "stable rank",
           "effective_rank": "effective rank", "alpha": "exponent of the tail", "sigma_max": "largest singular value",
           "ks_mp": "distance from the Marchenko-Pastur law"}  # fmt: skip
PAGE_COLUMNS = ("matrix", "rank", "n_above", "n_below", "sigma_max", "stable_rank", "effective_rank", "alpha", "ks_mp",
                "porter_thomas_input", "porter_thomas_output")
CODE_OF_FIGURES = [Path(__file__).with_name(f"{name}.py") for name in ("figures", "change_figures")]
CSV_LEFT_OUT = ("error", "covariance", "hostname", "started_at", "seconds_decomposition", "seconds_statistics")


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path:
    """Print a summary by layer type, and write spectra.md, CSV files, PNG figures and index.html into <folder>/report/.

    Figures of an earlier report are kept if they show the same rows, drawn by the same code. summary.csv has one row
    per layer type, matrices.csv one row per matrix. With a reference there are also changes.csv and change_regions.csv,
    with one row per control. write: a function that prints the text. Returns the path of spectra.md. Raises
    SchemaVersionError.
    """
    folder = Path(folder)
    out = folder / "report"
    out.mkdir(exist_ok=True)
    matrices = read_spectra(folder, "matrices")
    ok = matrices[matrices["status"] == "ok"].drop(columns=["status", "error"])
    problems = failure_lines(matrices, lambda row: f"{label(row)} {row['matrix']}") + _short_tails(ok)
    safe_for_csv(ok.drop(columns=[name for name in CSV_LEFT_OUT if name in ok])).to_csv(
        out / "matrices.csv", index=False, float_format=CSV_FORMAT
    )
    summary = summarise(ok)
    safe_for_csv(summary).to_csv(out / "summary.csv", index=False, float_format=CSV_FORMAT)
    changes = read_changes(folder)
    figures: list[str] = []
    if can_draw():
        figures = _draw(folder, ok, changes, out)
    else:
        clear(out)
        problems.append(why_no_figures())
    changes.write_csv(out)
    lines = ["# Spectra", "", *map(markdown_text, _headline(ok)), "", *markdown_lines(_cells(summary)), ""]
    lines += changes.markdown()
    lines += [f"- {markdown_text(problem)}" for problem in problems]
    lines += [line for figure in figures for line in (f"![{figure}]({figure})", "")]
    write_text(out / "spectra.md", "\n".join(lines))
    sections = [_section(str(weights), rows) for weights, rows in _with_weights(ok).groupby("weights", sort=False)]
    if not changes.changes.empty:
        real = changes.changes[changes.changes["control"] == "real"]
        sections.append(Section("What tuning did to the weights", changes.sentences(), [
            Chart(f"Relative change of {name}", "|W - W_reference| / |W_reference|; grey: no such matrix.",
                  block_maps(rows, {"relative_change": "relative change"}))
            for name, rows in real.groupby("weights", sort=False)
        ], [frame_table("Changes", changes.changes)]))
    sections.append(Section("Figures", pictures=captioned(out, figures)))
    title, *about = _headline(ok)
    write_run_page(folder, TABLES, matrices, Page(f"Spectra of {title}", _sentence(summary), sections, "; ".join(about),
                                                  problems))
    write("\n".join(map(printable, [*_headline(ok), "", *_text_table(summary), *changes.text(), *problems])))
    write(f"\n{out / 'spectra.md'}, summary.csv, matrices.csv and {count(len(figures), 'figure')}")
    return out / "spectra.md"


def _with_weights(matrices: pandas.DataFrame) -> pandas.DataFrame:
    return matrices.assign(weights=[label(row) for _, row in matrices.iterrows()])


def _sentence(summary: pandas.DataFrame) -> str:
    """Return the result in one sentence for each set of weights."""
    if summary.empty:
        return "No matrix has been measured."
    whole = summary[summary["layer type"] == "all"]
    return "\n".join(
        f"{row['weights']}: {row['outside %']:.2f} % of the singular values of {count(int(row['matrices']), 'matrix')}"
        f" are outside of the Marchenko-Pastur bulk, {row['above']} above and {row['below']} below it.".replace(
            "matrixs", "matrices")
        for row in whole.to_dict("records")
    )


def _section(weights: str, rows: pandas.DataFrame) -> Section:
    shares = rows.assign(above=100 * rows["n_above"] / rows["rank"], below=100 * rows["n_below"] / rows["rank"])
    chart = Chart("Statistics by block and layer type", "Grey: no such matrix. Experts of a block are averaged.",
                  block_maps(shares, CHARTED), "statistic")
    table = frame_table("Matrices", rows.drop(columns=[name for name in CSV_LEFT_OUT if name in rows]),
                        {column.name: column.doc for column in TABLES["matrices"].columns}, PAGE_COLUMNS)
    return Section(weights, charts=[chart] if chart.views else [], tables=[table])


def figure(folder: str | os.PathLike, weights: str | None = None) -> Figure:
    """Return a figure of the singular values of single matrices and the Marchenko-Pastur law.

    weights: "trained", "random" or the name of a checkpoint; by default the first weights in the table. Raises
    InputError if there is nothing to draw.
    """
    require("matplotlib", "plots", "a figure")
    matrices = read_spectra(folder, "matrices")
    matrices = matrices[matrices["status"] == "ok"]
    labels = [label(row) for _, row in matrices.iterrows()]
    chosen = weights or (labels[0] if labels else None)
    rows = matrices[[one == chosen for one in labels]]
    if rows.empty:
        raise InputError(f"{folder}: no matrices of weights {chosen!r}; measured: {', '.join(dict.fromkeys(labels))}")
    values = read_spectra(folder, "singular_values")
    values = values[values["spectrum_id"].isin(rows["spectrum_id"])]
    return spectrum_figure(rows, values, None, figure_text(f"{Path(rows['model'].iloc[0]).name}, {chosen}"))


def label(row: Any) -> str:
    """Return the weights of a row: the name of the checkpoint, "trained" or "random"."""
    checkpoint = row["checkpoint"]  # NaN instead of None if the whole column is null
    return "random" if row["init"] == "random" else checkpoint if isinstance(checkpoint, str) else "trained"


def summarise(matrices: pandas.DataFrame) -> pandas.DataFrame:
    """Return a table with one row for each layer type of each set of weights, and one for all its layer types."""
    import pandas as pd

    rows = []
    matrices = matrices.assign(weights=[label(row) for _, row in matrices.iterrows()])
    for weights, of_weights in matrices.groupby("weights", sort=False):
        groups = [*of_weights.groupby("layer_type", sort=False), ("all", of_weights)]
        for layer_type, group in groups:
            ranks = group["rank"].sum()
            rows.append({
                "weights": weights,
                "layer type": layer_type,
                "matrices": len(group),
                "outside %": 100 * (group["n_above"].sum() + group["n_below"].sum()) / ranks,
                "above": int(group["n_above"].sum()),
                "below": int(group["n_below"].sum()),
                "KS to MP": group["ks_mp"].mean(),
                "stable rank": group["stable_rank"].mean(),
                "alpha": group["alpha"].median(),
                "PT in": group["porter_thomas_input"].mean(),
                "PT out": group["porter_thomas_output"].mean(),
                "overlapping": group["n_overlapping"].sum(min_count=1),
            })  # fmt: skip
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def _short_tails(matrices: pandas.DataFrame) -> list[str]:
    """Return a warning if an exponent rests on few values."""
    short = matrices[matrices["alpha_n"].between(1, SHORT_TAIL - 1)]
    if short.empty:
        return []
    return [f"alpha of {len(short)} of {len(matrices)} matrices rests on fewer than {SHORT_TAIL} singular values"
            " (column alpha_n) and has a standard error of more than a fifth of alpha - 1"]


def _headline(matrices: pandas.DataFrame) -> list[str]:
    if matrices.empty:
        return ["no matrix has been measured"]
    one = matrices.iloc[0]
    values = int(matrices["rank"].sum())
    lines = [
        f"{one['model']} ({one['model_type']}, {one['dtype']}): {len(matrices)} matrices, {values} singular values",
        f"noise by {one['estimator']}, edges {'with' if one['tracy_widom'] else 'without'} the Tracy-Widom margin",
    ]
    tokens = matrices["n_tokens"].dropna()
    if len(tokens):
        lines.append(f"activation covariance over {int(tokens.max())} tokens")
    return lines


def _cells(summary: pandas.DataFrame) -> list[list[str]]:
    import pandas as pd

    def text(name: str, value: Any) -> str:
        if pd.isna(value):
            return "-"
        if isinstance(value, str):
            return value
        return {"outside %": f"{value:.2f}", "KS to MP": f"{value:.3f}", "stable rank": f"{value:.1f}",
                "alpha": f"{value:.2f}", "PT in": f"{value:.2f}", "PT out": f"{value:.2f}"}.get(name, f"{int(value)}")

    return [list(summary.columns), *([text(*pair) for pair in zip(summary.columns, row)] for row in summary.values)]


def _text_table(summary: pandas.DataFrame) -> list[str]:
    return aligned(_cells(summary), n_left=2)


def _draw(folder: Path, matrices: pandas.DataFrame, changes: ChangeTables, out: Path) -> list[str]:
    """Draw the figures that the folder `out` does not hold yet, remove those of others, and return the file names."""
    drawn, record = [], FigureRecord(out)
    values, vectors = read_spectra(folder, "singular_values"), read_spectra(folder, "vectors")

    def draw(name: str, function: Callable[..., object], tables: Sequence[Any], title: str) -> None:
        digest = digest_of([name, *tables, title], CODE_OF_FIGURES)
        if not record.kept(digest):
            function(*tables, out / name, title)
            record.add(digest, [(name, "")])
        drawn.append(name)

    for _, group in matrices.groupby(["init", "checkpoint"], sort=False, dropna=False):
        weights = label(group.iloc[0])
        end, title = f"-{file_stem(weights)}.png", figure_text(f"{Path(matrices['model'].iloc[0]).name}, {weights}")
        same = group["spectrum_id"]
        draw(f"spectrum{end}", spectrum_figure, [group, values[values["spectrum_id"].isin(same)]], title)
        draw(f"outliers{end}", outlier_figure, [group], title)
        if group["overlap_null_mean"].notna().any():
            draw(f"overlap{end}", overlap_figure, [group, vectors[vectors["spectrum_id"].isin(same)]], title)
    if matrices["checkpoint"].nunique() > 1:
        title = figure_text(f"{Path(matrices['model'].iloc[0]).name}, training")
        draw(f"checkpoints-{file_stem('training')}.png", checkpoint_figure, [matrices], title)
    for figure in changes.figures():
        draw(*figure)
    record.close()
    return drawn
