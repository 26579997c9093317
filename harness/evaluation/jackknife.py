"""The jackknife: standard errors of metrics that are not means over examples (F1, Matthews correlation, BLEU).

The metric is computed again without each example, which gives a pseudo-value for that example (Tukey 1958; Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 11). The pseudo-values serve as the scores of the examples. Their
mean is the metric, and the standard error of their mean is that of the jackknife. The differences between the
pseudo-values of two models are those of the jackknife for the difference of the metric.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# With more distinct examples than this, whole groups of examples are left out, so that the metric is computed at most
# so many times.
MOST_GROUPS = 200


def jackknife_scores(
    metric: Callable[[np.ndarray], float], alike: np.ndarray, clusters: np.ndarray | None = None
) -> np.ndarray:
    """Return one score for each example, float64 [n], whose mean is the metric of all examples.

    metric: a function from indices of examples, int64 [m] in ascending order, to the metric of these examples alone.
    alike: int64 [n]; examples with the same number have the same answer and the same reference, so that the metric is
        the same whichever of them is left out.
    clusters: int64 [n], the cluster of each example, as in ExampleScores; None if all examples are independent. With
        more than MOST_GROUPS distinct examples whole clusters are left out, so that no group has examples of different
        clusters. More than MOST_GROUPS clusters are put together to so many groups of whole clusters.
    The standard error of the mean of the scores is that of the delete-one jackknife. With more than MOST_GROUPS
    distinct examples it is that of the delete-a-group jackknife for groups of unequal size (Busing, Meijer and van der
    Leeden, Statistics and Computing 9, 1999), where example i is in group i mod MOST_GROUPS. If the metric is NaN, for
    all examples or without some of them, the scores are NaN.
    """
    n = len(alike)
    everything = np.arange(n)
    value = metric(everything)
    if n == 1:
        return np.array([value])
    _, group = np.unique(alike, return_inverse=True)
    one_each = group.max() < MOST_GROUPS
    if one_each:
        left_out = {int(g): np.array([np.flatnonzero(group == g)[0]]) for g in range(group.max() + 1)}
    else:
        independent = everything if clusters is None else np.unique(clusters, return_inverse=True)[1]
        if independent.max() == 0:  # a single cluster has no standard error
            independent = everything
        group = independent % MOST_GROUPS
        left_out = {int(g): np.flatnonzero(group == g) for g in range(group.max() + 1)}
    size = np.array([len(left_out[g]) for g in range(len(left_out))], dtype=np.float64)
    without = np.array([metric(np.delete(everything, left_out[g])) for g in range(len(left_out))])
    pseudo = n / size * value - (n / size - 1) * without
    # The scale turns the standard error over independent examples or clusters into that over groups of them. It is 1 if
    # each group is one of them.
    if one_each:
        scale = np.ones(len(size))
    elif clusters is None or len(np.unique(clusters)) == 1:
        scale = np.sqrt(n * (n - 1) / (MOST_GROUPS * (n - size)))
    else:
        sizes = np.bincount(independent)
        scale = size / np.sqrt(np.bincount(np.arange(len(sizes)) % MOST_GROUPS, np.square(sizes)))
    scores = (pseudo[group] - pseudo[group].mean()) * scale[group]
    return scores - scores.mean() + value
