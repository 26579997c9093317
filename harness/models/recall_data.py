"""The data of the in-context recall task of arXiv 2406.03068: character bigrams with triggers and noise.

The first character of a sequence is drawn from the unigram counts of tiny Shakespeare, each later one from the counts
of what follows the character before it, except after a trigger. For each trigger a sequence has one output token, which
is drawn uniformly from the characters. A trigger is followed by the noise token with probability `noise`, and otherwise
by its output token. The output token can be recalled from the context, once it has been seen. That the noise token
follows triggers is an association that holds in all sequences.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.errors import InputError
from harness.models.settings import RecallModelSettings

COUNTS_FILE = Path(__file__).parent / "data" / "tinyshakespeare_bigrams.json"
IGNORED = -100  # the label that torch's cross-entropy ignores

# The first number of each seed. Training and evaluation therefore never draw the same sequences, whatever seeds the
# user chooses.
TRAINING_STREAM, EVALUATION_STREAM = 0, 1


def bigram_counts(text: str) -> dict:
    """Count the characters of a text and their pairs. The packaged data file holds the result for tiny Shakespeare.

    Returns "vocabulary", a string of the N distinct characters in the order of their code points; "unigram", their N
    counts; and "bigram", N lists of N counts, where row i and column j say how often character j follows character i.
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
    """Return the `bigram_counts` of tiny Shakespeare from the packaged file."""
    return json.loads(COUNTS_FILE.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class RecallProcess:
    """The distribution of the sequences.

    vocabulary: the N characters, whose ids are 0..N-1. vocabulary_size: N, or N + 1 if the noise token is an additional
    one. trigger_ids: the ids of the most frequent characters, by descending frequency. noise_token_id: N, or the id of
    a character. noise: the probability, in 0..1, that the noise token follows a trigger.
    """

    vocabulary: str
    vocabulary_size: int
    trigger_ids: tuple[int, ...]
    noise_token_id: int
    noise: float


@dataclass(frozen=True)
class RecallBatch:
    """B independent sequences of T tokens; every array is [B, T].

    tokens: int64, the input of the model. labels: int64, the token that follows each input token; it may be the noise
    token. scored: bool, whether the input token is a trigger that the sequence has had before, so that its output can
    be recalled. targets: int64, the output token of that trigger where `scored` is True, and -100 elsewhere.
    """

    tokens: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    targets: np.ndarray


def recall_process(config: RecallModelSettings) -> RecallProcess:
    """Return the distribution that the settings describe.

    Raises InputError if n_triggers is not in 1..65, if noise is not in 0..1, and if noise_token is neither "own" nor a
    character of tiny Shakespeare, or is a trigger.
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
    """Return how often each character follows each token, as integer counts in R rows of N characters.

    Returns the cumulative counts over all rows [R * N], and for each row its start in them and its total, [R] each.
    There is one row for each token, where an additional noise token has the unigram counts, and a last row with the
    unigram counts for the first character.
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
    """Draw `n_sequences` sequences of `length` tokens. All randomness, including that of the noise, comes from `rng`.

    noise: the probability of the noise token, instead of that of the process; 0 gives clean sequences.
    """
    n = len(process.vocabulary)
    cumulative, start, total = _counts_after(process.vocabulary_size)
    uniform = rng.random((length + 1, n_sequences))
    noisy = rng.random((length + 1, n_sequences)) < (process.noise if noise is None else noise)
    outputs = rng.integers(n, size=(n_sequences, len(process.trigger_ids)))

    def draw(row: np.ndarray | int, u: np.ndarray) -> np.ndarray:
        # The cumulative counts are inverted in integers, so that a pair with a count of zero is never drawn.
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
