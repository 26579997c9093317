"""Classifiers (AutoModelForSequenceClassification): accuracy and cross-entropy on labelled texts or pairs of texts."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np

from harness.errors import InputError
from harness.evaluation.jackknife import MOST_GROUPS
from harness.evaluation.requests import ExampleScores, PreparedTask, Request, ScoredTask, Scores, TaskContext
from harness.settings.constraints import at_least
from harness.tasks import data, tokenization
from harness.tasks.clusters import by_column, cluster_numbers
from harness.tasks.evaluate_metrics import Metrics, MetricSet
from harness.tasks.labelled_texts import LabelledText
from harness.tasks.settings import RowsTask


@dataclass
class ClassificationTask(RowsTask):
    """Accuracy and cross-entropy of a classifier, which is a checkpoint with a sequence classification head."""

    split: str = "validation"
    text_column: str = "sentence"
    pair_column: str | None = None  # column of the second sentence, for a model that reads pairs
    label_column: str = "label"  # column with the number or the name of a class of the model
    label_map: dict[str, Annotated[int, at_least(0)]] = field(default_factory=dict)  # label in the data -> class number
    metrics: Metrics = field(default_factory=list)  # metrics of Hugging Face evaluate, in addition to the built-in ones
    kind: ClassVar[str] = "classification"
    measured_on: ClassVar[tuple[str, ...]] = ("classification",)

    def prepare(self, name: str, context: TaskContext) -> PreparedTask:
        """Return the task with one request for each row.

        A request asks for the log-probability of the label, or of every class if there are `metrics`. The tokenizer
        encodes the texts as one sentence or as a pair. It cuts texts that are longer than the model's context (the
        longer text of a pair first), and the protocol says how many were cut.
        Metrics: accuracy, cross_entropy (nats, lower is better), and those of `metrics`, whose predictions are class
        numbers.
        Raises InputError if the model has fewer than two classes, a label is none of them, or a metric cannot be
        computed, and as `DataSource.rows` does.
        """
        key, columns = f"tasks.{name}", self._columns()
        picked, labels = self._read(name, context)
        rows, classes = [row for _, row in picked], context.model_config.num_labels
        # With few classes the jackknife leaves out one example at a time, for which clusters do not matter.
        column = self.cluster_column if classes**2 > MOST_GROUPS else None
        clusters = cluster_numbers(key, column, rows)
        metrics = MetricSet(key, self.metrics, ("accuracy", "cross_entropy"), clusters)
        metrics.rehearse(labels)
        encoded = [_encode(context, *(row[column] for column in columns)) for _, row in picked]
        asked = [np.arange(classes) if metrics else np.array([label]) for label in labels]
        requests = [
            Request(tokens, np.zeros(len(targets), dtype=np.int64), targets, segments=segments)
            for (tokens, segments, _), targets in zip(encoded, asked)
        ]
        protocol = {
            "data": self.source(),
            "columns": columns,
            "label_column": self.label_column,
            "label_map": dict(self.label_map),
            "digest": data.digest(row[column] for _, row in picked for column in columns),
            "context_length": context.context_length,
            "n_classes": classes,
            "n_examples": len(picked),
            "n_truncated": sum(cut for _, _, cut in encoded),
            # With metrics, requests ask for every class, so that the right one is not in them.
            **({"labels": data.digest(map(str, labels))} if metrics else {}),
            **metrics.protocol(),
            **self.part_protocol(),
        }
        ones = np.ones(len(picked))

        def measure(scores: Scores) -> dict[str, ExampleScores]:
            of_label = scores.offsets[:-1] + (np.array(labels) if metrics else 0)
            predictions = scores.greedy.reshape(len(picked), -1).argmax(axis=1).tolist() if metrics else []
            return {
                "accuracy": ExampleScores(scores.greedy[of_label].astype(np.float64), ones, bounds=(0.0, 1.0)),
                "cross_entropy": ExampleScores(-scores.logprob[of_label], ones, higher_is_better=False),
                **metrics.scores(predictions, labels),
            }

        ids = [str(number) for number, _ in picked]
        task = ScoredTask(name, protocol, requests, ids, measure, whole=bool(metrics))
        return by_column(task, key, self.cluster_column, rows)

    def labelled(self, name: str, context: TaskContext) -> list[LabelledText]:
        """Return the rows as texts to train a classifier on. Raises InputError as `prepare` does."""
        picked, labels = self._read(name, context)
        encoded = (_encode(context, *(row[column] for column in self._columns())) for _, row in picked)
        return [LabelledText(tokens, segments, label) for (tokens, segments, _), label in zip(encoded, labels)]

    def _columns(self) -> list[str]:
        return [self.text_column] if self.pair_column is None else [self.text_column, self.pair_column]

    def _read(self, name: str, context: TaskContext) -> tuple[list[tuple[int, dict[str, Any]]], list[int]]:
        """Return (row number, row) of the examples, and the class of each."""
        tokenization.require_tokenizer(name, context.tokenizer)
        key = f"tasks.{name}"
        classes = context.model_config.num_labels
        if classes < 2:
            raise InputError(
                f"{key}: the model has {classes} output, a regression; kind classification needs two classes"
            )
        for label, number in self.label_map.items():
            if not 0 <= number < classes:
                raise InputError(f"{key}.label_map.{label}: the model has no class {number}, only 0 to {classes - 1}")
        columns = self._columns()
        found = self.rows(key, columns)
        picked = self.choose(key, found, lambda row: "\n".join(row[column] for column in columns))
        ids_of = {str(k): int(v) for k, v in (getattr(context.model_config, "label2id", None) or {}).items()}
        data.refuse_empty(key, picked, [self.text_column])
        return picked, [_label(f"{key} row {n}", row, self, classes, ids_of) for n, row in picked]


def _encode(context: TaskContext, *texts: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Return the tokens, the sentence of each token, and whether the texts were cut to the model's context.

    Both arrays are int64 [n]. The sentences (0 or 1) are None if the tokenizer does not give token types.
    """
    tokenizer, limit = context.tokenizer, context.context_length
    encoding = tokenizer(*texts, verbose=False)
    cut = len(encoding["input_ids"]) > limit
    if cut:
        encoding = tokenizer(*texts, truncation=True, max_length=limit, verbose=False)
    segments = encoding.get("token_type_ids")
    return (
        np.asarray(encoding["input_ids"], dtype=np.int64),
        None if segments is None else np.asarray(segments, dtype=np.int64), cut,
    )


def _label(key: str, row: dict[str, Any], task: ClassificationTask, classes: int, ids_of: dict[str, int]) -> int:
    """Return the class of a row: by `label_map` if it is set, else by the model's name or the number of the class."""
    if task.label_column not in row:
        raise InputError(f"{key}: no column {task.label_column!r}; its columns are {', '.join(map(str, row))}")
    value = row[task.label_column]
    if isinstance(value, float) and value.is_integer():  # a data frame may have turned 1 into 1.0
        value = int(value)
    # A truth value is not a number here: whether true is class 1 is for label_map to say.
    label = {str(k): v for k, v in task.label_map.items()}.get(str(value))
    if label is None and not task.label_map:
        label = ids_of.get(str(value))
        if label is None and re.fullmatch(r"[0-9]{1,9}", str(value)):
            label = int(value)
    if label is None and task.label_map:
        raise InputError(
            f"{key}: label {repr(value)[:80]} is not in {key.split(' ')[0]}.label_map, which has"
            f" {', '.join(map(str, task.label_map))}; add it, or use other data"
        )
    if label is None or not 0 <= label < classes:
        known = ", ".join(map(str, ids_of)) or f"0 to {classes - 1}"
        raise InputError(
            f"{key}: label {repr(value)[:80]} is none of the model's {classes} classes ({known}); use a split with"
            f" labels, or set {key.split(' ')[0]}.label_map, for example {{entailment: 0}}"
        )
    return label
