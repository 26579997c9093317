"""Perplexity of any text: the rows are joined, the text is tokenised once, and the tokens are cut into windows.

The windows are those of the guide of transformers to the perplexity of fixed-length models: window k begins at token
k * stride. With stride = window they do not overlap, and the first token of each window, which has no context, is not
scored. With stride < window each window scores only the tokens that the window before it does not contain. Every token
but the first of the text is then scored exactly once, with at least window - stride tokens of context. The last window
may be shorter. No special token is added, so that the text is the published one and nothing else.

Words and bytes are counted as lm-eval counts them, by len(re.split(r"\\s+", text)) and len(text.encode()). Each window
counts the text from the end of the window before it to its own end, so that the counts of all windows sum exactly to
the count of the text that they cover. With stride = window the first token of a window is counted and not scored, and
the values per word and per byte are too low by about one part in `window`. An overlap of one token
(stride = window - 1) removes this error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.clusters import window_clusters
from harness.tasks.settings import DataTask, LimitedTask

DEFAULT_WINDOW = 2048


@dataclass
class TextTask(DataTask, LimitedTask):
    """Perplexity of any text: the rows of a column are joined by `separator` and cut into windows."""

    column: str = "text"
    separator: str = "\n\n"
    window: Annotated[int, at_least(2)] | None = None  # tokens; null: the smaller of 2048 and the model's context
    stride: Annotated[int, at_least(1)] | None = None  # tokens; null: window (no overlap)
    kind: ClassVar[str] = "text"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request and one example for each window.

        Metrics: token_perplexity, nll (nats per token), word_perplexity, byte_perplexity, bits_per_byte. Lower is
        better for all of them.
        Raises InputError if the window is longer than the model's context, the stride is longer than the window, or the
        text has fewer than two tokens, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        window, stride = _window_and_stride(name, self, context.context_length)
        found = self.rows(f"tasks.{name}", [self.column])
        text = self.separator.join(row[self.column] for row in found)
        tokens, starts, exact = _tokenise(context.tokenizer, text)
        if len(tokens) < 2:
            raise InputError(f"tasks.{name}: the text has {len(tokens)} tokens; at least 2 are needed")

        spans = list(windows(len(tokens), window, stride))[: self.limit]
        requests = [
            Request(tokens[begin : end - 1], np.arange(first - 1, end - 1) - begin, tokens[first:end])
            for begin, first, end in spans
        ]
        # Each window counts the text from the end of the window before it, so that no text is counted twice.
        edges = starts[[0, *(end for _, _, end in spans)]]
        counts = {
            "tokens": np.array([len(request.targets) for request in requests], dtype=np.float64),
            "words": np.diff(_words_before(text)[edges]).astype(np.float64),
            "bytes": np.diff(_bytes_before(text)[edges]).astype(np.float64),
        }
        for unit, count in counts.items():
            if not count.sum() > 0:
                raise InputError(f"tasks.{name}: the text has no {unit}")
        covered = text[: edges[-1]]
        clusters, described = window_clusters(
            [row[self.column] for row in found], self.separator, starts[[first for _, first, _ in spans]]
        )
        protocol = {
            "data": self.source(),
            "column": self.column,
            "join": self.separator,
            "digest": data.digest([covered]),
            "window": window,
            "stride": stride,
            "bos": False,
            "n_windows": len(spans),
            "n_tokens": int(counts["tokens"].sum()),
            "n_words": int(counts["words"].sum()),
            "n_bytes": int(counts["bytes"].sum()),
            "text_positions": "offsets" if exact else "decoded",
            **described,
        }

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            nll = -scores.request_logprob()

            def per(unit: str, score: np.ndarray, transform: str) -> ExampleScores:
                return ExampleScores(score, counts[unit], transform, higher_is_better=False, clusters=clusters)

            return {
                "token_perplexity": per("tokens", nll, "exp"),
                "nll": per("tokens", nll, "identity"),
                "word_perplexity": per("words", nll, "exp"),
                "byte_perplexity": per("bytes", nll, "exp"),
                "bits_per_byte": per("bytes", nll / math.log(2), "identity"),
            }

        return ScoredTask(name, protocol, requests, [str(i) for i in range(len(spans))], measure)


def windows(n_tokens: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) of each window: it contains tokens begin..end-1 and scores tokens first..end-1."""
    covered = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + window, n_tokens)
        first = max(covered, begin + 1)
        if first < end:
            yield begin, first, end
        covered = end
        if end == n_tokens:
            return


def _window_and_stride(name: str, task: TextTask, context_length: int) -> tuple[int, int]:
    window = min(DEFAULT_WINDOW, context_length) if task.window is None else task.window
    if window > context_length:
        raise InputError(f"tasks.{name}.window: {window} tokens are more than the model's context of {context_length}")
    stride = window if task.stride is None else task.stride
    if not 1 <= stride <= window:
        raise InputError(f"tasks.{name}.stride: must be between 1 and the window of {window} tokens, not {stride}")
    return window, stride


def _tokenise(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the tokens, the character at which each token begins, and whether these characters are exact.

    The tokens are int64 [n]. The characters are int64 [n + 1], and the last is the length of the text. They are exact
    for a fast tokenizer. A slow tokenizer has no offsets, so the lengths of its decoded tokens are scaled to the length
    of the text: this may count a word or a byte in the neighbouring window, but does not change the sums.
    """
    exact = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=exact, verbose=False)
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    starts = np.zeros(len(tokens) + 1, dtype=np.int64)
    if exact and len(tokens):
        starts[:-1] = [begin for begin, _ in encoding["offset_mapping"]]
        # Several tokens of one character share its offset, and an inserted token may have the offsets (0, 0).
        starts[:-1] = np.maximum.accumulate(starts[:-1])
    elif len(tokens):
        lengths = np.cumsum([len(tokenizer.decode([token])) for token in tokens.tolist()])
        starts[1:] = np.floor(lengths * (len(text) / max(1, lengths[-1])))
    starts[0], starts[-1] = 0, len(text)
    return tokens, starts, exact


def _words_before(text: str) -> np.ndarray:
    """Return int64 [len(text) + 1], in which entry c > 0 is len(re.split(r"\\s+", text[:c])) and entry 0 is 0."""
    count = np.zeros(len(text) + 1, dtype=np.int64)
    if text:
        count[1] = 1
        runs = np.fromiter((match.start() for match in re.finditer(r"\s+", text)), dtype=np.int64)
        count[runs + 1] += 1
    return np.cumsum(count)


def _bytes_before(text: str) -> np.ndarray:
    """Return int64 [len(text) + 1], in which entry c is len(text[:c].encode())."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(size, dtype=np.int64)])
