"""The tables of coupling, with one row per Jacobian, per pair of Jacobians, per trajectory, and per point of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from harness.engine.manifest import read_in_order
from harness.tables.schema import PROVENANCE, Column, Table, TableSet, required

if TYPE_CHECKING:
    import pandas

_KEY = (
    required("coupling_id", "string", "Id of the prompt with these weights: a hash of all that its numbers depend on."),
    required("model", "string", "Hugging Face name, local folder, or `recall` for the embedded model."),
    Column("checkpoint", "string", "The checkpoint as named in `revisions`; null without revisions."),
    required("init", "string", "`trained`; `random`: newly initialised; `reference`: the model of `reference.name`."),
    Column("target", "string", "The matrices from which the ablation removes a region; null for unedited weights."),
    Column("region", "string", "The region of each of these matrices that is removed; null for unedited weights."),
    required("prompt_id", "string", "The prompt: the number of its sequence in the task."),
)

JACOBIANS = (
    *_KEY,
    required("status", "string", "`ok`, or `error` if the prompt could not be measured; `error` then says why."),
    Column("error", "string", "Traceback; null if `status` is ok."),
    Column("checkpoint_index", "int64", "Position of the checkpoint in `revisions`, from 0; null without revisions."),
    Column("seed", "int64", "Seed of newly initialised weights; null for trained weights."),
    Column("n_tokens", "int64", "Number of tokens of the prompt."),
    Column("n_blocks", "int64", "Number of blocks of the model, L."),
    Column("width", "int64", "Width of the residual stream, d."),
    Column("block", "int64", "The block, counted from 0."),
    Column("token_in", "int64", "Position of the token to whose entering state the derivative is taken."),
    Column("token_out", "int64", "Position of the token whose output is derived; not before `token_in`."),
    Column("sigma_max", "float64", "Largest singular value of the residual Jacobian."),
    Column("frobenius_norm", "float64", "Its Frobenius norm; estimated outside of the basis if `method` is krylov."),
    Column("effective_rank", "float64", "exp(-sum p ln p), p = sigma / sum of sigma; dense only."),
    Column("symmetry", "float64", "||(J + J^T) / 2||_F^2 / ||J||_F^2; 1/2 for independent entries; dense only."),
    Column("departure_normality", "float64", "sqrt(1 - sum |eigenvalue|^2 / ||J||_F^2); 0 if normal; dense only."),
    Column("product_effective_rank", "float64", "Effective rank of (I + J) times that of all blocks before."),
    Column("gap_k", "float64", "sigma_K / sigma_{K+1} at the largest K; near 1 the K-th vectors are not determined."),
    Column("method", "string", "`dense`, or `krylov`: by products alone."),
    Column("path", "string", "`one_token`: the block runs on one row with a cache; `whole`: on the whole sequence."),
    Column("n_products", "int64", "Products with the Jacobian or its transpose, without those for the pairs."),
    Column("residual_error", "float64", "Largest ||J^T u - sigma v|| of the K triples, relative to sigma_max."),
    Column("path_error", "float64", "What the block adds on this path against the whole sequence, relative."),
    Column("seconds", "float64", "Wall time of this Jacobian and its triples in seconds."),
    Column("protocol", "string", "JSON: the task of the prompts, and how it was cut into sequences."),
    Column("energy_removed", "float64", "Share of the squared Frobenius norm of the target that the ablation removes."),
    Column("realised_removal", "float64", "1 if the removed part is gone after rounding, as in the table `metrics`."),
    Column("gguf_file", "string", "GGUF file from which the weights were read."),
    Column("model_digest", "string", "Hash of the weights (`recall`: of the training), or the commit on the hub."),
    Column("model_type", "string", "Architecture, as in the model's own config."),
    Column("dtype", "string", "Type of the weights."),
    Column("device", "string", "Device that measured the prompt."),
    *PROVENANCE,
)

COUPLINGS = (
    *_KEY,
    required("kind", "string", "What differs between i and j: `depth` the block; `self` the token; `context_in` the"
                               " input token; `context_out` the output token."),
    required("order", "string", "`ujv`: U_j^T J_i V_j, as in the paper; `vju`: V_j^T J_i U_j."),
    required("k", "int64", "Number of leading singular triples, K."),
    required("block_i", "int64", "The block of the Jacobian."),
    required("block_j", "int64", "The block of the vectors."),
    required("token_in_i", "int64", "Position of the input token of the Jacobian."),
    required("token_out_i", "int64", "Position of the output token of the Jacobian."),
    required("token_in_j", "int64", "Position of the input token of the vectors."),
    required("token_out_j", "int64", "Position of the output token of the vectors."),
    Column("m", "float64", "||U_j^T J_i V_j - S_i||_F / ||S_i||_F, the value of the paper; 0 is perfect."),
    Column("m_abs", "float64", "The same with the absolute value of every entry, the value of the released code."),
    Column("m_null", "float64", "What unrelated vectors give for `m`: sqrt(1 + K^2 ||J_i||_F^2 / (d^2 ||S_i||_F^2))."),
    Column("m_abs_null", "float64", "What unrelated vectors give for `m_abs`."),
    Column("coupling", "float64", "1 - m / m_null: 0 for unrelated vectors, 1 for a perfect match, in every model."),
    Column("coupling_abs", "float64", "1 - m_abs / m_abs_null."),
)

TRAJECTORIES = (
    *_KEY,
    required("token", "int64", "Position of the token in the prompt."),
    Column("lss", "float64", "Line-shape score L / |sum of the unit steps|; 1 if the way is straight."),
    Column("lss_null", "float64", "sqrt(L), about what steps in random directions give."),
    Column("growth_mean", "float64", "Mean over blocks of ln(|x^l| / |x^(l-1)|), in nats per block."),
    Column("growth_std", "float64", "Standard deviation over blocks of the same."),
    Column("expodistance", "float64", "(growth_std / growth_mean)^2; 0 for exact exponential growth."),
)

POINTS = (
    *_KEY,
    required("token", "int64", "Position of the token in the prompt; up to 16 of them, evenly spread."),
    required("boundary", "int64", "The block boundary: 0 is the input of the first block, L the output of the last."),
    Column("norm", "float64", "Norm of the residual stream."),
    Column("pc1", "float64", "Coordinate on the first principal axis of all tokens of the prompt at all boundaries."),
    Column("pc2", "float64", "Coordinate on the second principal axis."),
)

TABLES = TableSet(
    "coupling", 1,
    (Table("jacobians", "one row per residual Jacobian of a prompt", JACOBIANS),
     Table("couplings", "one row per ordered pair of Jacobians, K and order", COUPLINGS),
     Table("trajectories", "one row per token whose Jacobians were taken", TRAJECTORIES),
     Table("points", "one row per token and block boundary, for the figure of trajectories", POINTS)),
    key="coupling_id", label=("checkpoint", "init", "target", "region", "prompt_id"),
)  # fmt: skip


def read_coupling(folder: str | os.PathLike, table: str) -> pandas.DataFrame:
    """Return the rows of a table of everything that is done, in the order of the run.

    Raises SchemaVersionError.
    """
    return read_in_order(folder, TABLES, table)
