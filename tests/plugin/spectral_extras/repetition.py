"""A kind of task that needs no data: random tokens twice in a row, is the second half predicted from the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores, Request, ScoredTask, Scores, TaskContext
from harness.settings.constraints import at_least
from harness.tasks.settings import Task


@dataclass
class RepetitionTask(Task):
    """Random tokens, repeated once: induction without language."""

    n_sequences: Annotated[int, at_least(2)] = 16
    length: Annotated[int, at_least(2)] = 12  # tokens of each half
    seed: Annotated[int, at_least(0)] = 0
    kind: ClassVar[str] = "repetition"

    def prepare(self, name: str, context: TaskContext) -> ScoredTask:
        """One request per sequence, for the tokens of its second half. Metrics: accuracy, and nll in nats per token.

        Raises InputError where two halves are longer than the model's context."""
        if 2 * self.length > context.context_length:
            raise InputError(f"tasks.{name}.length: two halves of {self.length} do not fit into the model's context")
        vocabulary = context.model_config.get_text_config().vocab_size
        halves = np.random.default_rng(self.seed).integers(0, vocabulary, (self.n_sequences, self.length))
        rows = np.concatenate([halves, halves], axis=1)
        positions = np.arange(self.length - 1, 2 * self.length - 1)
        requests = [Request(row[:-1], positions, row[positions + 1]) for row in rows]
        weight = np.full(self.n_sequences, float(self.length))

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            right = np.add.reduceat(scores.greedy.astype(float), scores.offsets[:-1])
            return {
                "accuracy": ExampleScores(right, weight, bounds=(0.0, 1.0)),
                "nll": ExampleScores(-scores.request_logprob(), weight, higher_is_better=False),
            }

        protocol = {"n_sequences": self.n_sequences, "length": self.length, "seed": self.seed}
        return ScoredTask(name, protocol, requests, [str(i) for i in range(self.n_sequences)], measure)
