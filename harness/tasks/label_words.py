"""Classification by a language model: which of a few words it finds most probable after a text."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from harness.errors import InputError, wrong
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.tasks import data, tokenization
from harness.tasks.chat import ChatTask
from harness.tasks.clusters import by_column
from harness.tasks.labelled_texts import LabelledText
from harness.tasks.settings import RowsTask


@dataclass
class LabelWordsTask(ChatTask, RowsTask):
    """The most probable of some words after a text that a template makes of a row, one word for each label."""

    split: str = "validation"
    template: str = "{sentence}\nThis was"  # {column} stands for the text of a column
    words: dict[str, str] = field(default_factory=lambda: {"0": " bad", "1": " good"})  # label in the data -> word
    label_column: str = "label"
    kind: ClassVar[str] = "label_words"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._columns():
            raise wrong("template", self.template, "it must name at least one column in braces, for example {sentence}")
        if len(set(self.words.values())) < max(2, len(self.words)):
            raise wrong("words", self.words, "give at least two labels, each with a word of its own")

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each row, which asks for all words after the text.

        Each word must be one token there, so that they compete at one position. Metrics:
        accuracy: whether the right word is the most probable of the words (a tie of k counts 1 / k).
        cross_entropy: the cross-entropy of the words' probabilities, divided by their sum, in nats (lower is better).
        logprob, p_words: the log-probability of the right word in nats, and the sum of the probabilities of the words;
            both are over the whole vocabulary, and higher is better.
        Raises InputError for a column that a row lacks, a label without a word, or a word of several tokens, and as
        `DataSource.rows` does.
        """
        picked, texts = self._read(name, context)
        n_words = len(self.words)
        requests = [
            Request(text.tokens, np.full(n_words, len(text.tokens) - 1), np.array(text.words, dtype=np.int64))
            for text in texts
        ]
        labels = np.array([text.label for text in texts])
        protocol = {
            "data": self.source(),
            "template": self.template,
            "words": dict(self.words),
            "label_column": self.label_column,
            "digest": data.digest(row[column] for _, row in picked for column in self._columns()),
            "labels": data.digest(map(str, labels)),
            "bos": tokenization.adds_bos(context.tokenizer),
            "context_length": context.context_length,
            "n_examples": len(picked),
            **self.chat_protocol(context),
            **self.part_protocol(),
        }
        ones, every = np.ones(len(picked)), np.arange(len(picked))

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            logprob = scores.logprob.reshape(len(picked), n_words)
            right, best = logprob[every, labels], logprob.max(axis=1)
            tied = (logprob == best[:, None]).sum(axis=1)
            lost = np.isnan(logprob).any(axis=1)
            total = np.logaddexp.reduce(logprob, axis=1)
            accuracy = np.where(lost, np.nan, (right == best) / np.maximum(tied, 1))
            return {
                "accuracy": ExampleScores(accuracy, ones, bounds=(0.0, 1.0)),
                "cross_entropy": ExampleScores(total - right, ones, higher_is_better=False),
                "logprob": ExampleScores(right, ones),
                "p_words": ExampleScores(np.exp(total), ones, bounds=(0.0, 1.0)),
            }

        task = ScoredTask(name, protocol, requests, [str(number) for number, _ in picked], measure)
        return by_column(task, f"tasks.{name}", self.cluster_column, [row for _, row in picked])

    def labelled(self, name: str, context: TaskContext) -> list[LabelledText]:
        """Return the rows as texts to train a language model on. Raises InputError as `prepare` does."""
        return self._read(name, context)[1]

    def _columns(self) -> list[str]:
        """Return the columns that the template names. Raises SettingError for anything but names in braces."""
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise wrong("template", self.template, f"{error}; write {{{{ for a brace") from None
        names = [name for _, name, _, _ in parts if name is not None]
        for (_, name, form, conversion) in parts:
            if name is not None and (not name or form or conversion or set(name) & set(".[]!:")):
                raise wrong("template", self.template, "only names of columns may stand in braces, as in {sentence}")
        return list(dict.fromkeys(names))

    def _read(self, name: str, context: TaskContext) -> tuple[Sequence[tuple[int, dict[str, Any]]], list[LabelledText]]:
        tokenization.require_tokenizer(name, context.tokenizer)
        key, columns = f"tasks.{name}", self._columns()
        picked = self.choose(key, self.rows(key, columns), lambda row: "\n".join(row[column] for column in columns))
        data.refuse_empty(key, picked, columns)
        return picked, [self._text(f"{key} row {number}", row, columns, context) for number, row in picked]

    def _text(self, key: str, row: Mapping[str, Any], columns: Sequence[str], context: TaskContext) -> LabelledText:
        if self.label_column not in row:
            raise InputError(f"{key}: no column {self.label_column!r}; its columns are {', '.join(map(str, row))}")
        value = row[self.label_column]
        if isinstance(value, float) and value.is_integer():  # a data frame may have turned 1 into 1.0
            value = int(value)
        names = [str(label) for label in self.words]
        if str(value) not in names:
            raise InputError(f"{key}: label {repr(value)[:80]} has no word in {key.split(' ')[0]}.words, which has"
                             f" {', '.join(names)}; add it, or use other data")
        text = self.template.format(**{column: row[column] for column in columns})
        tokens: list[int] = []
        words = []
        for word in self.words.values():
            if self.chat:  # the word begins the assistant's turn
                tokens, of_word = self.encode_pair(key, context, text, word.lstrip())
            else:
                tokens, of_word = tokenization.encode_pair(context.tokenizer, text, word)
            if len(of_word) != 1:
                raise InputError(f"{key.split(' ')[0]}.words: {word!r} is {len(of_word)} tokens after {text[-20:]!r};"
                                 " use words of one token each")
            words.append(of_word[0])
        if len(set(words)) < len(words):
            raise InputError(f"{key.split(' ')[0]}.words: two of the words are the same token; use other words")
        kept = np.asarray(tokens[-context.context_length :], dtype=np.int64)
        return LabelledText(kept, None, names.index(str(value)), tuple(words))
