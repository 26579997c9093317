"""Indirect-object identification: "When Paula and Lee got a plum, Lee gave it to" is to continue with Paula, not Lee.

(Wang et al. 2022, arXiv 2211.00593.) A row has a `prompt` and the `answer` that should follow it. The other name, which
should not follow, is found in the prompt: it is the subject and occurs twice, while the answer occurs once.
"""

from __future__ import annotations

import re
from collections import Counter
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
class IoiTask(ChatTask, PromptTask):
    """Indirect-object identification: the name that should follow, compared with the name that should not."""

    split: str = "train"
    kind: ClassVar[str] = "ioi"

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with two requests for each prompt, " " + answer and " " + other name.

        Metrics; higher is better for all of them:
        accuracy: whether the whole answer has the larger log-probability. A tie counts one half, which is chance.
        logit_difference: the logit of the answer minus that of the other name, in nats, at the first token in which
            they differ. Both are read at the same position, so that this is the difference of the log-probabilities.
            If the tokens of one name are the beginning of the other's, there is no such position, and the difference of
            the log-probabilities of the whole names is taken.
        p_answer, logprob: the probability of the whole answer, and its logarithm in nats.

        Raises InputError if a prompt does not have exactly one such pair of names, and as `DataSource.rows` does.
        """
        tokenization.require_tokenizer(name, context.tokenizer)
        prefix = tokenization.prefix_of(name, context.tokenizer, self.bos)
        found = self.rows(f"tasks.{name}", ["prompt", "answer"])
        chosen = self.choose(f"tasks.{name}", found, lambda row: row["prompt"])
        data.refuse_empty(f"tasks.{name}", chosen, ["prompt", "answer"])
        requests, shared = [], []
        for number, row in chosen:
            key = f"tasks.{name} row {number}"
            prompt, answer = row["prompt"].rstrip(), row["answer"].strip()
            pair = [
                self.ask(key, context, prompt, who, self.bos)
                for who in (answer, other_name(key, prompt, answer))
            ]
            requests += pair
            shared.append(_shared_tokens(*(request.targets for request in pair)))
        # The index within the names of the first token in which they differ, or -1 if there is none.
        differs = np.array([-1 if k is None else k for k in shared], dtype=np.int64)
        protocol = {
            "data": self.source(),
            "digest": data.digest(text for _, row in chosen for text in (row["prompt"], row["answer"])),
            "bos": bool(prefix),
            "n_examples": len(chosen),
            "n_shared_first_token": int((differs != 0).sum()),
            "n_prefix_names": int((differs < 0).sum()),
            **self.chat_protocol(context),
            **self.part_protocol(),
        }

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            answer, other = scores.request_logprob().reshape(-1, 2).T
            first = scores.offsets[:-1].reshape(-1, 2) + np.maximum(differs, 0)[:, None]
            at_difference = scores.logprob[first[:, 0]] - scores.logprob[first[:, 1]]
            ones = np.ones(len(answer))
            return {
                # heaviside of NaN is NaN, so that a lost answer is not counted as wrong.
                "accuracy": ExampleScores(np.heaviside(answer - other, 0.5), ones, bounds=(0.0, 1.0)),
                "logit_difference": ExampleScores(np.where(differs < 0, answer - other, at_difference), ones),
                "p_answer": ExampleScores(np.exp(answer), ones, bounds=(0.0, 1.0)),
                "logprob": ExampleScores(answer, ones),
            }

        task = ScoredTask(
            name, protocol, requests, [str(number) for number, _ in chosen], measure,
            example_of=np.arange(len(chosen)).repeat(2),
        )
        return by_column(task, f"tasks.{name}", self.cluster_column, [row for _, row in chosen])


def other_name(key: str, prompt: str, answer: str) -> str:
    """Return the capitalised word other than the answer that occurs exactly twice in a prompt.

    Raises InputError if there is not exactly one such word, or the answer does not occur exactly once; its message
    begins with `key`.
    """
    if not any(character.isalpha() for character in answer):
        raise InputError(f"{key}: the answer {answer!r} is no name")
    words = Counter(re.findall(r"\b[^\W\d_][\w'’-]*", prompt))
    if len(re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", prompt)) != 1:
        raise InputError(f"{key}: the answer {answer!r} must occur exactly once in the prompt {prompt!r}")
    twice = [word for word, count in words.items() if count == 2 and word[0].isupper() and word != answer]
    if len(twice) != 1:
        raise InputError(f"{key}: one name besides {answer!r} must occur twice in the prompt, not {twice}: {prompt!r}")
    return twice[0]


def _shared_tokens(first: np.ndarray, second: np.ndarray) -> int | None:
    """Return how many first tokens two names share, or None if one name is the beginning of the other."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else None
