"""The tables of `harness tune`: the fine-tunings, and what each of them scores on every task."""

from __future__ import annotations

from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

_KEY = (
    required("tuning_id", "string", "Id of the fine-tuning: a hash of all that its numbers depend on."),
    required("order", "string", "`tune`: nothing is removed; `prune_tune`: removed, then trained; `tune_prune`."),
    required("target", "string", "Label of the target; `baseline` for the order `tune`."),
    required("region", "string", "Label of the removed region; `none` for the order `tune`."),
    required("seed", "int64", "Seed of the fine-tuning."),
)

TUNINGS = (
    *_KEY,
    required("status", "string", "`ok`, or `error` if the fine-tuning failed; `error` then says why."),
    Column("error", "string", "Traceback or reason; null if `status` is ok."),
    Column("training_id", "string", "Id of the training, which all regions of one seed share after tuning."),
    Column("train_task", "string", "Name of the task that the model was trained on."),
    Column("method", "string", "`full` or `lora`."),
    Column("steps", "int64", "Number of optimizer steps."),
    Column("n_train", "int64", "Number of training examples."),
    Column("n_trained", "int64", "Number of weights that were trained."),
    Column("train_loss", "float64", "Mean loss over all steps, in nats."),
    Column("region_by", "string", "Rule of the region, as in `metrics` of a study."),
    Column("region_kind", "string", "Kind of the region, as in `metrics` of a study."),
    Column("fraction_start", "float64", "Start of the removed interval as a share of the rank, 0 = the largest value."),
    Column("fraction_stop", "float64", "End of this half-open interval. Both are null if it is not one interval."),
    Column("n_removed", "int64", "Number of removed singular values, summed over the matrices."),
    Column("n_values", "int64", "Number of all singular values, summed over the matrices."),
    Column("energy_removed", "float64", "Removed share of the squared Frobenius norm of all matrices together."),
    Column("realised_removal", "float64", "1 if all of the part is gone after rounding, as in `metrics` of a study."),
    Column("seconds_training", "float64", "Wall time of the training in seconds; null if another unit trained it."),
    Column("seconds", "float64", "Wall time of the unit in seconds."),
    required("model", "string", "Hugging Face name or local folder."),
    Column("revision", "string", "Revision of the model on the hub."),
    Column("model_digest", "string", "Hash of the weights, or the commit on the hub."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("settings", "string", "JSON: the settings of the fine-tuning that the numbers depend on."),
    Column("device", "string", "Device that trained and measured."),
    *PROVENANCE,
)

RESULTS = (
    *_KEY,
    required("task", "string", "Name of the task."),
    required("metric", "string", "Name of the metric; the first of a task is its primary metric."),
    required("value", "float64", "The metric of the tuned model, with the removal if there is one."),
    Column("stderr", "float64", "Standard error of `value` over clusters of examples; null for a single cluster."),
    Column("n", "int64", "Number of examples that were measured."),
    Column("n_clusters", "int64", "Number of their clusters; `n` if examples are independent."),
    Column("higher_is_better", "bool", "Whether a larger value is better."),
    Column("protocol", "string", "JSON: how the task was measured."),
)

TABLES = TableSet(
    "tuning", 1,
    (Table("tunings", "one row per fine-tuning: an order, a target, a region and a seed", TUNINGS),
     Table("results", "one row per fine-tuning, task and metric", RESULTS)),
    key="tuning_id", label=("order", "target", "region", "seed"),
)  # fmt: skip
