"""Clusters: the examples of a task that depend on each other, such as the windows of one document.

Neighbouring windows of a text are alike. The standard error of their mean is larger than that of as many independent
windows, and a p-value that forgets this is too small. A text is made of documents if one knows where they begin (see
`documents`). The clusters of a text are, in this order:

1. its documents, if there are at least DOCUMENTS of them and they have two windows or more on average;
2. stretches of whole documents, if there are at least DOCUMENTS of shorter ones. Each has so many documents that there
   are at most MOST_STRETCHES of them, and at least two documents. A window belongs to the document in which it begins.
   So neighbouring clusters share at most one document, and the longer a stretch is, the less that matters: for
   many documents of equal length, of which all tokens change alike, the variance of a mean is by (1/3) / (m - 1/3)
   larger than its estimate if a stretch has m documents: 20 % for two of them and 9 % for four;
3. otherwise blocks: stretches of consecutive windows of equal length (Ibragimov and Mueller, t-Statistic Based
   Correlation and Heterogeneity Robust Inference, Journal of Business and Economic Statistics 28, 2010, who recommend 8
   or 16). There are as many as have BLOCK_CHARACTERS each, at least 2 and at most 8. The windows of a document are
   alike, so that blocks are nearly independent only if they are much longer than documents. As the documents are not
   known, their length is taken from WikiText: a block is eight of its articles long. Two blocks have no p-value (see
   `clustering`), because a text of a few documents cannot say what other documents would show.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask
from harness.tasks import data
from harness.tasks.documents import Documents

DOCUMENTS = 4
MOST_STRETCHES = 16
FEWEST_BLOCKS, MOST_BLOCKS = 2, 8
BLOCK_CHARACTERS = 160_000  # an article of WikiText-2 has 20,000 on average


def window_clusters(found: Documents, starts: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
    """Return the cluster of each window of a text, int64 [n], and what the protocol says of the clusters.

    starts: int64 [n], the character of the text at which the scored part of each window begins.
    """
    n = len(starts)
    clusters = np.searchsorted(found.begins, starts, side="right")
    within = int(clusters[-1] - clusters[0]) + 1
    if within >= DOCUMENTS and DOCUMENTS <= len(np.unique(clusters)) <= n / 2:
        return clusters, described(clusters, found.called)
    if within >= DOCUMENTS:
        size = stretch_size(within)
        clusters = (clusters - clusters[0]) // size
        return clusters, described(clusters, f"stretches of {size} {found.called}")
    characters = int(starts[-1] - starts[0]) * n // max(n - 1, 1)
    clusters = np.arange(n) * min(block_count(characters), n) // n
    return clusters, described(clusters, "blocks")


def stretch_size(documents: int) -> int:
    """Return how many documents a cluster has if documents are shorter than two windows."""
    return max(2, -(-documents // MOST_STRETCHES))


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
    labels = column_labels(key, column, rows)
    return task if column is None or labels is None else clustered(task, labels, column)


def cluster_numbers(key: str, column: str | None, rows: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Return the clusters of `by_column`, int64 [n], or None. Arguments and errors as there."""
    labels = column_labels(key, column, rows)
    return None if labels is None else numbered(labels)


def column_labels(key: str, column: str | None, rows: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Return the value of a column in each row, or None for no column. Arguments and errors as of `by_column`."""
    if column is None:
        return None
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
