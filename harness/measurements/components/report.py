"""The report of components: the atlas of a model with a card for each of the components that matter most."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.page import PAGE, write_run_page
from harness.errors import InputError, printable
from harness.files import write_text
from harness.measurements.ablation.tables import read_examples, read_metrics
from harness.measurements.components import figures, summary
from harness.measurements.components.page import Effect, components_page
from harness.measurements.components.tables import TABLES, read_components
from harness.tables.drawing import can_draw, remove_figures, why_no_figures
from harness.tables.failures import failure_lines
from harness.tables.text import (
    aligned,
    count,
    figure_text,
    file_stem,
    is_missing,
    markdown_lines,
    markdown_text,
    safe_for_csv,
)

if TYPE_CHECKING:
    import pandas

CARDS = 5  # of the components with the largest gain, and as many of those with the largest harm
EXAMPLES = 3  # those that change most, on the card of a component that was measured


def report(folder: str | os.PathLike, write: Callable[[str], object] = print) -> Path | None:
    """Print a summary, and write components.md, index.html, extremes-*.csv and PNG figures into <folder>/report/.

    Effects are those that the study named by the setting `exact` has measured; where it has none, and without such a
    study, they are first-order predictions. write: a function that prints the text. Returns the path of components.md,
    or None if nothing has been measured. Raises InputError if the study does not fit the run.
    """
    folder = Path(folder)
    matrices = read_components(folder, "matrices")
    if matrices.empty:
        write(f"{folder}: no matrix has been measured yet")
        return None
    out = folder / "report"
    out.mkdir(exist_ok=True)
    remove_figures(out)
    problems = failure_lines(matrices, lambda row: row["matrix"])
    if not can_draw():
        problems.append(why_no_figures())
    lines = ["# Components", "", *(markdown_text(line) for line in _headline(matrices)), ""]
    components, predictions = read_components(folder), summary.predicted(folder)
    study = summary.exact_study(folder)
    if study is not None and not Path(study).is_dir():
        raise InputError(f"exact: no folder {study}; run that study first, or leave it out")
    measured = None if study is None else summary.exact(study, folder)
    tables: list[list[list[str]]] = []
    if measured is not None:
        rows = summary.compared(predictions, measured)
        tables.append(_agreement_cells(rows))
        lines += ["## First order beside measurements", "", *markdown_lines(tables[-1]), ""]
        lines += _drawn_predictions(rows, out)
    effects = _effects(predictions, measured)
    for (task, metric), of_metric, column in effects:
        extremes = summary.extremes(of_metric, column, components)
        stem = f"extremes-{file_stem(task, metric)}"
        safe_for_csv(extremes).to_csv(out / f"{stem}.csv", index=False, float_format="%.6g")
        what = "measured" if column == "improvement" else "predicted to first order"
        lines += [f"## {markdown_text(task)}: {markdown_text(metric)}, {what}", ""]
        if can_draw():
            figures.atlas(extremes, out / f"{stem}.png", figure_text(f"{task}, {metric}, {what}"))
            lines += [f"![{stem}]({stem}.png)", ""]
        lines += [*markdown_lines(_extreme_cells(extremes)), ""]
        lines += _cards(of_metric, column, components, study)
    lines += [f"- {markdown_text(problem)}" for problem in problems]
    write_text(out / "components.md", "\n".join(lines) + "\n")
    shown = [Effect(*names, column, of_metric) for names, of_metric, column in effects]
    page = components_page(shown, components, study, _headline(matrices), problems)
    write_run_page(folder, TABLES, matrices, page)
    for table in tables:
        write("\n".join(map(printable, aligned(table, 2))))
    write("\n".join(map(printable, [*_headline(matrices), *problems])))
    write(f"\n{out / PAGE}, components.md and {count(len(list(out.glob('*.png'))), 'figure')}")
    return out / "components.md"


def _headline(matrices: pandas.DataFrame) -> list[str]:
    one = matrices.iloc[0]
    ok = matrices[matrices["status"] == "ok"]
    spectrum = f"the {one['metric']}s".replace("activationss", "activations")
    if one["of"] == "change":
        spectrum = f"the change from {one['reference']}"
    lines = [f"{one['model']} ({one['model_type']}, {one['dtype']}): {int(ok['n_components'].sum())} components of"
             f" {count(len(ok), 'matrix').replace('matrixs', 'matrices')}, spectrum of {spectrum}"]
    if not is_missing(one["gguf_file"]):
        lines.append(f"The weights are quantised ({one['gguf_file']}): small singular values hold the error of that.")
    lines.append("An improvement is a change of the metric if the component is removed, positive where that is better.")
    return lines


def _effects(
    predictions: pandas.DataFrame, measured: pandas.DataFrame | None
) -> list[tuple[tuple[str, str], pandas.DataFrame, str]]:
    """Return what the atlas shows: (task, metric), its rows, and the column of the improvement.

    Of every task that was measured these are its first metric and the one that was derived.
    """
    shown = []
    if measured is not None:
        derived = set(predictions.drop_duplicates(["task", "metric"])[["task", "metric"]].itertuples(index=False))
        first = set(measured.drop_duplicates("task")[["task", "metric"]].itertuples(index=False))
        for (task, metric), rows in measured.groupby(["task", "metric"], sort=False):
            if (task, metric) in derived | first:
                shown.append(((str(task), str(metric)), rows, "improvement"))
    for (task, metric), rows in predictions.groupby(["task", "metric"], sort=False):
        shown.append(((str(task), str(metric)), rows, "predicted_improvement"))
    return shown


def _agreement_cells(rows: pandas.DataFrame) -> list[list[str]]:
    cells = [["task", "metric", "components", "rank correlation", "of the 10 best", "of the 10 worst"]]
    for (task, metric), of_metric in rows.groupby(["task", "metric"], sort=False):
        found = summary.agreement(of_metric)
        cells.append([str(task), str(metric), str(found["n"]), f"{found['spearman']:.3f}",
                      f"{found['found_best']:.0%}", f"{found['found_worst']:.0%}"])
    return cells


def _drawn_predictions(rows: pandas.DataFrame, out: Path) -> list[str]:
    lines = []
    for (task, metric), of_metric in rows.groupby(["task", "metric"], sort=False):
        if can_draw() and metric == rows[rows["task"] == task]["metric"].iloc[0]:
            stem = f"prediction-{file_stem(str(task), str(metric))}"
            figures.prediction_figure(of_metric, out / f"{stem}.png", figure_text(f"{task}, {metric}"))
            lines += [f"![{stem}]({stem}.png)", ""]
    return lines


def _extreme_cells(extremes: pandas.DataFrame) -> list[list[str]]:
    head = ["matrix", "components", "largest gain", "its position", "largest harm", "its position"]
    return [head, *([row["matrix"], str(row["n"]), f"{row['gain']:+.4g}", str(row["gain_index"]),
                     f"{row['harm']:+.4g}", str(row["harm_index"])] for _, row in extremes.iterrows())]


def _cards(rows: pandas.DataFrame, column: str, components: pandas.DataFrame, study: str | None) -> list[str]:
    """Return a card for each of the components with the largest gain and the largest harm."""
    about = components.set_index(["matrix", "index"])
    ordered = rows.sort_values(column, ascending=False, kind="stable")
    gain = ordered[ordered[column] > 0].head(CARDS)
    harm = ordered[ordered[column] < 0].iloc[::-1].head(CARDS)
    lines = []
    for title, chosen in (("gain", gain), ("harm", harm)):
        if chosen.empty:
            continue
        lines += [f"### Largest {title}", ""]
        for _, row in chosen.iterrows():
            one = about.loc[(row["matrix"], row["index"])]
            lines += [f"**{markdown_text(row['matrix'])}:{row['index']}**, improvement {row[column]:+.4g}", ""]
            lines += [f"- {line}" for line in _card(row, one, study if column == "improvement" else None)] + [""]
    return lines


def _card(row: Any, one: Any, study: str | None) -> list[str]:
    lines = [f"singular value {one['sigma']:.4g}, {one['energy']:.2%} of the energy of its matrix"]
    if not is_missing(one["output_rms"]):
        lines.append(f"output: root mean square {one['output_rms']:.4g} (place {int(one['output_rank'])} of its"
                     f" matrix, 0 = the largest), mean {one['output_mean']:.4g}, {one['constant_share']:.0%} constant")
        lines.append(f"input vector: cosine {one['mean_cosine']:.2f} with the mean input, {one['leading_share']:.0%} in"
                     " the ten leading directions of the inputs")
    lines.append(f"concentration: input {one['input_participation']:.3f} (largest at coordinate"
                 f" {int(one['input_coordinate'])}), output {one['output_participation']:.3f} (coordinate"
                 f" {int(one['output_coordinate'])}); 1 is one coordinate")
    found = [f"{name} {one[f'stability_{name}']:.2f}" for name in ("random", "rounded", "reference")
             if not is_missing(one[f"stability_{name}"])]
    if found:
        lines.append(f"found again in weights that are: {', '.join(found)}")
    for name in ("promoted", "suppressed"):
        if not is_missing(one[name]):
            lines.append(f"{name}: {markdown_text(', '.join(map(repr, json.loads(one[name]))))}")
    if study is not None and not is_missing(row["p_value"]):
        lines.append(f"measured: delta {row['delta']:+.4g} of {row['baseline']:.4g}, p {row['p_value']:.2g}")
    if study is not None:
        lines += _changed_examples(row, study)
    return lines


def _changed_examples(row: Any, study: str) -> list[str]:
    """Return the examples whose score changes most, if the study has kept its examples."""
    metrics = read_metrics(study)
    baseline = metrics[(metrics["target"] == "baseline") & (metrics["task"] == row["task"])]["cell_id"]
    if baseline.empty:
        return []
    examples = read_examples(study, cell_ids=[row["cell_id"], baseline.iloc[0]], task=row["task"])
    examples = examples[examples["metric"] == row["metric"]]
    wide = examples.pivot(index="example_id", columns="cell_id", values="score")
    if row["cell_id"] not in wide or baseline.iloc[0] not in wide:
        return []
    change = wide[row["cell_id"]] - wide[baseline.iloc[0]]
    most = change.reindex(change.abs().sort_values(ascending=False, kind="stable").index).head(EXAMPLES)
    return ["examples that change most: " + ", ".join(f"{markdown_text(str(name))} {value:+.3g}"
                                                     for name, value in most.items())]
