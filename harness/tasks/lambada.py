"""LAMBADA: the last word of a passage (Paperno et al. 2016), scored as `lambada_openai` of lm-evaluation-harness does.

The passage is cut at its last space, and the continuation is that space and the word. The tokens are those of HFLM of
lm-eval. A passage that is longer than the model's context loses its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, ScoredTask, Scores, TaskContext
from harness.tasks import data, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import by_column
from harness.tasks.settings import PromptTask


@dataclass
class LambadaTask(ChatTask, PromptTask):
    """The last word of a passage: accuracy and perplexity."""

    kind: ClassVar[str] = "lambada"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each passage.

        Metrics: accuracy, whether every token of the word is the most probable one (higher is better); perplexity, exp
        of the mean over words of the negative log-probability (lower is better).
        Raises InputError for a text that does not end with a word, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        prefix = tokenization.prefix_of(name, context.tokenizer, self.bos)
        found = self.rows(f"tasks.{name}", ["text"])
        chosen = self.choose(f"tasks.{name}", found, lambda row: row["text"])
        requests = []
        for number, row in chosen:
            passage, _, word = row["text"].rpartition(" ")
            if not word.strip() or word != word.rstrip():
                raise InputError(f"tasks.{name} row {number}: column 'text' must end with the word that is asked for,"
                                 f" not with {row['text'][-40:]!r}")
            requests.append(self.ask(f"tasks.{name} row {number}", context, passage, word, self.bos))
        protocol = {
            "data": self.source(),
            "digest": data.digest(row["text"] for _, row in chosen),
            "bos": bool(prefix),
            "context_length": context.context_length,
            "n_examples": len(chosen),
            "n_tokens": sum(len(request.targets) for request in requests),
            **self.chat_protocol(context),
            **self.part_protocol(),
        }

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            logprob, ones = scores.request_logprob(), np.ones(len(requests))
            correct = np.where(np.isnan(logprob), np.nan, scores.request_greedy())
            return {
                "accuracy": ExampleScores(correct, ones, bounds=(0.0, 1.0)),
                "perplexity": ExampleScores(-logprob, ones, "exp", higher_is_better=False),
            }

        task = ScoredTask(name, protocol, requests, [str(number) for number, _ in chosen], measure)
        return by_column(task, f"tasks.{name}", self.cluster_column, [row for _, row in chosen])
