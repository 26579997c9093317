"""Pseudo-perplexity of encoders (Salazar et al. 2020, Masked Language Model Scoring, arXiv 1910.14659).

A sentence W is fed |W| times, each time with another of its tokens replaced by the mask. Its pseudo-log-likelihood is
PLL(W) = sum_t log p(w_t | W without w_t). The pseudo-perplexity of a corpus is exp(-sum PLL / N), where N is the number
of masked tokens. The special tokens around a sentence ([CLS] and [SEP] for BERT, <s> and </s> for RoBERTa) are fed and
never masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.clusters import by_column, clustered
from harness.tasks.settings import RowsTask


@dataclass
class MaskedTask(RowsTask):
    """Pseudo-perplexity of an encoder, for which every token of every row is masked in turn."""

    column: str = "text"
    # Largest number of tokens of a piece, special tokens included; null: the model's context. Longer rows are cut.
    window: Annotated[int, at_least(3)] | None = None
    kind: ClassVar[str] = "masked"
    measured_on: ClassVar[tuple[str, ...]] = ("masked",)

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each masked token.

        An example is a row, or a piece of a row that is longer than the window. The pieces of a row are a cluster. Rows
        without text are left out.
        Metrics, all per token: pseudo_perplexity and pseudo_nll (nats), lower is better; accuracy, whether the masked
        token is the most probable one.
        Raises InputError if the tokenizer has no mask token, the window is longer than the model's context or too short
        for its special tokens, or no row has text, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        mask = mask_token(name, context.tokenizer)
        window = context.context_length if self.window is None else self.window
        if window > context.context_length:
            raise InputError(
                f"tasks.{name}.window: {window} tokens are more than the model's context of {context.context_length}"
            )
        key = f"tasks.{name}"
        found = self.rows(key, [self.column])
        written = [(number, row) for number, row in enumerate(found) if row[self.column].strip()]
        if not written:
            raise InputError(f"{key}: none of the {len(found)} rows has text in column {self.column!r}")
        picked = self.choose(key, [row for _, row in written], lambda row: row[self.column])
        requests, ids, counts = [], [], []
        for index, row in picked:
            number = written[index][0]
            sentences = list(_sentences(f"{key} row {number}", context.tokenizer, row[self.column], window))
            for part, (tokens, first, stop) in enumerate(sentences):
                requests += [_masked(tokens, position, mask) for position in range(first, stop)]
                ids.append(f"{number}" if len(sentences) == 1 else f"{number}.{part}")
                counts.append(stop - first)
        weight = np.array(counts, dtype=np.float64)
        starts = np.cumsum([0, *counts[:-1]])
        protocol = {
            "data": self.source(),
            "column": self.column,
            "digest": data.digest(row[self.column] for _, row in picked),
            "window": window,
            "mask_token_id": mask,
            "n_examples": len(ids),
            "n_tokens": len(requests),
            **self.part_protocol(),
        }

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            nll = np.add.reduceat(-scores.logprob, starts)
            right = np.add.reduceat(scores.greedy.astype(np.float64), starts)
            return {
                "pseudo_perplexity": ExampleScores(nll, weight, "exp", higher_is_better=False),
                "pseudo_nll": ExampleScores(nll, weight, higher_is_better=False),
                "accuracy": ExampleScores(right, weight, bounds=(0.0, 1.0)),
            }

        task = ScoredTask(name, protocol, requests, ids, measure, example_of=np.arange(len(ids)).repeat(counts))
        if self.cluster_column is None and len(ids) > len(picked):
            return clustered(task, [one.split(".")[0] for one in ids], "rows")
        of_row = {written[index][0]: row for index, row in picked}
        return by_column(task, key, self.cluster_column, [of_row[int(one.split(".")[0])] for one in ids])


def mask_token(name: str, tokenizer: Any) -> int:
    """Return the id of the mask token. Raises InputError if the tokenizer has none. name: the name of the task."""
    if tokenizer.mask_token_id is None:
        raise InputError(f"tasks.{name}: the model's tokenizer has no mask token; use a model whose tokenizer has one")
    return int(tokenizer.mask_token_id)


def sentence_requests(key: str, context: TaskContext, text: str, mask: int) -> list[Request]:
    """Return the requests whose log-probabilities sum to PLL(text). mask: the id of the mask token.

    Raises InputError if the text is longer than the model's context or has no token; its message begins with `key`.
    """
    (tokens, first, stop), *rest = _sentences(key, context.tokenizer, text, context.context_length)
    if rest:
        raise InputError(f"{key}: a sentence is longer than the model's context of {context.context_length} tokens")
    return [_masked(tokens, position, mask) for position in range(first, stop)]


def _masked(tokens: np.ndarray, position: int, mask: int) -> Request:
    fed = tokens.copy()
    fed[position] = mask
    return Request(fed, np.array([position]), tokens[position : position + 1])


def _sentences(key: str, tokenizer: Any, text: str, window: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield (tokens, first, stop) of each piece of a text.

    tokens: int64 [n], at most `window` tokens with the special ones. Those from `first` to `stop` - 1 are the text.
    """
    encoding = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    tokens = np.asarray(encoding["input_ids"], dtype=np.int64)
    own = np.flatnonzero(np.asarray(encoding["special_tokens_mask"]) == 0)
    if not len(own):
        raise InputError(f"{key}: no tokens to mask in {text[:40]!r}")
    before, body, after = tokens[: own[0]], tokens[own[0] : own[-1] + 1], tokens[own[-1] + 1 :]
    room = window - len(before) - len(after)
    if room < 1:
        raise InputError(f"{key.split(' ')[0]}.window: {window} tokens leave no room for text beside special tokens")
    for start in range(0, len(body), room):
        piece = np.concatenate([before, body[start : start + room], after])
        yield piece, len(before), len(piece) - len(after)
