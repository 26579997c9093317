"""One row per matrix."""

from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

NORMS = Table("norms", "one row per matrix", (
    required("unit_id", "string", "Hash of all that the norms of one matrix depend on."),
    required("status", "string", "`ok`, or `error`; then `error` says why."),
    Column("error", "string", "Traceback, null when ok."),
    required("model", "string", "Name of the model."),
    required("matrix", "string", "Name of the matrix."),
    required("layer_type", "string", "Its layer type."),
    Column("frobenius", "float64", "Frobenius norm."),
    Column("largest_row", "float64", "Largest Euclidean norm of a row."),
    *PROVENANCE,
))  # fmt: skip

TABLES = TableSet("norms", 1, (NORMS,), key="unit_id", label=("matrix",))
