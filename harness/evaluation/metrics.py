"""The metrics of the harness as subclasses of `evaluate.Metric`, for use outside of a study.

    >>> from harness.evaluation.metrics import TokenPerplexity
    >>> TokenPerplexity().compute(nll=[210.5, 198.1], tokens=[63, 63])
    {'token_perplexity': ..., 'stderr': ..., 'n': 2}

The inputs are one number for each example (a window, a prompt, a question), given all at once or with `add_batch`. The
metrics are computed by `harness.evaluation.statistics`, as in a study, and need no access to the hub. Nothing else in
the harness imports this module, because it needs the package `evaluate`.
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
import numpy as np

from harness.evaluation import statistics
from harness.evaluation.requests import ExampleScores


class _InMemory(evaluate.Metric):
    """An `evaluate.Metric` that keeps its inputs in memory; by default they would be written to a cache folder."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})


class TokenPerplexity(_InMemory):
    """exp(sum of nll / sum of tokens), as token_perplexity, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        return _described("Perplexity per token.", nll=_NLL, tokens="tokens scored in each window")

    def _compute(self, nll: Any, tokens: Any) -> dict[str, Any]:
        return _estimated("token_perplexity", nll, tokens, "exp")


class WordPerplexity(_InMemory):
    """exp(sum of nll / sum of words), as word_perplexity, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        return _described("Perplexity per word.", nll=_NLL, words="words of text in each window")

    def _compute(self, nll: Any, words: Any) -> dict[str, Any]:
        return _estimated("word_perplexity", nll, words, "exp")


class BytePerplexity(_InMemory):
    """exp(sum of nll / sum of bytes), as byte_perplexity, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        return _described("Perplexity per byte of UTF-8 text.", nll=_NLL, bytes="bytes of text in each window")

    def _compute(self, nll: Any, bytes: Any) -> dict[str, Any]:
        return _estimated("byte_perplexity", nll, bytes, "exp")


class BitsPerByte(_InMemory):
    """sum of nll / ln 2 / sum of bytes, as bits_per_byte, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        return _described("Bits per byte of UTF-8 text.", nll=_NLL, bytes="bytes of text in each window")

    def _compute(self, nll: Any, bytes: Any) -> dict[str, Any]:
        return _estimated("bits_per_byte", np.asarray(nll) / math.log(2), bytes)


class MeanAccuracy(_InMemory):
    """The mean of `correct`, as accuracy, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        return _described("Share of examples answered rightly.", correct="1 or 0 for each example, 0.5 for a tie")

    def _compute(self, correct: Any) -> dict[str, Any]:
        return _estimated("accuracy", correct, np.ones(len(correct)))


class LogitDifference(_InMemory):
    """The mean of answer - other, as logit_difference, stderr and n."""

    def _info(self) -> evaluate.MetricInfo:
        meaning = "logit (or log-probability) of the {} for each prompt"
        return _described(
            "Mean logit difference between the right and the wrong answer.",
            answer=meaning.format("right answer"), other=meaning.format("wrong answer"),
        )

    def _compute(self, answer: Any, other: Any) -> dict[str, Any]:
        return _estimated("logit_difference", np.asarray(answer) - np.asarray(other), np.ones(len(answer)))


class PairedDelta(_InMemory):
    """Ablated minus baseline of any metric transform(sum of score / sum of weight) over the same examples.

    Gives delta, stderr and a two-sided p_value. For perplexities call `compute(transform="exp")`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _described(
            "Paired difference of a metric between two models.",
            ablated="score of each example under the ablated model",
            baseline="score of each example under the baseline",
            weight="weight of each example: 1 for means, tokens (words, bytes) for summed losses",
        )

    def _compute(self, ablated: Any, baseline: Any, weight: Any, transform: str = "identity") -> dict[str, Any]:
        ablated, baseline = (
            ExampleScores(np.asarray(score), np.asarray(weight), transform) for score in (ablated, baseline)
        )
        found = statistics.paired(ablated, baseline)
        return {"delta": found.delta, "stderr": found.stderr, "p_value": found.p_value}


_NLL = "summed negative log-likelihood of each window in nats"


def _described(description: str, **inputs: str) -> evaluate.MetricInfo:
    lines = "\n".join(f"    {name}: list of float, {meaning}" for name, meaning in inputs.items())
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description=f"Args:\n{lines}\n",
        features=datasets.Features({name: datasets.Value("float64") for name in inputs}),
    )


def _estimated(name: str, score: Any, weight: Any, transform: str = "identity") -> dict[str, float | int | None]:
    found = statistics.estimate(ExampleScores(np.asarray(score), np.asarray(weight), transform))
    return {name: found.value, "stderr": found.stderr, "n": found.n}
