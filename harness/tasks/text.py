"""Perplexity of any text: the rows are joined, the text is tokenised once, and the tokens are cut into windows.

The windows are those of the guide of transformers to the perplexity of fixed-length models: window k begins at token
k * stride and holds `window` tokens of the text, the last one perhaps fewer. With stride < window each window scores
only the tokens that the window before it does not contain, with at least window - stride tokens of context.

If the tokenizer begins a text with a BOS token, every window begins with it, because most such models were never
trained without it. The BOS token is context for the first token of the window, so that every token of the text is
scored exactly once. Without BOS, the first token of a window has no context if the windows do not overlap, and is not
scored; if they do, only the first token of the text is not scored. No other special token is added.

Words and bytes are counted as lm-eval counts them, by len(re.split(r"\\s+", text)) and len(text.encode()), but only
those of the tokens that are scored. Every character belongs to one token: spaces that a tokenizer puts into no token
belong to the token after them, and a character of several tokens to the first of them. A word belongs to the token with
its first character, and the whitespace before a word is part of the word. The counts of all windows therefore sum
exactly to those of the scored text, and to those of the whole text if every token is scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import (
    ExampleScores,
    PreparedTask,
    ScoredTask,
    Scores,
    TaskContext,
    continuation_request,
)
from harness.settings.constraints import at_least
from harness.tasks import chat, data, token_cache, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import column_labels, window_clusters
from harness.tasks.documents import documents
from harness.tasks.settings import DataTask, LimitedTask, check_bos

DEFAULT_WINDOW = 2048
TOKENS_AND_EDGES = "tokens and edges 1"  # must change when `_tokenise` returns something else
# What \s of a regular expression matches, as code points.
_SPACES = np.array([*range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029,
                    0x202F, 0x205F, 0x3000], dtype="<u4")  # fmt: skip


@dataclass
class TextTask(ChatTask, DataTask, LimitedTask):
    """Perplexity of any text: the rows of a column are joined by `separator` and cut into windows."""

    column: str = "text"
    separator: str = "\n\n"
    window: Annotated[int, at_least(2)] | None = None  # tokens; null: the smaller of 2048 and the model's context
    stride: Annotated[int, at_least(1)] | None = None  # tokens; null: window (no overlap)
    # The column whose value says to which document a row belongs (see documents.py); null: the rows say it themselves.
    cluster_column: str | None = None
    # Whether every window begins with BOS. auto: as the tokenizer begins a text; true: with EOS if there is no BOS.
    bos: bool | str = "auto"
    user_prompt: str = "Write a text."  # the user's turn in a chat, to which each window is an answer
    kind: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bos(self.bos)

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request and one example for each window.

        Metrics: token_perplexity, nll (nats per token), word_perplexity, byte_perplexity, bits_per_byte. Lower is
        better for all of them.
        Raises InputError if the window is longer than the model's context, the stride is longer than the window, no
        token is left to score, or the tokenizer has no token that could begin a window, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        if self.chat:
            prefix = chat.encode(context.tokenizer, self.render(f"tasks.{name}", context, self.user_prompt))
        else:
            prefix = tokenization.prefix_of(name, context.tokenizer, self.bos)
        # The last token of a window is never fed, so that a prefix of one token takes no room.
        window, stride = _window_and_stride(name, self, context.context_length - max(0, len(prefix) - 1))
        found = self.rows(f"tasks.{name}", [self.column])
        text = self.separator.join(row[self.column] for row in found)
        if not text.strip():
            raise InputError(f"tasks.{name}: column {self.column!r} holds no text in any row")
        cut = 0
        if prefix and not self.chat:  # a text that already begins with this token gets no second one
            cut = len(text) - len(text.removeprefix(context.tokenizer.decode(prefix)))
            text = text[cut:]
        tokens, edges, exact = _tokenise(context.tokenizer, text)
        least = 1 if prefix else 2
        if len(tokens) < least:
            raise InputError(f"tasks.{name}: the text has {len(tokens)} tokens; at least {least} are needed")

        spans = list(windows(len(tokens), window, stride, bool(prefix)))[: self.limit]
        requests = [
            continuation_request([*prefix, *tokens[begin:first]], list(tokens[first:end]))
            for begin, first, end in spans
        ]
        scored = edges[[(first, end) for _, first, end in spans]]
        counts = {
            "tokens": np.array([len(request.targets) for request in requests], dtype=np.float64),
            "words": np.diff(_words_before(text)[scored])[:, 0].astype(np.float64),
            "bytes": np.diff(_bytes_before(text)[scored])[:, 0].astype(np.float64),
        }
        for unit, count in counts.items():
            if not count.sum() > 0:
                raise InputError(f"tasks.{name}: the text that is scored has no {unit}; use a longer text")
        covered = text[: scored[-1, 1]]
        of_row = column_labels(f"tasks.{name}", self.cluster_column, found)
        made_of = documents([row[self.column] for row in found], self.separator, self.cluster_column, of_row)
        clusters, described = window_clusters(made_of, scored[:, 0] + cut)
        protocol = {
            "data": self.source(),
            "column": self.column,
            "join": self.separator,
            "digest": data.digest([covered]),
            "window": window,
            "stride": stride,
            **self._beginning(context, prefix),
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

    def _beginning(self, context: TaskContext, prefix: list[int]) -> dict[str, Any]:
        """Return what the protocol says of the tokens with which every window begins."""
        if self.chat:
            return {"chat": {**self.chat_protocol(context)["chat"], "user_prompt": self.user_prompt}}
        return {"bos": True, "prefix_token": prefix[0]} if prefix else {"bos": False}


def windows(n_tokens: int, window: int, stride: int, prefixed: bool) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first, end) of each window: it contains tokens begin..end-1 and scores tokens first..end-1.

    prefixed: whether a further token precedes each window, so that its first token has context.
    """
    covered = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + window, n_tokens)
        first = max(covered, begin if prefixed else begin + 1)
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
    """Return the tokens, the edges between their characters, and whether the edges are exact.

    The tokens are int64 [n], the edges int64 [n + 1]: token i has the characters edges[i] to edges[i + 1] - 1 of the
    text. They are exact for a fast tokenizer. A slow tokenizer has no offsets, so the lengths of its decoded tokens are
    scaled to the length of the text: a word or a byte may then be counted with the neighbouring token.
    """
    exact = bool(getattr(tokenizer, "is_fast", False))
    key = token_cache.key_of(tokenizer, text, TOKENS_AND_EDGES) if exact else None
    kept = None if key is None else token_cache.read(key)
    if kept is not None:
        return *kept, exact
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=exact, verbose=False)
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    edges = np.zeros(len(tokens) + 1, dtype=np.int64)
    if exact and len(tokens):
        # Some tokenizers leave the spaces before a word out of the offsets of its token, so the ends are taken. An
        # inserted token may have the offsets (0, 0), hence the maximum.
        edges[1:] = np.maximum.accumulate([end for _, end in encoding["offset_mapping"]])
    elif len(tokens):
        lengths = np.cumsum([len(tokenizer.decode([token])) for token in tokens.tolist()])
        edges[1:] = np.floor(lengths * (len(text) / max(1, lengths[-1])))
    edges[-1] = len(text)
    if key is not None:
        token_cache.keep(key, (tokens, edges))
    return tokens, edges, exact


def _words_before(text: str) -> np.ndarray:
    """Return int64 [len(text) + 1], in which entry c > 0 is len(re.split(r"\\s+", text[:c])) and entry 0 is 0."""
    count = np.zeros(len(text) + 1, dtype=np.int64)
    if text:
        space = np.isin(_code_points(text), _SPACES)
        count[1:] = space
        count[2:] -= space[1:] & space[:-1]  # a run of spaces counts once
        count[1] += 1
    return np.cumsum(count)


def _bytes_before(text: str) -> np.ndarray:
    """Return int64 [len(text) + 1], in which entry c is len(text[:c].encode())."""
    code = _code_points(text)
    size = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(size, dtype=np.int64)])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
