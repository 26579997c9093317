"""What a task asks of a model: sequences to feed and the next-token probabilities to read off them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Request:
    """One sequence and what to score in it.

    tokens: int64 [n], fed to the model.
    positions: int64 [m], indices into `tokens`; may repeat, ascending.
    targets: int64 [m]; entry j asks for the log-probability of `targets[j]` in the model's output at `positions[j]`.
        Of a classifier, which has one output per sequence, targets are classes and positions are 0.
    source: int64 [s], what the encoder of an encoder-decoder reads; `tokens` are then its decoder's input.
    segments: int64 [n], sentence 0 or 1 of each token, for encoders that read pairs (BERT's token types).
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    segments: np.ndarray | None = None


def continuation_request(context: Sequence[int], continuation: Sequence[int]) -> Request:
    """The request for log p(continuation | context); both are token ids and neither may be empty."""
    if not context or not continuation:
        raise ValueError("context and continuation must each hold at least one token")
    tokens = np.asarray([*context, *continuation[:-1]], dtype=np.int64)
    positions = np.arange(len(context) - 1, len(tokens), dtype=np.int64)
    return Request(tokens, positions, np.asarray(continuation, dtype=np.int64))


@dataclass(frozen=True)
class Scores:
    """Answers to a list of requests, concatenated in their order.

    logprob: float64 [N], natural logarithm. greedy: bool [N], the target is the model's argmax.
    rank: int64 [N], number of vocabulary entries with a strictly larger logit; None unless the task asked.
    offsets: int64 [R + 1]; request i owns entries offsets[i]:offsets[i + 1].
    """

    logprob: np.ndarray
    greedy: np.ndarray
    rank: np.ndarray | None
    offsets: np.ndarray

    def request_logprob(self) -> np.ndarray:
        """Summed log-probability of each request, float64 [R]."""
        return np.add.reduceat(self.logprob, self.offsets[:-1])

    def request_greedy(self) -> np.ndarray:
        """Whether every scored token of each request is the argmax, bool [R]."""
        return np.logical_and.reduceat(self.greedy, self.offsets[:-1])


@dataclass(frozen=True)
class ExampleScores:
    """One metric, example by example: its value is transform(sum(score) / sum(weight)).

    score, weight: float64 [n]. transform: "identity" or "exp" (perplexities). Weights do not depend on the model,
    so that the same example of two models forms a pair. bounds: (low, high) with low * weight <= score <= high * weight
    for every example and any model (accuracies: 0 and 1), None where there is no such range.
    """

    score: np.ndarray
    weight: np.ndarray
    transform: str = "identity"
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class TaskContext:
    """What a task may know of the model it is prepared for; no weights."""

    tokenizer: Any
    model_config: Any
    context_length: int


@dataclass(frozen=True)
class PreparedTask:
    """A task made ready for one model's tokenizer.

    protocol: JSON-able settings that the numbers depend on; travels in every row.
    example_ids: one string per example, unique, in the order of the arrays that `measure` returns.
    measure: Scores of `requests` -> metric name -> ExampleScores.
    generate: the other path, for tasks that generate text: a LoadedModel, the Division of processes that measure it
        together and the share of its usual batches to use -> metric name -> ExampleScores; no requests.
    example_of: int64 [R], the example that each request belongs to; None where request i is example i.
    """

    name: str
    protocol: Mapping[str, Any]
    requests: Sequence[Request]
    example_ids: Sequence[str]
    measure: Callable[[Scores], dict[str, ExampleScores]] | None
    needs_rank: bool = False
    generate: Callable[..., dict[str, ExampleScores]] | None = field(default=None, compare=False)
    example_of: np.ndarray | None = field(default=None, compare=False)
