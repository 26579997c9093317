"""The tables of a study: `metrics` with one row per cell and metric, and `examples` with the score of each example."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required
from harness.tables.store import read_table, unit_states

if TYPE_CHECKING:
    import pandas

METRICS = (
    required("study_id", "string", "Id of the study: a hash of the ids of its cells."),
    required("cell_id", "string", "Id of the cell: a hash of all that its numbers depend on."),
    required("task", "string", "Name of the task in the study."),
    required("metric", "string", "Name of the metric; the first row of a cell is the task's primary metric."),
    required("status", "string", "`ok`, or `error` if there is no value; the column `error` then says why."),
    Column("error", "string", "Traceback or reason; null if `status` is ok."),
    Column("value", "float64", "The metric; finite whenever `status` is ok."),
    Column("stderr", "float64", "Standard error of `value` over clusters of examples; null for a single cluster."),
    Column("n", "int64", "Number of examples (windows for a text) that were measured."),
    Column("n_clusters", "int64", "Number of their clusters, such as documents; `n` if examples are independent."),
    Column("baseline", "float64", "The metric of the unablated model over all examples."),
    Column("delta", "float64", "`value - baseline`."),
    Column("delta_stderr", "float64", "Standard error of `delta`, paired over examples, over clusters."),
    Column("p_value", "float64", "Two-sided p-value of `delta` = 0, paired, over clusters; null for fewer than three."),
    Column("delta_low", "float64", "Lower end of the paired 95 % interval of `delta`; null if adaptive or without p."),
    Column("delta_high", "float64", "Upper end of this interval, exact for counts of right answers."),
    Column("delta_freedom", "float64", "Degrees of freedom of `delta_stderr`; null if adaptive or if `p_value` is."),
    Column("higher_is_better", "bool", "Whether a larger value is better."),
    Column("ci_low", "float64", "Lower end of the confidence interval of `delta` over all `n_available` examples."),
    Column("ci_high", "float64", "Upper end of this interval. Both are null if `precision` is exact."),
    Column("n_available", "int64", "Number of examples of the task, of which `n` were measured."),
    Column("precision", "string", "`exact`: all examples; `adaptive`: until `delta` is decided (docs/precision.md)."),
    required("model", "string", "Hugging Face name, local folder, or `recall` for the embedded model."),
    Column("revision", "string", "Revision of the model on the hub."),
    Column("gguf_file", "string", "GGUF file from which the weights were read."),
    Column("model_digest", "string", "Hash of the weights (`recall`: of the training), or the commit on the hub."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("dtype", "string", "Type of the weights while scoring."),
    Column("n_blocks", "int64", "Number of transformer blocks of the model."),
    required("target", "string", "Label of the target; `baseline` for the unablated model."),
    required("target_kind", "string", "`matrix`, `type`, `block`, `all`; `baseline`; `control`: nothing is removed."),
    Column("block", "int64", "The block, counted from 0; null when the target spans several."),
    Column("layer_type", "string", "The layer type; null when the target spans several."),
    Column("blocks", "string", "All blocks of the target, such as `0-5` or `0,3`."),
    Column("layer_types", "string", "All layer types of the target, separated by commas."),
    Column("n_matrices", "int64", "Number of matrices that are edited together."),
    required("region", "string", "Label of the region; `none` for the baseline."),
    Column("region_by", "string", "Rule of the region, as in the setting `region.by`, or `control`."),
    Column("region_kind", "string", "`large`, `bulk`, `small`, `decile`, `interval`, `random`, `none`, `above`, ..."),
    Column("fraction_start", "float64", "Start of the removed interval as a share of the rank, 0 = the largest value."),
    Column("fraction_stop", "float64", "End of this half-open interval. Both are null if it is not one interval."),
    Column("region_seed", "int64", "Seed of a random region."),
    Column("region_metric", "string", "Spectrum of the region: `weight`, that of W; `activations`, that of W C^(1/2)."),
    Column("region_keep", "bool", "Whether the region is kept, and all other singular values are removed or scaled."),
    Column(
        "region_scale", "float64",
        "Factor of the removed values; 0 if they are really removed, null if each has its own.",
    ),
    Column("region_replace", "string", "What the removed part becomes: `zero`, or `mean`: its mean, as a bias."),
    Column("region_of", "string", "`weight`; `change`: part of D = W - W_reference; `reference`: D in its directions."),
    Column("reference", "string", "The model that was subtracted: its name or folder; null for parts of the weights."),
    Column("reference_digest", "string", "Hash of its weights, or of its commit on the hub."),
    Column("calibration", "string", "JSON: the text over which the inputs of the matrices were measured."),
    Column("n_removed", "int64", "Number of removed singular values, summed over the matrices."),
    Column("n_values", "int64", "Number of all singular values, summed over the matrices."),
    Column("component", "string", "The one value that is removed, as `28.up_proj:573` (0 = the largest); else null."),
    Column("energy_removed", "float64", "Removed share of the squared Frobenius norm of all matrices together."),
    Column("norm_removed", "float64", "Frobenius norm of the change of all matrices together, before rounding."),
    Column(
        "output_energy_removed", "float64",
        "Removed share of the mean squared outputs over the calibration text; of their variance if `replace` is"
        " `mean`.",
    ),
    Column(
        "output_norm_removed", "float64",
        "Root of the mean squared change of these outputs: the norm of (W - W') C^(1/2).",
    ),
    Column(
        "output_constant_share", "float64",
        "Share of the mean squared outputs of the removed part that is the square of their mean: 1 for a bias.",
    ),
    Column("sigma_max_removed", "float64", "Largest removed singular value, in the metric of the region."),
    Column("sigma_min_removed", "float64", "Smallest removed singular value, in the metric of the region."),
    Column(
        "realised_removal", "float64",
        "1 - |U_r^T W'| / |U_r^T W|, W' being the matrix in effect after rounding: 1 if the whole edit is in effect.",
    ),
    Column("edit", "string", "`weight`: edited weights, rounded; `branch`: outputs computed without the part."),
    Column(
        "svd_method", "string",
        "Method of the decomposition: `gram`, `deflated`, `gesdd`, `gesvd`; several are joined by `+`.",
    ),
    Column(
        "svd_reconstruction_error", "float64",
        "Largest |cosine| between two implied vectors of the longer side, W^T u / sigma.",
    ),
    Column("svd_orthogonality_error", "float64", "Largest |U^T U - I| over the matrices."),
    Column("protocol", "string", "JSON: how the task was measured (data, window, stride, few-shot examples, ...)."),
    Column("settings", "string", "JSON: the other settings that the numbers depend on."),
    Column("seed", "int64", "Seed of the study."),
    Column("seconds", "float64", "Wall time of the cell in seconds."),
    Column("rank", "int64", "Rank of the process that measured the cell."),
    Column("device", "string", "Device that measured the cell."),
    *PROVENANCE,
)

EXAMPLES = (
    required("study_id", "string", "Id of the study, as in `metrics`."),
    required("cell_id", "string", "Id of the cell, as in `metrics`."),
    required("task", "string", "Name of the task in the study."),
    required("metric", "string", "Name of the metric."),
    required("example_id", "string", "Name of the example, unique within the task, the same for all models and cells."),
    required("score", "float64", "Score of the example; the metric is transform(sum(score) / sum(weight))."),
    required("weight", "float64", "Weight of the example, which does not depend on the model."),
    Column("cluster", "int64", "Number of the example's cluster; null if the examples of the metric are independent."),
)

TABLES = TableSet(
    "ablation", 4,
    (Table("metrics", "one row per cell and metric", METRICS),
     Table("examples", "one row per cell, metric and example", EXAMPLES)),
    key="cell_id", label=("target", "region", "task"),
)  # fmt: skip


def read_metrics(folder: str | os.PathLike, cell_ids: Iterable[str] | None = None) -> pandas.DataFrame:
    """Return the table `metrics` of the given cells, by default of all, sorted by cell. Raises SchemaVersionError."""
    return read_table(folder, TABLES, "metrics", cell_ids)


def read_examples(
    folder: str | os.PathLike, cell_ids: Iterable[str] | None = None, task: str | None = None
) -> pandas.DataFrame:
    """Return the table `examples` of the given cells and task, by default of all, sorted by cell.

    Raises SchemaVersionError.
    """
    return read_table(folder, TABLES, "examples", cell_ids, None if task is None else {"task": task})


def cell_states(folder: str | os.PathLike, verify: bool = False) -> dict[str, str]:
    """Return "ok" or "error" by id for every cell that has rows, as `unit_states`."""
    return unit_states(folder, TABLES, verify)
