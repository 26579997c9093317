"""The tables of components, with one row per matrix, per component, and per component and derived metric."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.engine.manifest import read_in_order
from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

if TYPE_CHECKING:
    import pandas

_KEY = (
    required("components_id", "string", "Id of the matrix: a hash of all that its numbers depend on."),
    required("model", "string", "Hugging Face name, local folder, or `recall` for the embedded model."),
    required("matrix", "string", "Name of the matrix, such as `28.up_proj`."),
    required("block", "int64", "Block of the matrix, counted from 0."),
    required("layer_type", "string", "Layer type of the matrix."),
)
_COMPONENT = (
    required("index", "int64", "Position of the component in the spectrum, 0 = the largest value."),
)

MATRICES = (
    *_KEY,
    required("status", "string", "`ok`, or `error` if the matrix could not be measured; `error` then says why."),
    Column("error", "string", "Traceback; null if `status` is ok."),
    Column("n_out", "int64", "Number of outputs of the matrix."),
    Column("n_in", "int64", "Number of its inputs."),
    Column("n_components", "int64", "Number of its singular values."),
    Column("metric", "string", "Spectrum: `weight`, that of W; `activations`, that of W C^(1/2)."),
    Column("of", "string", "`weight`; `change`: the components are those of W - W_reference."),
    Column("calibration", "string", "JSON: the text over which inputs were measured, and whose loss was derived."),
    Column("protocols", "string", "JSON: how each task was measured."),
    Column("gguf_file", "string", "GGUF file from which the weights were read; they are quantised."),
    Column("model_digest", "string", "Hash of the weights, or the commit on the hub."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("dtype", "string", "Type of the weights."),
    Column("reference", "string", "The model with which components are compared; null without one."),
    Column("reference_digest", "string", "Hash of its weights, or of its commit on the hub."),
    Column("svd_method", "string", "Method of the decomposition."),
    Column("svd_reconstruction_error", "float64", "Largest |cosine| between two implied vectors of the longer side."),
    Column("svd_orthogonality_error", "float64", "Largest |U^T U - I|."),
    Column("seconds", "float64", "Wall time of the matrix in seconds, without the passes that all share."),
    Column("device", "string", "Device that measured the matrix."),
    *PROVENANCE,
)

COMPONENTS = (
    *_KEY, *_COMPONENT,
    Column("sigma", "float64", "Singular value, in the metric of the run."),
    Column("energy", "float64", "Its share of the sum of all squared singular values of the matrix."),
    Column("predicted_loss", "float64",
           "First-order change of the calibration text's loss (nats per token) if the component is removed."),
    Column("output_rms", "float64", "Root mean square of the component's output u^T W x over the calibration text."),
    Column("output_mean", "float64", "Mean of this output; u is turned so that it is not negative."),
    Column("constant_share", "float64", "output_mean^2 / output_rms^2: 1 for a bias."),
    Column("output_rank", "int64", "Place of the component by `output_rms` within its matrix, 0 = the largest."),
    Column("mean_cosine", "float64", "Cosine between the input vector and the mean of the matrix's inputs."),
    Column("leading_share", "float64",
           "Share of the input vector in the ten leading eigenvectors of the covariance of the inputs."),
    Column("input_participation", "float64", "Sum of the fourth powers of the input vector: 1 for one coordinate."),
    Column("input_coordinate", "int64", "Coordinate of its largest entry."),
    Column("output_participation", "float64", "The same sum of the output vector."),
    Column("output_coordinate", "int64", "Coordinate of its largest entry."),
    Column("stability_random", "float64",
           "Largest |u.u'| |v.v'| with a component of newly initialised weights: what chance gives."),
    Column("stability_rounded", "float64", "The same with the weights rounded to 4 bits in blocks of 32 inputs."),
    Column("stability_reference", "float64", "The same with the reference: a base, or another checkpoint."),
    Column("promoted", "string", "JSON: the tokens whose logits the output raises most, by final norm and head alone."),
    Column("suppressed", "string",
           "JSON: those that it lowers most. Both are null for q_proj, k_proj and v_proj, and beyond `tokens_of`."),
)

PREDICTIONS = (
    *_KEY, *_COMPONENT,
    required("task", "string", "Name of the task."),
    required("metric", "string", "The metric that was derived."),
    Column("value", "float64", "The metric of the unedited model on these examples."),
    Column("n_examples", "int64", "Number of examples."),
    Column("predicted_delta", "float64", "First-order change of the metric if the component is removed."),
    Column("predicted_improvement", "float64", "The same with the sign by which positive is better."),
)

TABLES = TableSet(
    "components", 1,
    (Table("matrices", "one row per matrix", MATRICES),
     Table("components", "one row per component", COMPONENTS),
     Table("predictions", "one row per component and derived metric of a task", PREDICTIONS)),
    key="components_id", label=("matrix",),
)  # fmt: skip


def read_components(folder: str | os.PathLike, table: str = "components") -> pandas.DataFrame:
    """Return the rows of a table of everything that is done, in the order of the run. Raises SchemaVersionError."""
    return read_in_order(folder, TABLES, table)
