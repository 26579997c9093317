"""The card of an exported model, which says what was removed and what that did."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.engine.hub import write_card
from harness.measurements.ablation.export import ABOUT
from harness.measurements.ablation.tables import read_metrics
from harness.tables.frames import dicts_of
from harness.tables.labels import model_name, region_words
from harness.tables.text import is_missing, markdown_table, markdown_text

MEASURED = ("task", "metric", "baseline", "value", "delta", "delta_stderr", "p_value", "n")


def write_model_card(folder: Path, study: str | None, cell: str | None) -> None:
    """Write the card of an exported model into its folder. study, cell: those that it was exported from, or None.

    The card has what `harness export` wrote about the ablation, and the rows of the cell.
    """
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    rows: Sequence[dict[str, Any]] = ()
    if study is not None and cell is not None:
        metrics = read_metrics(study)
        rows = dicts_of(metrics[metrics["cell_id"].str.startswith(cell) & (metrics["status"] == "ok")])
    front: dict[str, Any] = {"tags": ["spectral-ablation-harness", "singular-value-decomposition"]}
    name = about["model"]
    if "/" in name and not os.path.exists(os.path.expanduser(name)) and about["gguf_file"] is None:
        front |= {"base_model": name, "base_model_relation": "finetune"}
    write_card(folder, "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()), _text(about, rows))


def _text(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    name, what = markdown_text(model_name(about["model"])), markdown_text(region_words(about["region"]))
    revision = f" (revision {about['revision']})" if about["revision"] else ""
    lines = [
        f"# {name}, edited: {markdown_text(about['target'])}, {what}", "",
        f"This is {name}{revision}, in which singular values of {len(about['matrices'])} weight matrices were edited by"
        f" the spectral ablation harness {about['harness_version']}: {what}. These are {about['n_removed']} of"
        f" {about['n_values']} values, with {about['energy_removed']:.4g} of the squared Frobenius norm of those"
        f" matrices. `{ABOUT}` has the details. Nothing was trained.", "",
        "Matrices: " + ", ".join(f"`{one}`" for one in about["matrices"]) + ".", "", "## What it did", "",
    ]
    if not rows:
        how = "`harness export --study FOLDER --cell ID` saves a measured model"
        return "\n".join([*lines, f"It was not measured; {how}."])
    shown = [{key: "" if is_missing(row[key]) else f"{row[key]:.4g}" if isinstance(row[key], float) else row[key]
              for key in MEASURED} for row in rows]
    lines += ["Each row compares this model with the unedited one on the same examples. `delta_stderr` is the standard"
              " error of the change, and `p_value` is paired.", ""]
    return "\n".join([*lines, markdown_table(shown)])
