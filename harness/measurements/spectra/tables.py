"""The tables of spectra, with one row per matrix, per singular value, and per singular vector.

With a reference there are three more: of the change of each matrix, of its tenths, and of pairs of changes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.engine.manifest import read_in_order
from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

if TYPE_CHECKING:
    import pandas

_KEY = (
    required("spectrum_id", "string", "Id of the matrix in this run: a hash of all that its numbers depend on."),
    required("model", "string", "Hugging Face name, local folder, or `recall` for the embedded model."),
    Column("checkpoint", "string", "The checkpoint as named in `revisions`; null without revisions."),
    required("init", "string", "`trained`, or `random`: newly initialised weights."),
    required("matrix", "string", "Name of the matrix, such as `3.down_proj`."),
    required("block", "int64", "The block, counted from 0."),
    required("layer_type", "string", "The layer type."),
)

MATRICES = (
    *_KEY,
    required("status", "string", "`ok`, or `error` if the matrix could not be measured; `error` then says why."),
    Column("error", "string", "Traceback; null if `status` is ok."),
    Column("checkpoint_index", "int64", "Position of the checkpoint in `revisions`, from 0; null without revisions."),
    Column("seed", "int64", "Seed of newly initialised weights; null for trained weights."),
    Column("expert", "int64", "The expert if the block has several; else null."),
    required("n_out", "int64", "Number of rows of the matrix, which are its outputs."),
    required("n_in", "int64", "Number of columns of the matrix, which are its inputs."),
    required("rank", "int64", "r = min(n_out, n_in), the number of singular values."),
    Column("entry_std", "float64", "Root mean square of the entries, which is the noise of a purely random matrix."),
    Column("sigma_max", "float64", "Largest singular value."),
    Column("sigma_median", "float64", "Median singular value."),
    Column("sigma_min", "float64", "Smallest singular value."),
    Column("condition", "float64", "sigma_max / sigma_min; infinite if a singular value is zero."),
    Column("frobenius_norm", "float64", "Square root of the sum of sigma^2."),
    Column("stable_rank", "float64", "Sum of sigma^2 / sigma_max^2."),
    Column("participation_ratio", "float64", "(sum of sigma^2)^2 / sum of sigma^4."),
    Column("spectral_entropy", "float64", "-sum p ln p in nats, p = sigma^2 / sum of sigma^2; at most ln r."),
    Column("effective_rank", "float64", "exp(-sum p ln p), p = sigma / sum of sigma (Roy and Vetterli 2007)."),
    required("estimator", "string", "Estimator of the noise: gavish_donoho, usvt (the same), or bulk_fit."),
    required("tracy_widom", "bool", "Whether the edges include the Tracy-Widom margin of a finite matrix."),
    Column("noise", "float64", "Standard deviation of the random entries that explain the bulk, as estimated."),
    Column("edge_lower", "float64", "Lower edge of the Marchenko-Pastur bulk, in units of sigma."),
    Column("edge_upper", "float64", "Upper edge of the Marchenko-Pastur bulk, in units of sigma."),
    Column("n_above", "int64", "Number of singular values above the upper edge."),
    Column("n_below", "int64", "Number of singular values below the lower edge; 0 for a square matrix."),
    Column("share_outside", "float64", "(n_above + n_below) / r, which is about 0 for noise."),
    Column("energy_above", "float64", "Share of the squared Frobenius norm in the values above the upper edge."),
    Column("ks_mp", "float64", "Kolmogorov-Smirnov distance of all singular values from the Marchenko-Pastur law."),
    Column("ks_mp_inside", "float64", "The same for the values between the edges without margin; null if none is."),
    Column("alpha", "float64", "Exponent of a power law that is fitted to the tail of sigma^2."),
    Column("alpha_ks", "float64", "Kolmogorov-Smirnov distance of the tail from this power law."),
    Column("alpha_xmin", "float64", "Value of sigma^2 at which the tail begins, chosen for the least `alpha_ks`."),
    Column("alpha_n", "int64", "Number of singular values in the tail."),
    Column("porter_thomas_input", "float64", "Mean Porter-Thomas p-value of the input vectors; 0.5 for noise."),
    Column("porter_thomas_output", "float64", "Mean Porter-Thomas p-value of the output vectors; 0.5 for noise."),
    Column("overlap_null_mean", "float64", "Mean overlap of a random unit vector with the covariance eigenvectors."),
    Column("overlap_null_std", "float64", "Standard deviation of this overlap; the band is the mean -+ 3 of these."),
    Column("n_overlapping", "int64", "Number of input vectors, of all r, whose overlap is above the band."),
    Column("n_overlapping_above", "int64", "Number of these whose singular value is above the upper edge."),
    Column("n_overlapping_below", "int64", "Number of these whose singular value is below the lower edge."),
    Column("n_tokens", "int64", "Number of tokens in the activation covariance; null without a task."),
    Column("n_directions", "int64", "Number of eigenvectors of the covariance that are not rounding noise."),
    Column("covariance", "string", "JSON: the text of the covariance, and how it was cut into sequences."),
    Column("svd_method", "string", "Method of the decomposition: `gram`, `deflated`, `gesdd` or `gesvd`."),
    Column("svd_reconstruction_error", "float64", "Largest |cosine| of two implied vectors of the longer side."),
    Column("svd_orthogonality_error", "float64", "Largest |U^T U - I| of the vectors of the smaller side."),
    Column("seconds_decomposition", "float64", "Wall time of the decomposition in seconds."),
    Column("seconds_statistics", "float64", "Wall time of the statistics in seconds."),
    Column("weights", "string", "`streamed` from the checkpoint, `loaded` with the model, or `initialised`."),
    Column("gguf_file", "string", "GGUF file from which the weights were read."),
    Column("model_digest", "string", "Hash of the weights (`recall`: of the training), or the commit on the hub."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("dtype", "string", "Type of the weights."),
    Column("device", "string", "Device that measured the matrix."),
    *PROVENANCE,
)

SINGULAR_VALUES = (
    *_KEY,
    required("index", "int64", "Position in descending order; 0 is the largest value."),
    required("sigma", "float64", "The singular value."),
    required("position", "string", "`above`, `inside` or `below` the Marchenko-Pastur bulk."),
)

VECTORS = (
    *_KEY,
    required("side", "string", "`input`: a right singular vector; `output`: a left singular vector."),
    required("index", "int64", "Position of the singular value; 0 is the largest value."),
    Column("porter_thomas_p", "float64", "p-value of the hypothesis that the vector is random (Porter-Thomas)."),
    Column("porter_thomas_p15", "float64", "Mean of `porter_thomas_p` over 15 neighbouring singular values."),
    Column("inverse_participation", "float64", "Sum of entry^4: 1 if localised, about 3 / (n + 2) if random."),
    Column("largest_component", "float64", "Largest |entry|."),
    Column("overlap", "float64", "max |v . f| over the covariance eigenvectors f; input vectors only, with a task."),
    Column("overlap_direction", "int64", "Index of the eigenvector f of this maximum; 0 has the largest variance."),
)

_OF_CHANGE = (
    *_KEY,
    required("reference", "string", "The model whose matrix was subtracted: its name or folder."),
    required("control", "string", "`real`; `rotated`: the same singular values in random directions; `noise`."),
    Column("control_seed", "int64", "Seed of the control; null for the real change."),
)

CHANGES = (
    *_OF_CHANGE,
    required("share_unchanged", "float64", "Share of the entries of the real change that are exactly 0."),
    required("relative_change", "float64", "|D| / |B| with D = W - B, W the tuned matrix and B that of the reference."),
    Column("rounding_floor", "float64", "|D| / |B| if D were only the rounding of W to the type of its checkpoint."),
    Column("reference_sigma_max", "float64", "Largest singular value of the reference."),
    Column("change_sigma_max", "float64", "Largest singular value of the change; this and all below: null if D is 0."),
    Column("change_stable_rank", "float64", "Sum of sigma^2 / sigma_max^2 of the change."),
    Column("change_effective_rank", "float64", "exp of the entropy of sigma / sum of sigma of the change."),
    Column("change_entropy", "float64", "Entropy of sigma^2 / sum of sigma^2 of the change in nats."),
    Column("change_rank_90", "int64", "Number of its largest singular values that hold 90 % of its squared norm."),
    Column("change_n_above", "int64", "Number of its singular values above the Marchenko-Pastur bulk."),
    Column("scaling", "float64", "c for which c sigma_B is nearest to sigma_W."),
    Column("scaling_residual", "float64", "|sigma_W - c sigma_B| / |sigma_W|."),
    Column("rotation_consistency", "float64", "Cosine of U_B^T U_W and V_B^T V_W over the 64 largest singular values."),
    Column("value_share", "float64", "Share of |D|^2 that only scales values of B: sum of (u_i . D v_i)^2 / |D|^2."),
    Column("intruders_output", "int64", "Of the 10 first left vectors of W, those with |cos| < 0.5 to every one of B."),
    Column("intruders_input", "int64", "The same of the right vectors."),
    Column("amplification", "float64", "|D_k| / |U_k^T B V_k| for the k = 10 largest directions U_k, V_k of D."),
    Column("overlap_top_k_output", "float64", "|U_D^T U_B|^2 / k of the k = 10 first left vectors of D and of B."),
    Column("overlap_top_k_input", "float64", "The same of the right vectors."),
    Column("seconds_change", "float64", "Wall time of the row in seconds."),
)

CHANGE_REGIONS = (
    *_OF_CHANGE,
    required("side", "string", "`output`: left singular vectors of the reference; `input`: right ones."),
    required("decile", "int64", "Tenth of the reference's directions; 1 has the largest singular values."),
    required("n_directions", "int64", "Number of directions in the tenth."),
    Column("energy", "float64", "Share of |D|^2 in the tenth: |U_d^T D|^2 / |D|^2, or |D V_d|^2 / |D|^2."),
    Column("energy_expected", "float64", "Share of the dimensions, which is the energy of a change in random ones."),
    Column("energy_ratio", "float64", "energy / energy_expected; null for an empty tenth."),
    Column("sigma_shift", "float64", "Sum of sigma_W / sum of sigma_B - 1, over the values of the tenth."),
    Column("best_cosine", "float64", "Mean over the vectors of W in the tenth of the largest |cos| to a vector of B."),
)

CHANGE_OVERLAPS = (
    *_OF_CHANGE,
    required("other", "string", "The other tuned model, as named in `revisions`."),
    Column("energy_kept_output", "float64", "Share of |D|^2 in the 10 largest left directions of the other change."),
    Column("energy_kept_input", "float64", "The same of the right directions."),
    Column("mode_overlap_output", "float64", "|A^T B|^2 / 10 of the 10 largest left directions of the two changes."),
    Column("mode_overlap_input", "float64", "The same of the right directions."),
    Column("interference", "float64", "Sum of |(U^T U - I) S (V^T V - I)|, the 10 largest directions of both stacked."),
)

TABLES = TableSet(
    "spectra", 1,
    (Table("matrices", "one row per matrix, checkpoint and init", MATRICES),
     Table("singular_values", "one row per singular value", SINGULAR_VALUES),
     Table("vectors", "one row per singular vector; statistics of a vector that is rounding noise are null", VECTORS),
     Table("changes", "one row per matrix and control, with a reference; |.| is the Frobenius norm", CHANGES),
     Table("change_regions", "one row per matrix, control, side and tenth of the directions of B", CHANGE_REGIONS),
     Table("change_overlaps", "one row per matrix, control and pair of tuned models, in both orders", CHANGE_OVERLAPS)),
    key="spectrum_id", label=("checkpoint", "init", "matrix"),
)  # fmt: skip


def read_spectra(folder: str | os.PathLike, table: str) -> pandas.DataFrame:
    """Return the rows of a table, such as "matrices" or "changes", of everything that is done, in the order of the run.

    Raises SchemaVersionError.
    """
    return read_in_order(folder, TABLES, table)
