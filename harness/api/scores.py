"""Scores of a model on a task in memory, and the paired difference of two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.errors import InputError
from harness.evaluation.requests import ExampleScores
from harness.evaluation.statistics import estimate
from harness.evaluation.statistics import paired as paired_difference

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Score:
    """The scores of a model on a task.

    scores: metric -> the scores of all examples. example_ids: the names of the examples, in the same order.
    asked: a digest of what the task asked, by which `paired` refuses scores of different examples.
    """

    task: str
    scores: Mapping[str, ExampleScores]
    example_ids: Sequence[str]
    asked: str

    @property
    def metrics(self) -> pandas.DataFrame:
        """A table with one row per metric, the primary one first: metric, value, stderr, n, higher_is_better."""
        import pandas

        rows = []
        for name, scores in self.scores.items():
            found = estimate(scores)
            rows.append({"metric": name, "value": found.value, "stderr": found.stderr, "n": found.n,
                         "higher_is_better": scores.higher_is_better})
        return pandas.DataFrame(rows)

    @property
    def examples(self) -> pandas.DataFrame:
        """A table with one row per metric and example: metric, example_id, score, weight.

        The value of a metric is sum(score) / sum(weight), or the exponential of that for a perplexity.
        """
        import pandas

        return pandas.concat([
            pandas.DataFrame({"metric": name, "example_id": list(self.example_ids), "score": scores.score,
                              "weight": scores.weight})
            for name, scores in self.scores.items()
        ], ignore_index=True)


def paired(ablated: Score, baseline: Score) -> pandas.DataFrame:
    """Return how two scores of one task differ, paired over the examples.

    The table has one row per metric: metric, baseline, value, delta (ablated - baseline, in the unit of the metric),
    stderr (of delta), p_value (two-sided, paired; exact for counts of right answers). Raises InputError if the examples
    are not the same.

    >>> base = model.score(ioi)
    >>> with model.ablated("mlp", sh.regions.small(0.5)):
    ...     change = sh.paired(model.score(ioi), base)
    >>> list(change.columns)
    ['metric', 'baseline', 'value', 'delta', 'stderr', 'p_value']
    """
    import pandas

    if ablated.asked != baseline.asked:
        raise InputError(f"paired: {ablated.task!r} and {baseline.task!r} did not ask the same of the same examples")
    rows = []
    for name, scores in ablated.scores.items():
        reference = baseline.scores[name]
        found = paired_difference(scores, reference)
        rows.append({"metric": name, "baseline": estimate(reference).value, "value": estimate(scores).value,
                     "delta": found.delta, "stderr": found.stderr, "p_value": found.p_value})
    return pandas.DataFrame(rows)
