"""Texts with their right answers, as training reads them. A task that can be trained on makes them of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from harness.evaluation.requests import TaskContext


@dataclass(frozen=True)
class LabelledText:
    """One text to train on.

    tokens: int64 [n], the input of the model. segments: int64 [n], the sentence of each token, for encoders that read
    pairs of sentences; else None. label: the number of the right answer. words: the tokens among which a language model
    chooses after the text, one for each answer; empty if the answers are the classes of a classifier.
    """

    tokens: np.ndarray
    segments: np.ndarray | None
    label: int
    words: tuple[int, ...] = ()


@runtime_checkable
class Trainable(Protocol):
    """A task that can be trained on."""

    def labelled(self, name: str, context: TaskContext) -> list[LabelledText]:
        """Return the examples of the task as texts to train on, in their order.

        name: the name of the task, for messages. Raises InputError as `prepare` does.
        """
        ...
