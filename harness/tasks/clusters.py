"""Clusters: the examples of a task that depend on each other, such as the windows of one document.

Neighbouring windows of a text are alike. The standard error of their mean is larger than that of as many independent
windows, and a p-value that forgets this is too small. The clusters of a text are, in this order:

1. its documents, if there are at least DOCUMENTS of them and they have two windows or more on average. A document is an
   article of WikiText, which begins with a heading such as " = Robert Boulter = ", or else a row of the data;
2. otherwise stretches of consecutive windows of equal length (Ibragimov and Mueller, t-Statistic Based Correlation and
   Heterogeneity Robust Inference, Journal of Business and Economic Statistics 28, 2010, who recommend 8 or 16). There
   are as many as have BLOCK_CHARACTERS each, at least 2 and at most 8. The windows of a document are alike, so that
   blocks are nearly independent only if they are much longer than documents. If the documents of a text are not known,
   their length is taken from WikiText: a block is eight of its articles long. Eight blocks of a shorter text give
   p-values that are far too small (experiments/calibration). Two blocks hardly ever give a small one, because a text of
   a few documents cannot say what other documents would show.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask
from harness.tasks import data

DOCUMENTS = 4
FEWEST_BLOCKS, MOST_BLOCKS = 2, 8
BLOCK_CHARACTERS = 160_000  # an article of WikiText-2 has 20,000 on average
# An article of WikiText; its sections have two equals signs or more.
HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


def window_clusters(
    rows: Sequence[str], separator: str, starts: np.ndarray
) -> tuple[np.ndarray, dict[str, str]]:
    """Return the cluster of each window of a text, int64 [n], and what the protocol says of the clusters.

    rows: the rows that `separator` joins to the text. starts: int64 [n], the character of the text at which the scored
    part of each window begins.
    """
    headings = [match.start() for match in HEADING.finditer(separator.join(rows))]
    begins = headings or np.cumsum([0, *(len(row) + len(separator) for row in rows[:-1])])
    n = len(starts)
    clusters, called = np.searchsorted(begins, starts, side="right"), "articles" if headings else "rows"
    if not DOCUMENTS <= len(np.unique(clusters)) <= n / 2:
        characters = int(starts[-1] - starts[0]) * n // max(n - 1, 1)
        clusters, called = np.arange(n) * min(block_count(characters), n) // n, "blocks"
    return clusters, described(clusters, called)


def block_count(characters: int) -> int:
    """Return into how many blocks a text of so many characters is divided if its documents are not known."""
    return min(max(characters // BLOCK_CHARACTERS, FEWEST_BLOCKS), MOST_BLOCKS)


def by_column(
    task: PreparedTask, key: str, column: str | None, rows: Sequence[Mapping[str, Any]]
) -> PreparedTask:
    """Return a task in which examples with the same value in a column of the data are a cluster.

    key: "tasks.<name>". column: None leaves the task as it is. rows: the row of each example. Raises InputError if a
    row has no such column.
    """
    return task if column is None else clustered(task, _labels(key, column, rows), column)


def cluster_numbers(key: str, column: str | None, rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return the clusters of `by_column`, int64 [n], or None. Arguments and errors as there."""
    return None if column is None else numbered(_labels(key, column, rows))


def _labels(key: str, column: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    for row in rows:
        if column not in row:
            raise InputError(f"{key}.cluster_column: no column {column!r}; its columns are {', '.join(map(str, row))}")
    return [str(row[column]) for row in rows]


def clustered(task: PreparedTask, labels: Sequence[Hashable], name: str) -> PreparedTask:
    """Return a task whose metrics all have clusters.

    labels: for each example, the label of its cluster. name: what the clusters are, for the protocol.
    """
    clusters = numbered(labels)
    protocol = {**task.protocol, **described(clusters, name)}

    def with_clusters(measure: Callable[..., dict[str, ExampleScores]]) -> Any:
        def measured(*arguments: Any) -> dict[str, ExampleScores]:
            return {metric: replace(scores, clusters=clusters) for metric, scores in measure(*arguments).items()}

        return measured

    if isinstance(task, DirectTask):
        return replace(task, protocol=protocol, measure=with_clusters(task.measure))
    return replace(task, protocol=protocol, measure=with_clusters(task.measure))


def described(clusters: np.ndarray, called: str) -> dict[str, str]:
    """Return what a protocol says of clusters: what they are, their number, and a digest of which example is where."""
    count = len(np.unique(clusters))
    return {"clusters": f"{count} {called}", "clusters_digest": data.digest(map(str, clusters.tolist()))}


def numbered(labels: Sequence[Hashable]) -> np.ndarray:
    """Return the number of each label in the order of their first appearance, int64 [n]."""
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([number[label] for label in labels], dtype=np.int64)
