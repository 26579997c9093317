"""Factual recall: the probability of the first token of the true object, also compared with generic words.

The rows are those of CounterFact (Meng et al. 2022, arXiv 2202.05262) or of the known facts of the same authors. The
comparison with generic words ("Madrid is located in" -> "Spain" or "the") is that of arXiv 2406.03068.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.tasks import data, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import by_column
from harness.tasks.settings import PromptTask

TARGET_COLUMNS = ("ground_truth", "attribute", "target_true")


@dataclass
class FactualTask(ChatTask, PromptTask):
    """Factual recall: the first token of the true object, compared with generic words."""

    split: str = "train"
    generic_words: list[str] = field(default_factory=lambda: ["the", "a", "an", "in", "of", "and", "not"])
    kind: ClassVar[str] = "factual"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each prompt.

        A request asks, at the last position of the prompt, for the first token of " " + target and for the first token
        of " " + each generic word.

        Metrics of the target's first token; higher is better unless stated otherwise:
        accuracy: whether it is the most probable token of the vocabulary.
        logprob, p_target: its log-probability in nats, and its probability.
        p_generic: the sum of the probabilities of the distinct first tokens of the generic words (lower is better).
        accuracy_vs_generic: whether it is more probable than each of these tokens.
        mean_reciprocal_rank, mean_log_rank: 1 / rank and ln(rank) (lower is better), where the most probable token has
            rank 1.

        Raises InputError if there are no generic words or a row has no prompt or target, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        prefix = tokenization.prefix_of(name, context.tokenizer, self.bos)
        if not self.generic_words:
            raise InputError(f"tasks.{name}.generic_words: name at least one word")
        if not all(word.strip() for word in self.generic_words):
            raise InputError(f"tasks.{name}.generic_words: one of the words is empty; remove it")
        found = self.rows(f"tasks.{name}")
        chosen = self.choose(f"tasks.{name}", found, lambda row: prompt_and_target(f"tasks.{name}", row)[0])
        numbers = [number for number, _ in chosen]
        facts = [prompt_and_target(f"tasks.{name} row {number}", row) for number, row in chosen]
        generic = self._generic_tokens(f"tasks.{name}", context)
        requests = []
        for number, (prompt, target) in zip(numbers, facts):
            whole = self.ask(f"tasks.{name} row {number}", context, prompt, target, self.bos)
            last = whole.positions[0]
            asked = np.array([whole.targets[0], *generic], dtype=np.int64)
            requests.append(Request(whole.tokens[: last + 1], np.full(len(asked), last), asked))
        protocol = {
            "data": self.source(),
            "digest": data.digest(text for fact in facts for text in fact),
            "bos": bool(prefix),
            "n_examples": len(facts),
            "generic_words": list(self.generic_words),
            "generic_tokens": generic,
            **self.chat_protocol(context),
            **self.part_protocol(),
        }

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            assert scores.rank is not None
            logprob = scores.logprob.reshape(len(facts), 1 + len(generic))
            first = scores.offsets[:-1]
            rank = 1.0 + scores.rank[first]
            target, words = logprob[:, 0], logprob[:, 1:]
            lost = np.isnan(logprob).any(1)

            def mean(score: np.ndarray, higher_is_better: bool = True) -> ExampleScores:
                # The rank of NaN and comparisons with NaN are ordinary numbers, and would pass for an answer.
                return ExampleScores(np.where(lost, np.nan, score), np.ones(len(facts)), "identity", higher_is_better)

            def share(score: np.ndarray, higher_is_better: bool = True) -> ExampleScores:
                return replace(mean(score, higher_is_better), bounds=(0.0, 1.0))

            return {
                "accuracy": share(scores.greedy[first]),
                "logprob": mean(target),
                "p_target": share(np.exp(target)),
                "p_generic": share(np.exp(words).sum(1), higher_is_better=False),
                "accuracy_vs_generic": share(target > words.max(1)),
                "mean_reciprocal_rank": share(1 / rank),
                "mean_log_rank": mean(np.log(rank), higher_is_better=False),
            }

        ids = [str(number) for number in numbers]
        task = ScoredTask(name, protocol, requests, ids, measure, needs_rank=True)
        return by_column(task, f"tasks.{name}", self.cluster_column, [row for _, row in chosen])

    def _generic_tokens(self, key: str, context: TaskContext) -> list[int]:
        """Return the distinct first tokens of the generic words after another word, in the order of the words.

        In a chat they begin the assistant's turn, as the targets do.
        """
        if self.chat:
            pairs = (self.encode_pair(key, context, "a", word.strip()) for word in self.generic_words)
        else:
            pairs = (tokenization.encode_pair(context.tokenizer, "a", " " + word) for word in self.generic_words)
        return list(dict.fromkeys(int(answer[0]) for _, answer in pairs))


def prompt_and_target(key: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the prompt of a row, without spaces at its end, and the true object.

    A row has `prompt` and `ground_truth` (CounterFact of EasyEdit), `attribute` (known facts) or `target_true`, or it
    has `requested_rewrite` (the original CounterFact). Raises InputError for any other row; its message begins with
    `key`.
    """
    rewrite = row.get("requested_rewrite")
    prompt = target = None
    if isinstance(rewrite, Mapping):
        template, subject, answer = (rewrite.get(part) for part in ("prompt", "subject", "target_true"))
        if isinstance(template, str) and isinstance(subject, str) and isinstance(answer, Mapping):
            # not str.format, for which other braces of the data would be fields
            prompt, target = template.replace("{}", subject), answer.get("str")
    else:
        prompt = row.get("prompt")
        target = next((row[column] for column in TARGET_COLUMNS if column in row), None)
    if not (isinstance(prompt, str) and isinstance(target, str) and prompt.strip() and target.strip()):
        raise InputError(
            f"{key}: needs text in the columns prompt and {' or '.join(TARGET_COLUMNS)}"
            f" (or requested_rewrite); its columns are {', '.join(map(str, row))}"
        )
    return prompt.rstrip(), target.strip()
