"""The tables of a comparison: `compare` with a row for each pair of cells, `left_out` with what has no pair."""

from __future__ import annotations

from harness.tables.schema import Column, Table, TableSet, required

COMPARE = (
    required("task", "string", "Name of the task in both studies."),
    required("metric", "string", "Name of the metric."),
    required("target", "string", "Label of the target; `baseline` for the two unablated models."),
    required("region", "string", "Label of the removed region; `none` for the two unablated models."),
    required("model_a", "string", "The model of the first study."),
    required("model_b", "string", "The model that is compared with it."),
    required("n", "int64", "Number of examples, which are the same for both models."),
    Column("value_a", "float64", "The metric of model a with the ablation."),
    Column("value_b", "float64", "The metric of model b with the ablation."),
    Column("baseline_a", "float64", "The metric of model a without an ablation."),
    Column("baseline_b", "float64", "The metric of model b without an ablation."),
    Column("delta_a", "float64", "`value_a - baseline_a`; null for the target `baseline`."),
    Column("delta_b", "float64", "`value_b - baseline_b`; null for the target `baseline`."),
    Column("difference", "float64", "`delta_b - delta_a`; for the target `baseline`, `value_b - value_a`."),
    Column("difference_stderr", "float64",
           "Standard error of `difference`, paired over examples, over clusters; null for a single cluster."),
    Column("p_value", "float64", "Two-sided p-value of `difference` = 0, paired, over clusters, for this row alone."),
    Column("p_holm", "float64",
           "`p_value`, corrected for all ablations of this task and metric over all pairs of models (Holm); that of a"
           " `baseline` for the number of pairs."),
    Column("energy_removed_a", "float64", "Share of the squared Frobenius norm that was removed from model a."),
    Column("energy_removed_b", "float64", "Share of the squared Frobenius norm that was removed from model b."),
    Column("protocol_a", "string", "JSON: how the task was measured on model a."),
    Column("protocol_b", "string", "JSON: how the task was measured on model b."),
)

LEFT_OUT = (
    required("task", "string", "Name of the task."),
    Column("metric", "string", "Name of the metric; null for all metrics of the task."),
    Column("target", "string", "Label of the target; null for all targets."),
    Column("region", "string", "Label of the region; null for all regions."),
    required("model_a", "string", "The model of the first study."),
    required("model_b", "string", "The model that is compared with it."),
    required("reason", "string", "Why there is no row in `compare`."),
)

TABLES = TableSet(
    "comparison", 1,
    (Table("compare", "one row per pair of models, and per task, metric, target and region that both studies have",
           COMPARE),
     Table("left_out", "one row per task, metric or cell that was not compared", LEFT_OUT)),
    key="task",
)  # fmt: skip
