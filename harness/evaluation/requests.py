"""The requests of a task to a model, which are sequences and the probabilities wanted of them, and the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from harness.evaluation.division import Division
    from harness.evaluation.settings import RuntimeSettings
    from harness.models.description import ModelDescription
    from harness.models.loading import LoadedModel


# Tokens of the prompts and the generated text of one batch, padding included, where nothing else is asked for.
GENERATION_TOKENS = 16384


@dataclass(frozen=True)
class Request:
    """One sequence and the log-probabilities that are wanted of it.

    tokens: int64 [n], the input of the model.
    positions: int64 [m], indices into `tokens` in ascending order, which may repeat.
    targets: int64 [m]. Number j asks for the log-probability of token targets[j] in the model's output at positions[j].
        A classifier has one output for the whole sequence: its targets are classes and its positions are 0.
    source: int64 [s], the input of the encoder of an encoder-decoder, whose decoder then reads `tokens`; else None.
    segments: int64 [n], whether each token is in sentence 0 or 1, for encoders that read pairs of sentences (BERT's
        token types); else None.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    source: np.ndarray | None = None
    segments: np.ndarray | None = None


def continuation_request(context: Sequence[int], continuation: Sequence[int]) -> Request:
    """Return the request for log p(continuation | context).

    Both are token ids. Raises ValueError if one of them is empty.
    """
    if not context or not continuation:
        raise ValueError("context and continuation must each hold at least one token")
    tokens = np.asarray([*context, *continuation[:-1]], dtype=np.int64)
    positions = np.arange(len(context) - 1, len(tokens), dtype=np.int64)
    return Request(tokens, positions, np.asarray(continuation, dtype=np.int64))


@dataclass(frozen=True)
class Scores:
    """The answers to R requests, concatenated in the order of the requests.

    logprob: float64 [N], natural logarithms. greedy: bool [N], whether the target is the argmax of the model's output.
    rank: int64 [N], the number of tokens with a strictly larger logit; None unless the task needs it.
    offsets: int64 [R + 1]; the answers to request i are those at offsets[i]:offsets[i + 1].
    """

    logprob: np.ndarray
    greedy: np.ndarray
    rank: np.ndarray | None
    offsets: np.ndarray

    def request_logprob(self) -> np.ndarray:
        """Return the summed log-probability of each request, float64 [R]."""
        return np.add.reduceat(self.logprob, self.offsets[:-1])

    def request_greedy(self) -> np.ndarray:
        """Return for each request whether all of its targets are the argmax, bool [R]."""
        return np.logical_and.reduceat(self.greedy, self.offsets[:-1])


@dataclass(frozen=True)
class ExampleScores:
    """One metric, example by example. The value of the metric is transform(sum(score) / sum(weight)).

    score, weight: float64 [n]. Weights do not depend on the model, so that the scores of two models on the same example
        form a pair.
    transform: "identity", or "exp" for perplexities.
    bounds: (low, high) such that low * weight <= score <= high * weight for every example and any model, which is
        (0, 1) for accuracies; None if there is no such range.
    clusters: int64 [n], the number of the cluster of each example, such as the document of a window; examples of
        different clusters are independent. None if all examples are.
    """

    score: np.ndarray
    weight: np.ndarray
    transform: str = "identity"
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = None
    clusters: np.ndarray | None = None

    def at(self, examples: np.ndarray) -> ExampleScores:
        """Return the scores of some examples. examples: indices, int64 [m], or bool [n]."""
        clusters = None if self.clusters is None else self.clusters[examples]
        return replace(self, score=self.score[examples], weight=self.weight[examples], clusters=clusters)


@dataclass(frozen=True)
class TaskContext:
    """What a task may know of the model for which it is prepared. Weights are not part of it.

    tokenizer, model_config: objects of transformers. context_length: in tokens. kind: that of the model's family,
    "causal", "masked", "seq2seq" or "classification". generation: what the checkpoint says of generating text, as
    `harness.models.description.generation_values` returns it; empty for a model that does not generate.
    generation_tokens: the tokens of the prompts and the generated text of one batch, padding included. The ids of cells
    of tasks that generate depend on it, because another padding changes the last bits of logits, and so a text in which
    two tokens are almost equally probable.
    """

    tokenizer: Any
    model_config: Any
    context_length: int
    kind: str
    generation: Mapping[str, Any] = field(default_factory=dict)
    generation_tokens: int = GENERATION_TOKENS

    @classmethod
    def of(cls, description: ModelDescription, tokenizer: Any, runtime: RuntimeSettings | None = None) -> TaskContext:
        """Return what a task may know of the model of a description.

        runtime: says how much memory the keys and values of a generating batch may take. Raises InputError if that is
        less than one token needs.
        """
        from harness.models.cost import generation_tokens
        from harness.models.description import generation_values

        gib = runtime.generation_gib if runtime is not None else None
        tokens = GENERATION_TOKENS if gib is None else generation_tokens(gib, description.config, description.dtype)
        return cls(tokenizer, description.config, description.context_length, description.family.kind,
                   generation_values(description.generation), tokens)


@dataclass(frozen=True)
class ScoredTask:
    """A task whose metrics follow from log-probabilities, prepared for the tokenizer of one model.

    protocol: the settings on which the numbers depend, as values for JSON; they are in every row.
    example_ids: one distinct string for each example, in the order of the arrays that `measure` returns.
    measure: a function from the Scores of `requests` to the ExampleScores of each metric by name.
    needs_rank: whether `measure` reads the ranks of the scores.
    example_of: int64 [R], the index of the example to which each request belongs; None if request i is example i.
    whole: whether some metric is not a mean over examples, so that no exact interval follows from a part of them.
        Adaptive precision then measures every example.
    """

    name: str
    protocol: Mapping[str, Any]
    requests: Sequence[Request]
    example_ids: Sequence[str]
    measure: Callable[[Scores], dict[str, ExampleScores]]
    needs_rank: bool = False
    example_of: np.ndarray | None = field(default=None, compare=False)
    whole: bool = False


@dataclass(frozen=True)
class DirectTask:
    """A task that calls the model itself, to generate text or to examine its parts.

    protocol, example_ids: as in ScoredTask.
    measure: a function from a LoadedModel, the Division of the processes that measure it together, and the share of the
        usual batch size that fits into memory, to the ExampleScores of each metric by name.
    inputs: what the model is fed, as sequences of token ids.
    """

    name: str
    protocol: Mapping[str, Any]
    example_ids: Sequence[str]
    measure: Callable[[LoadedModel, Division, float], dict[str, ExampleScores]]
    inputs: Sequence[Sequence[int]] = ()


PreparedTask = ScoredTask | DirectTask


def scored_tasks(tasks: Mapping[str, PreparedTask]) -> dict[str, ScoredTask]:
    """Return those of the tasks whose metrics follow from log-probabilities."""
    return {name: task for name, task in tasks.items() if isinstance(task, ScoredTask)}


def task_digest(task: PreparedTask) -> str:
    """Return a digest of what a task asks: its protocol, and all arrays of its requests or its inputs."""
    found = hashlib.blake2b(json.dumps(dict(task.protocol), sort_keys=True, default=str).encode(), digest_size=16)
    for array in task.inputs if isinstance(task, DirectTask) else _arrays(task):
        found.update(len(array).to_bytes(8, "little"))
        found.update(np.asarray(array, dtype="<i8").tobytes())
    return found.hexdigest()


def _arrays(task: ScoredTask) -> Iterator[np.ndarray]:
    for request in task.requests:
        yield from (request.tokens, request.positions, request.targets)
        yield from (array for array in (request.source, request.segments) if array is not None)
