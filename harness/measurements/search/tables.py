"""The tables of a search: its stages, and the results of each stage."""

from __future__ import annotations

from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

_STAGE = required("stage_id", "string", "Id of the stage: a hash of all that its rows depend on.")
_TASK = required("task", "string", "Name of the searched task.")
_METRIC = required("metric", "string", "Metric that the search optimises.")

_FLOOR = Column(
    "noise_floor", "float64", "Size of a delta that rounding alone explains (docs/precision.md); null in float32."
)


def _control(name: str, what: str) -> tuple[Column, ...]:
    return (
        Column(f"{name}_draws", "int64", f"Number of measured draws of the control, which removes {what}."),
        Column(f"{name}_delta", "float64", "Mean of the deltas of these draws on the report part."),
        Column(f"{name}_spread", "float64", "Standard deviation of these deltas."),
        Column(f"over_{name}", "float64", "`delta` of the best cell minus their mean."),
        Column(f"over_{name}_p", "float64",
               "Two-sided p-value of the hypothesis that the best cell is one more draw (docs/search.md)."),
    )


_DISJOINT = "but none that the best cell removes; null if too {} are left"

STAGES = Table("stages", "one row per stage", (
    _STAGE,
    required("stage", "string", "`predictions`, `selection`, `report`, `verdict`, `comparison` or `composition`."),
    required("status", "string", "`ok`, or `error` if the stage failed or some of its cells did."),
    Column("error", "string", "Traceback or reason; null if `status` is ok."),
    Column("study_id", "string", "Id of the study that the stage measured; null if it measured none."),
    Column("n_cells", "int64", "Number of cells of this study."),
    Column("n_failed", "int64", "Number of these cells that failed."),
    Column("seconds", "float64", "Wall time of the stage in seconds."),
    *PROVENANCE,
))  # fmt: skip

VERDICT = Table("verdict", "one row per task and metric: the best cell of the grid, judged on the report part", (
    _STAGE, _TASK, _METRIC,
    Column("higher_is_better", "bool", "Whether a larger value is better."),
    required("target", "string", "Target of the best cell."),
    required("region", "string", "Region of the best cell."),
    Column("energy_removed", "float64", "Share of the squared Frobenius norm that the best cell removes."),
    Column("n_tried", "int64", "Number of cells among which the best was chosen."),
    Column("selection_n", "int64", "Number of examples in the selection part."),
    Column("selection_baseline", "float64", "Metric of the unablated model on the selection part."),
    Column("selection_value", "float64", "Metric of the best cell on the selection part."),
    Column("selection_delta", "float64", "`selection_value - selection_baseline`."),
    Column("selection_p", "float64", "Two-sided p-value of `selection_delta` = 0, paired, for this cell alone."),
    Column("selection_p_holm", "float64", "`selection_p`, corrected for all cells that were tried (Holm)."),
    Column("n", "int64", "Number of examples in the report part."),
    Column("baseline", "float64", "Metric of the unablated model on the report part."),
    Column("value", "float64", "Metric of the best cell on the report part."),
    Column("delta", "float64", "`value - baseline`."),
    Column("delta_low", "float64", "Lower end of the 95 % confidence interval of `delta`, paired (docs/precision.md)."),
    Column("delta_high", "float64", "Upper end of this interval."),
    Column("p_value", "float64", "Two-sided p-value of `delta` = 0, paired."),
    _FLOOR,
    *_control("random", "as many values at random positions"),
    *_control("random_disjoint", f"as many values at random positions, {_DISJOINT.format('few')}"),
    *_control("energy_matched", "values at random positions with as much energy"),
    *_control("energy_matched_disjoint",
              f"values at random positions with as much energy, {_DISJOINT.format('small ones')}"),
    *_control("rotated", "as large a singular value in random directions; only for region=component"),
    Column("beats_controls", "bool", "Whether the best cell is better than each control at 5 %; null if one failed."),
    Column("p_holm", "float64", "`p_value`, corrected for the number of rows (Holm)."),
    required("verdict", "string",
             "`yes`, `no more than its controls`, `below the noise floor`, `no` or `failed` (docs/search.md)."),
))  # fmt: skip

BESIDE = Table("beside", "one row per best cell and task without parts: what the cell costs there", (
    _STAGE, _TASK, _METRIC,
    required("beside_task", "string", "Task without parts."),
    required("beside_metric", "string", "First metric of this task."),
    Column("baseline", "float64", "`beside_metric` of the unablated model."),
    Column("value", "float64", "`beside_metric` of the best cell."),
    Column("delta", "float64", "`value - baseline`."),
    Column("p_value", "float64", "Two-sided p-value of `delta` = 0, paired."),
    _FLOOR,
))  # fmt: skip

PREDICTIONS = Table("predictions", "one row per task, metric with a derivative, and ablation", (
    _STAGE, _TASK, _METRIC,
    required("target", "string", "Target of the ablation."),
    required("region", "string", "Region of the ablation."),
    Column("n_removed", "int64", "Number of singular values that the ablation removes."),
    Column("n_examples", "int64", "Number of examples from which the derivative was computed."),
    Column("predicted_delta", "float64", "First-order prediction of the change of the metric."),
    Column("predicted_improvement", "float64", "The same with the sign by which positive is better."),
))  # fmt: skip

COMPARISON = Table("comparison", "one row per task, predicted metric, measured metric and group of cells", (
    _STAGE, _TASK,
    required("predicted", "string", "Metric whose derivative gave the predictions."),
    required("measured", "string", "Metric that was measured."),
    required("cells", "string", "`all`, the label of a region, or `targets`: the best cell of each target."),
    Column("n", "int64", "Number of cells or targets in the group."),
    Column("spearman", "float64", "Spearman's correlation of prediction and measurement; null if one is constant."),
    Column("best_improvement", "float64", "Largest measured improvement in the group."),
    Column("regret_0.05", "float64", "How much smaller it is among the 5 % of the group that are predicted best."),
    Column("regret_0.1", "float64", "The same for 10 %."),
    Column("regret_0.2", "float64", "The same for 20 %."),
))  # fmt: skip

COMPOSITION = Table("composition", "one row per task, metric and step of the greedy composition", (
    _STAGE, _TASK, _METRIC,
    required("step", "string",
             "The block, or for components their place by gain; `report`: all accepted ones on the report part."),
    Column("target", "string", "Target of the candidate."),
    Column("region", "string", "Region of the candidate; for `report` the names of the accepted components."),
    Column("accepted", "bool", "Whether the candidate was accepted; for `report`, whether any was."),
    Column("n", "int64", "Number of examples in the accepting half of the selection part, or in the report part."),
    Column("baseline", "float64", "Metric of the unablated model on these examples."),
    Column("value", "float64", "Metric with the candidate and all ablations that were accepted before."),
    Column("delta", "float64", "`value - baseline`."),
    Column("p_value", "float64", "Two-sided p-value of `delta` = 0, paired."),
))  # fmt: skip

TABLES = TableSet(
    "search", 3, (STAGES, VERDICT, BESIDE, PREDICTIONS, COMPARISON, COMPOSITION), key="stage_id", label=("stage",)
)
