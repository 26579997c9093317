"""The data of the in-context recall task of arXiv 2406.03068: character bigrams, with triggers and noise.

A sequence starts with a character drawn from the unigram counts of tiny Shakespeare and goes on with its bigram counts,
except after a trigger. Each sequence draws one output token per trigger, uniformly over the characters; after the
trigger follows the noise token with probability `noise`, else that output. What follows the trigger can be recalled
from the context; that noise may follow it is a global association.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.config import RecallModelConfig
from harness.errors import InputError

COUNTS_FILE = Path(__file__).parent / "data" / "tinyshakespeare_bigrams.json"
IGNORED = -100  # the label that torch's cross-entropy ignores

# First words of the seeds: sequences of one use never appear in another, whatever the user's seeds are.
TRAINING_STREAM, EVALUATION_STREAM = 0, 1


def bigram_counts(text: str) -> dict:
    """Count the characters of `text` and their pairs; the data file holds this of tiny Shakespeare, as JSON.

    Returns "vocabulary", its distinct characters sorted by code point (str of N); "unigram", their counts (N ints);
    "bigram", row i column j: how often character j follows character i (N lists of N ints).
    """
    codes, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    n = len(codes)
    pairs = np.bincount(ids[:-1] * n + ids[1:], minlength=n * n).reshape(n, n)
    return {
        "vocabulary": "".join(chr(code) for code in codes),
        "unigram": np.bincount(ids, minlength=n).tolist(),
        "bigram": pairs.tolist(),
    }


@functools.cache
def load_counts() -> dict:
    """`bigram_counts` of tiny Shakespeare, from the packaged file."""
    return json.loads(COUNTS_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RecallProcess:
    """The distribution of sequences.

    vocabulary: the N characters; their ids are 0..N-1. vocabulary_size: N, or N + 1 with a noise token of its own.
    trigger_ids: the most frequent characters, the most frequent first. noise_token_id: N, or a character's id.
    noise: probability in 0..1 that the noise token follows a trigger.
    """

    vocabulary: str
    vocabulary_size: int
    trigger_ids: tuple[int, ...]
    noise_token_id: int
    noise: float


@dataclass(frozen=True)
class RecallBatch:
    """Sequences of one shape, B x T, each row independent.

    tokens: int64, what the model reads. labels: int64, the token that follows, noise included.
    scored: bool, the input is a trigger seen for the second time or later, so that its output can be recalled.
    targets: int64, the sequence's output for that trigger where `scored`, else -100.
    """

    tokens: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    targets: np.ndarray


def recall_process(config: RecallModelConfig) -> RecallProcess:
    """The distribution that `config` describes.

    InputError where n_triggers is not in 1..65, noise not in 0..1, or noise_token neither "own" nor a character of
    tiny Shakespeare that is not a trigger.
    """
    counts = load_counts()
    vocabulary, n = counts["vocabulary"], len(counts["vocabulary"])
    if not 1 <= config.n_triggers <= n:
        raise InputError(f"model.recall.n_triggers is {config.n_triggers}: must be 1 to {n}")
    if not 0.0 <= config.noise <= 1.0:
        raise InputError(f"model.recall.noise is {config.noise}: must be a probability, 0 to 1")
    triggers = np.argsort(-np.asarray(counts["unigram"]), kind="stable")[: config.n_triggers]
    if config.noise_token == "own":
        noise_token_id = n
    elif len(config.noise_token) == 1 and config.noise_token in vocabulary:
        noise_token_id = vocabulary.index(config.noise_token)
    else:
        raise InputError(
            f"model.recall.noise_token is {config.noise_token!r}: must be 'own' or one character of {vocabulary!r}"
        )
    if noise_token_id in triggers:
        raise InputError(f"model.recall.noise_token is {config.noise_token!r}, which is a trigger: choose another")
    return RecallProcess(
        vocabulary=vocabulary,
        vocabulary_size=max(n, noise_token_id + 1),
        trigger_ids=tuple(int(t) for t in triggers),
        noise_token_id=noise_token_id,
        noise=float(config.noise),
    )


@functools.cache
def _counts_after(vocabulary_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer counts of what follows each token: cumulative over all rows [R * N], start and total of each row [R].

    Rows are the tokens (a noise token of its own is followed as by the unigram counts), then the unigram counts.
    """
    counts = load_counts()
    unigram = np.asarray(counts["unigram"], dtype=np.int64)
    rows = np.asarray(counts["bigram"], dtype=np.int64)
    while len(rows) <= vocabulary_size:
        rows = np.vstack([rows, unigram])
    totals = rows.sum(axis=1)
    return rows.ravel().cumsum(), totals.cumsum() - totals, totals


def sample(
    process: RecallProcess, n_sequences: int, length: int, rng: np.random.Generator, noise: float | None = None
) -> RecallBatch:
    """Draw `n_sequences` sequences of `length` tokens; all randomness, the noise coin included, comes from `rng`.

    noise: instead of the process's own, e.g. 0 for clean sequences.
    """
    n = len(process.vocabulary)
    cumulative, start, total = _counts_after(process.vocabulary_size)
    uniform = rng.random((length + 1, n_sequences))
    noisy = rng.random((length + 1, n_sequences)) < (process.noise if noise is None else noise)
    outputs = rng.integers(n, size=(n_sequences, len(process.trigger_ids)))

    def draw(row: np.ndarray | int, u: np.ndarray) -> np.ndarray:
        # Inverse of the cumulative counts in integers: exact, and a pair that never occurs is never drawn.
        return np.searchsorted(cumulative, start[row] + (u * total[row]).astype(np.int64), side="right") % n

    slot = np.full(process.vocabulary_size, -1)
    slot[list(process.trigger_ids)] = np.arange(len(process.trigger_ids))
    sequence = np.arange(n_sequences)
    tokens = np.empty((length + 1, n_sequences), dtype=np.int64)
    tokens[0] = draw(process.vocabulary_size, uniform[0])
    for t in range(length):
        last = tokens[t]
        after_trigger = np.where(noisy[t + 1], process.noise_token_id, outputs[sequence, slot[last]])
        tokens[t + 1] = np.where(slot[last] >= 0, after_trigger, draw(last, uniform[t + 1]))

    tokens = np.ascontiguousarray(tokens.T)
    inputs = tokens[:, :-1]
    scored = np.zeros(inputs.shape, dtype=bool)
    targets = np.full(inputs.shape, IGNORED, dtype=np.int64)
    for index, trigger in enumerate(process.trigger_ids):
        seen = inputs == trigger
        again = seen & (seen.cumsum(axis=1) >= 2)
        scored |= again
        targets = np.where(again, outputs[:, index, None], targets)
    return RecallBatch(inputs.copy(), tokens[:, 1:].copy(), scored, targets)
