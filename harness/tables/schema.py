"""The columns of the two tables, in order, with their types and meaning. Pure data: pyarrow only when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SCHEMA_VERSION = 1
VERSION_KEY = b"harness.schema_version"
TABLE_KEY = b"harness.table"


class SchemaVersionError(ValueError):
    """A parquet file was written under another schema version (or is not one of ours)."""


@dataclass(frozen=True)
class Column:
    """One column. type: "string" | "float64" | "int64" | "bool". required: never null."""

    name: str
    type: str
    doc: str
    required: bool = False


def required(name: str, type: str, doc: str) -> Column:
    return Column(name, type, doc, required=True)


METRICS = (
    required("study_id", "string", "Hash of the study's manifest."),
    required("cell_id", "string", "Hash of all that the number depends on: one ablation of one model on one task."),
    required("task", "string", "Name of the task in the study."),
    required("metric", "string", "Name of the metric; the first one of a cell is the task's primary metric."),
    required("status", "string", "`ok`, or `error` when this number could not be had; then `error` says why."),
    Column("error", "string", "Traceback or reason, null when ok."),
    Column("value", "float64", "The metric; finite whenever `status` is ok."),
    Column("stderr", "float64", "Standard error of `value` over examples."),
    Column("n", "int64", "Examples (or windows) behind `value`."),
    Column("baseline", "float64", "The same metric of the unablated model on the same examples."),
    Column("delta", "float64", "`value - baseline`."),
    Column("delta_stderr", "float64", "Standard error of `delta`, paired over examples."),
    Column("p_value", "float64", "Two-sided p-value of `delta` = 0, paired, of this cell alone; reports adjust it."),
    Column("higher_is_better", "bool", "Whether a larger value is a better one."),
    Column("ci_low", "float64", "Adaptive: lower end of the interval of the `delta` over all `n_available` examples."),
    Column("ci_high", "float64", "Its upper end. The confidence is in `settings`; exact: null, as there is no doubt."),
    Column("n_available", "int64", "Examples that the task has, of which `n` were used."),
    Column("precision", "string", "`exact`, or `adaptive`: stopped once its delta was decided; docs/precision.md."),
    required("model", "string", "Hugging Face name, local folder, or `recall`."),
    Column("revision", "string", "Revision of the model on the hub."),
    Column("gguf_file", "string", "GGUF file that the weights came from."),
    Column("model_digest", "string", "Hash of the weights as loaded."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("dtype", "string", "Type of the weights while scoring."),
    Column("n_blocks", "int64", "Transformer blocks of the model."),
    required("target", "string", "Label of the target; `baseline` for the unablated model."),
    required("target_kind", "string", "`matrix`, `type`, `block`, `all`, `baseline`, `control` (nothing removed)."),
    Column("block", "int64", "The block, counted from 0; null when the target spans several."),
    Column("layer_type", "string", "The layer type; null when the target spans several."),
    Column("blocks", "string", "All blocks of the target, such as `0-5` or `0,3`."),
    Column("layer_types", "string", "All layer types of the target, separated by commas."),
    Column("n_matrices", "int64", "Matrices edited together."),
    required("region", "string", "Label of the region; `none` for the baseline."),
    Column("region_by", "string", "Its measure: fraction, decile, index, energy, mp, gavish_donoho, control."),
    Column("region_kind", "string", "`large`, `bulk`, `small`, `decile`, `interval`, `random`, `none`, `above`, ..."),
    Column("fraction_start", "float64", "Start of the removed interval in descending rank, 0 = the largest value."),
    Column("fraction_stop", "float64", "End of the removed interval, half-open; null when it is not one interval."),
    Column("region_seed", "int64", "Seed of a random region."),
    Column("n_removed", "int64", "Singular values removed, summed over the matrices."),
    Column("n_values", "int64", "Singular values there are, summed over the matrices."),
    Column("energy_removed", "float64", "Share of the squared Frobenius norm removed, over all matrices."),
    Column("sigma_max_removed", "float64", "Largest singular value removed."),
    Column("sigma_min_removed", "float64", "Smallest singular value removed."),
    Column(
        "realised_removal", "float64",
        "1 - |U_r^T W'| / |U_r^T W| with W' as it ran, after the cast (a branch: in float32): 1 = all is gone.",
    ),
    Column("edit", "string", "`weight`: weights edited and cast; `branch`: outputs without the part, in float32."),
    Column("svd_method", "string", "Decomposition used: `gram`, `gesdd`, `gesvd`; several joined by `+`."),
    Column(
        "svd_reconstruction_error", "float64",
        "Largest |cosine| between two implied vectors of the longer side, W^T u / sigma.",
    ),
    Column("svd_orthogonality_error", "float64", "Largest |U^T U - I| over the matrices."),
    Column("protocol", "string", "JSON: how the task was measured (windows, stride, few-shot, prompt, ...)."),
    Column("settings", "string", "JSON: everything else that the number depends on."),
    Column("seed", "int64", "Seed of the study."),
    Column("seconds", "float64", "Wall time of the cell, in seconds."),
    Column("started_at", "string", "When the process started, UTC, ISO 8601."),
    Column("rank", "int64", "Rank of the process that measured it."),
    Column("hostname", "string", "Machine that measured it."),
    Column("device", "string", "Device that measured it."),
    Column("harness_version", "string", "Version of this package."),
    Column("git_commit", "string", "Commit of the checkout, `+dirty` with local changes; null when installed."),
    Column("torch_version", "string", "Version of torch."),
    Column("transformers_version", "string", "Version of transformers."),
    Column("python_version", "string", "Version of Python."),
)

EXAMPLES = (
    required("study_id", "string", "Hash of the study's manifest."),
    required("cell_id", "string", "The cell, as in `metrics`."),
    required("task", "string", "Name of the task in the study."),
    required("metric", "string", "Name of the metric."),
    required("example_id", "string", "The example, unique within the task; the same for every model and cell."),
    required("score", "float64", "What it adds to the sum; the metric is transform(sum(score) / sum(weight))."),
    required("weight", "float64", "What the example adds to the count; does not depend on the model."),
)

TABLES = {"metrics": METRICS, "examples": EXAMPLES}


def column_names(table: str) -> tuple[str, ...]:
    return tuple(column.name for column in TABLES[table])


def blank_row() -> dict[str, None]:
    """A metrics row with every column present and null, to be filled in."""
    return dict.fromkeys(column_names("metrics"))


def arrow_schema(table: str):
    """The pyarrow.Schema of "metrics" or "examples"; its metadata carries the schema version and the table's name."""
    return schema_of_columns(TABLES[table], table, str(SCHEMA_VERSION))


def schema_of_columns(columns: Sequence[Column], table: str, version: str):
    """The pyarrow.Schema of some columns; its metadata carries the version and the table's name."""
    import pyarrow as pa

    types = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_()}
    return pa.schema(
        [pa.field(c.name, types[c.type], nullable=not c.required) for c in columns],
        metadata={VERSION_KEY: version.encode(), TABLE_KEY: table.encode()},
    )


def check_metadata(path, metadata: dict | None) -> None:
    """Raise SchemaVersionError unless `metadata` (of the parquet file at `path`) carries this schema version."""
    found = (metadata or {}).get(VERSION_KEY, b"none").decode(errors="replace")
    if found != str(SCHEMA_VERSION):
        raise SchemaVersionError(
            f"{path}: written under schema version {found}, this harness reads version {SCHEMA_VERSION}; "
            "choose a new output folder, or use the harness version that wrote this one"
        )


def tables_markdown(introduction: Sequence[str], tables: Mapping[str, Sequence[Column]], titles: Mapping[str, str]):
    """A page of docs/: the introduction, then every column of every table."""
    lines = [*introduction]
    for table, columns in tables.items():
        lines += ["", f"## {table}: {titles[table]}", "", "| column | type | meaning |", "|---|---|---|"]
        for c in columns:
            doc = c.doc.replace("|", "\\|")
            lines.append(f"| `{c.name}`{'*' if c.required else ''} | {c.type} | {doc} |")
    return "\n".join(lines) + "\n"


def schema_markdown() -> str:
    """The page docs/tables.md."""
    introduction = [
        "# Tables",
        "",
        f"Schema version {SCHEMA_VERSION}. Written by `python -m harness.tables.schema > docs/tables.md`.",
        "Columns marked * are never null.",
    ]
    titles = {
        "metrics": "one row per cell and metric",
        "examples": "one row per cell, metric and example",
    }
    return tables_markdown(introduction, TABLES, titles)


if __name__ == "__main__":
    print(schema_markdown(), end="")
