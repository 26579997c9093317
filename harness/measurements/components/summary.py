"""What the report says of components: predictions beside measured effects, and the best and worst of each matrix."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engine.manifest import read_manifest
from harness.errors import InputError
from harness.measurements.ablation.tables import read_metrics
from harness.measurements.components.tables import read_components
from harness.tables.frames import dicts_of
from harness.tables.text import is_missing

if TYPE_CHECKING:
    import pandas

TEXT = "calibration text"  # the task to whose metric "loss" `predicted_loss` belongs
TEN = 10  # so many of the best and the worst are looked for among the predictions


def predicted(folder: Path) -> pandas.DataFrame:
    """Return the first-order predictions of all components: matrix, index, task, metric, predicted_improvement.

    The loss of the calibration text is the task TEXT.
    """
    import pandas

    names = ["matrix", "index", "task", "metric", "predicted_improvement"]
    parts = [read_components(folder, "predictions")]
    components = read_components(folder)
    known = components[components["predicted_loss"].notna()]
    parts.append(known.assign(task=TEXT, metric="loss", predicted_improvement=-known["predicted_loss"]))
    return pandas.concat([part[names] for part in parts if len(part)] or [pandas.DataFrame(columns=names)])


def exact_study(folder: Path) -> str | None:
    """Return the folder of the study whose effects are shown, or None. A relative one is below where the run began."""
    manifest = read_manifest(folder)
    named = manifest.settings.get("exact")
    return None if named is None else str(Path(manifest.content["working_directory"]) / str(named))


def exact(study: str, folder: Path) -> pandas.DataFrame:
    """Return the measured effects of single components in a study, for the spectrum of the run in `folder`.

    Columns: matrix, index, task, metric, cell_id, baseline, delta, delta_stderr, p_value, improvement,
    output_constant_share; only removals count. Raises InputError if the study is of another model or has none.
    """
    rows = read_metrics(study)
    about = read_components(folder, "matrices").iloc[0]
    rows = rows[(rows["status"] == "ok") & rows["component"].notna() & (rows["region_by"] == "component")
                & ~rows["region_keep"].fillna(False).astype(bool) & (rows["region_scale"].fillna(0.0) == 0)
                & (rows["region_replace"].fillna("zero") == "zero")]
    if rows.empty:
        raise InputError(f"exact: {study} has no cell that removes one component; run region=component there")
    if set(rows["model_digest"]) != {about["model_digest"]}:
        raise InputError(f"exact: {study} measured other weights than {folder}; name a study of the same model")
    of = "weight" if is_missing(about["of"]) else about["of"]
    rows = rows[(rows["region_metric"] == about["metric"]) & (rows["region_of"].fillna("weight") == of)]
    if rows.empty:
        raise InputError(f"exact: no cell of {study} is of the spectrum of region.metric={about['metric']} and"
                         f" region.of={of}")
    if of == "change" and set(rows["reference_digest"]) != {about["reference_digest"]}:
        raise InputError(f"exact: {study} measured the change from another reference than {folder}")
    rows = rows.drop_duplicates(["component", "task", "metric"])
    place = rows["component"].str.rpartition(":")
    sign = rows["higher_is_better"].map({True: 1.0, False: -1.0})
    rows = rows.assign(matrix=place[0], index=place[2].astype(int), improvement=rows["delta"] * sign)
    return rows[["matrix", "index", "task", "metric", "cell_id", "baseline", "delta", "delta_stderr", "p_value",
                 "improvement", "output_constant_share"]]


def compared(predictions: pandas.DataFrame, measured: pandas.DataFrame) -> pandas.DataFrame:
    """Return the measured effects with the column `predicted_improvement`, for every (task, metric) of the study.

    The prediction is that of the same task and metric if there is one, else of the same task, else of TEXT. Metrics
    without a prediction have no rows.
    """
    import pandas

    parts = []
    for (task, metric), rows in measured.groupby(["task", "metric"], sort=False):
        of_task = predictions[predictions["task"] == task]
        guess = of_task[of_task["metric"] == metric]
        guess = guess if len(guess) else of_task if len(of_task) else predictions[predictions["task"] == TEXT]
        if len(guess):
            parts.append(rows.merge(guess[["matrix", "index", "predicted_improvement"]], on=["matrix", "index"]))
    return pandas.concat(parts) if parts else measured.iloc[:0].assign(predicted_improvement=math.nan)


def agreement(rows: pandas.DataFrame) -> dict[str, Any]:
    """Return how well predictions rank the measured components of one task and metric.

    n; spearman; found_best, found_worst: which share of the TEN best and of the TEN worst is among the TEN that are
    predicted so. The values are null for fewer than 2 TEN components.
    """
    from scipy.stats import spearmanr

    if len(rows) < 2 * TEN:
        return {"n": len(rows), "spearman": math.nan, "found_best": math.nan, "found_worst": math.nan}
    found: dict[str, Any] = {
        "n": len(rows),
        "spearman": float(spearmanr(rows["predicted_improvement"], rows["improvement"]).statistic),
    }
    for name, ascending in (("best", False), ("worst", True)):
        tens = [set(map(tuple, rows.sort_values(column, ascending=ascending, kind="stable").head(TEN)
                        [["matrix", "index"]].to_numpy())) for column in ("predicted_improvement", "improvement")]
        found[f"found_{name}"] = len(tens[0] & tens[1]) / TEN
    return found


def extremes(rows: pandas.DataFrame, column: str, components: pandas.DataFrame) -> pandas.DataFrame:
    """Return the best and the worst component of each matrix: block, layer_type, and for gain and harm index and value.

    rows: of one task and metric, with matrix, index and `column`, an improvement.
    """
    import pandas

    one_of_each = components.drop_duplicates("matrix")
    about = {row["matrix"]: row for row in dicts_of(one_of_each[["matrix", "block", "layer_type"]])}
    found = []
    for matrix, of_matrix in rows.groupby("matrix", sort=False):
        values = of_matrix[column].to_numpy(float)
        best, worst = of_matrix.iloc[int(values.argmax())], of_matrix.iloc[int(values.argmin())]
        found.append({
            "matrix": matrix, "block": int(about[matrix]["block"]), "layer_type": about[matrix]["layer_type"],
            "n": len(of_matrix), "gain_index": int(best["index"]), "gain": float(best[column]),
            "harm_index": int(worst["index"]), "harm": float(worst[column]),
        })  # fmt: skip
    return pandas.DataFrame(found)
