"""Blank scores: the metrics of a task, with their transforms and directions, can be found without a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from harness.errors import InputError
from harness.evaluation.requests import DirectTask, ExampleScores, PreparedTask, Scores, scored_tasks


def blank_measure(task: PreparedTask) -> dict[str, ExampleScores]:
    """Return what a task would return for log-probabilities of zero. Raises InputError for a DirectTask."""
    if isinstance(task, DirectTask):
        raise InputError(
            f"tasks.{task.name}: it has no log-probabilities, which a search and a prediction need; leave it out"
        )
    offsets = np.concatenate([[0], np.cumsum([len(request.targets) for request in task.requests])])
    zeros = np.zeros(offsets[-1])
    return task.measure(Scores(zeros, zeros.astype(bool), zeros.astype(np.int64), offsets))


def transforms(tasks: Mapping[str, PreparedTask]) -> dict[tuple[str, str], str]:
    """Return the transform of the ExampleScores of each (task, metric)."""
    return {
        (name, metric): scores.transform
        for name, task in scored_tasks(tasks).items() for metric, scores in blank_measure(task).items()
    }
