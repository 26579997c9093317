"""RULER (Hsieh et al. 2024, arXiv 2404.06654): retrieval, tracking and counting in texts of a chosen length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from harness.errors import InputError, SettingError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask, TaskContext
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.generation import (
    Decoding,
    require_generation,
    require_room,
    written_texts,
)
from harness.tasks.ruler_texts import FILLER, FORMS, Question
from harness.tasks.settings import Task, require_file

if TYPE_CHECKING:
    from harness.evaluation.division import Division
    from harness.models.loading import LoadedModel

SLOT = "{prompt}"


@dataclass
class RulerTask(Task):
    """Questions about texts that are generated from a seed, and the share of the answers that the model's text has."""

    task: Literal["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"]
    length: Annotated[int, at_least(64)] = 8192  # tokens of the prompt and of the answer together
    n_examples: Annotated[int, at_least(1)] = 100
    seed: Annotated[int, at_least(0)] = 0
    max_new_tokens: Annotated[int, at_least(1)] | None = None  # null: as many as in RULER
    haystack: str | None = None  # a text file whose sentences fill niah and vt; null: RULER's five repeated sentences
    template: str = SLOT  # what surrounds a question, for models that were trained on chats
    kind: ClassVar[str] = "ruler"

    def __post_init__(self) -> None:
        require_file("haystack", self.haystack)
        if self.template.count(SLOT) != 1:
            raise SettingError("template", f"it must hold {SLOT} once, where the question goes")

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task. Each text has as many units as fit into `length` tokens with the answer.

        Metrics: string_match, the share of the expected strings that the written text contains, in upper or lower case
        (RULER's string_match_all); all_found, whether it contains all of them.
        Raises InputError if `length` is more than the model's context or too small for the question, or the file of the
        haystack holds no text.
        """
        key = f"tasks.{name}"
        tokenization.require_tokenizer(name, context.tokenizer)
        if self.length > context.context_length:
            raise InputError(
                f"{key}.length: {self.length} tokens are more than the model's context of {context.context_length}"
            )
        form = FORMS[self.task]
        new_tokens = self.max_new_tokens or form.new_tokens
        require_room(key, new_tokens, self.length)
        filler = _sentences(key, self.haystack)
        questions: list[Question] = []
        prompts: list[list[int]] = []
        size = form.least
        for number in range(self.n_examples):

            def made(units: int, number: int = number) -> tuple[Question, list[int]]:
                question = form.make(random.Random(f"{self.task} {self.seed} {number}"), units, filler)
                text = self.template.replace(SLOT, question.text) + question.opening
                return question, tokenization.encode(context.tokenizer, text)

            def fits(units: int, made: Callable[..., tuple[Question, list[int]]] = made) -> bool:
                return len(made(units)[1]) + new_tokens <= self.length

            found = largest(fits, form.least, size)
            if found is None:
                needed = len(made(form.least)[1]) + new_tokens
                raise InputError(f"{key}.length: {self.length} tokens are too few; the shortest text has {needed}")
            size = found
            question, tokens = made(size)
            questions.append(question)
            prompts.append(tokens)
        decoding = Decoding((), new_tokens)
        protocol = {
            "task": self.task,
            "length": self.length,
            "seed": self.seed,
            "n_examples": self.n_examples,
            "haystack": "repeated sentences" if self.haystack is None else Path(self.haystack).name,
            "template": self.template,
            "digest": data.digest(part for one in questions for part in (one.text, one.opening, *one.answers)),
            "decoding": "greedy",
            "max_new_tokens": new_tokens,
            "generation": dict(context.generation),
            "batch_tokens": context.generation_tokens,
            "tokenizer": tokenization.tokenizer_digest(context.tokenizer),
        }

        def measure(loaded: LoadedModel, division: Division, batch_share: float) -> dict[str, ExampleScores]:
            require_generation(loaded.model, context.generation)
            written = written_texts(loaded, prompts, decoding, division, int(context.generation_tokens * batch_share))
            shares = np.array([share_found(text, one.answers) for text, one in zip(written, questions)])
            ones = np.ones(len(shares))
            return {
                "string_match": ExampleScores(shares, ones, bounds=(0.0, 1.0)),
                "all_found": ExampleScores((shares == 1).astype(np.float64), ones, bounds=(0.0, 1.0)),
            }

        ids = [str(number) for number in range(self.n_examples)]
        return DirectTask(name, protocol, ids, measure, inputs=prompts)


def share_found(text: str, answers: tuple[str, ...]) -> float:
    """Return the share of the answers that a text contains, in upper or lower case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def largest(fits: Callable[[int], bool], least: int, guess: int) -> int | None:
    """Return a number n >= least with fits(n) and not fits(n + 1), or None if fits(least) is false.

    If `fits` is true up to some number and false above it, that number is returned. guess: where the search begins.
    """
    low, step = max(least, guess), 1
    while not fits(low):
        if low == least:
            return None
        low, step = max(least, low - step), 2 * step
    step = 1
    while fits(low + step):
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if fits(low + step):
            low += step
    return low


def _sentences(key: str, path: str | None) -> list[str]:
    """Return the sentences that fill a text: RULER's five, or those of a file, which end in a full stop."""
    if path is None:
        return list(FILLER)
    rows = data.DataSource(data_files=path).rows(f"{key}.haystack", ["text"])
    words: Any = " ".join(row["text"] for row in rows).split()
    if not words:
        raise InputError(f"{key}.haystack: {path} holds no text")
    sentences: list[list[str]] = [[]]
    for word in words:
        sentences[-1].append(word)
        if word[-1] in ".!?":
            sentences.append([])
    return [" ".join(sentence) for sentence in sentences if sentence]
