"""Exact p-values and intervals for counts of right answers, of which an ablation often changes only a few.

If few answers change, a t-test is wrong in both directions: a single changed answer has p = 0.32, however often nothing
else changes, and an interval of t times the standard error has no width where no answer changed. What is exact instead:

- p is that of the randomisation test that exchanges the two models in every cluster with probability 1/2. The change of
  a cluster is then as likely to be negative as positive. If every example is its own cluster, this is McNemar's exact
  test (Psychometrika 12, 1947).
- The interval of the change of an accuracy over independent questions is the melded one of Fay and Lumbard (Confidence
  intervals for difference in proportions for matched pairs compatible with exact McNemar's or sign tests, Statistics in
  Medicine 40, 2021). It contains zero exactly if McNemar's exact p is not below one minus the confidence.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MOST_STEPS = 20_000_000  # of the exact test; it needs more only where so many answers change that a t-test is as good
_POINTS = 200  # of the numerical integration over the share of gains
_HALVINGS = 40


def are_counts(changes: np.ndarray) -> bool:
    """Return whether all changes of the examples' scores, float64 [n], are whole numbers."""
    return bool(np.array_equal(changes, np.rint(changes)))


def sign_flip_p(changes: np.ndarray) -> float | None:
    """Return the two-sided p-value of the exact test of clusters with these changes, which are whole numbers [G].

    It is the probability that the sum of the changes, each with a random sign, is at least as far from zero. None if it
    would take more than MOST_STEPS.
    """
    sizes = np.abs(np.rint(changes)).astype(np.int64)
    sizes, observed = sizes[sizes > 0], abs(int(np.rint(changes.sum())))
    if observed == 0:
        return 1.0
    if (sizes == 1).all():
        from scipy.special import bdtr

        return float(min(1.0, 2 * bdtr((len(sizes) - observed) // 2, len(sizes), 0.5)))
    reach = int(sizes.sum())
    if len(sizes) * reach > MOST_STEPS:
        return None
    # probability[s] is that of the changes with a positive sign having the sum s
    probability = np.zeros(reach + 1)
    probability[0], end = 1.0, 0
    for size in sizes.tolist():
        moved = probability[: end + 1] / 2
        probability[: end + 1] = moved
        probability[size : end + size + 1] += moved
        end += size
    return float(min(1.0, 2 * probability[: (reach - observed) // 2 + 1].sum()))


@lru_cache(4096)  # it is found by bisection, and the cells of a task have few different counts
def mcnemar_interval(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Return the ends of the interval of the change of an accuracy over n independent questions.

    gained, lost: the numbers of answers that are right only with, and only without, the ablation.
    """
    upper = _upper_end(gained, lost, n, (1 - confidence) / 2)
    return -_upper_end(lost, gained, n, (1 - confidence) / 2), upper


def _upper_end(gained: int, lost: int, n: int, alpha: float) -> float:
    """Return the upper end of a one-sided interval: the quantile 1 - alpha of psi (2 theta - 1).

    theta, the share of gains among the changed answers, and psi, the share of changed answers, are independent. theta
    has the upper confidence distribution of Clopper and Pearson, and psi the upper or the lower one, whichever makes
    the product larger.
    """
    from scipy.special import betainc, betaincinv

    changed = gained + lost
    if changed == 0:
        return float(betaincinv(1, n, 1 - alpha))
    # The one-sided test refuses if this much of theta is below one half.
    below = float(betainc(gained + 1, lost, 0.5)) if lost else 0.0
    positive = 1 - below > alpha
    low, high = (below, 1.0) if positive else (0.0, below)
    level = low + (high - low) * (np.arange(_POINTS) + 0.5) / _POINTS
    reach = np.abs(2 * betaincinv(gained + 1, lost, level) - 1) if lost else np.ones(1)

    def above(size: float) -> float:
        """Return the probability that the product is larger than size, or than -size if the end is negative."""
        share = np.minimum(size / np.maximum(reach, 1e-300), 1.0)
        if positive:
            larger = 1 - betainc(changed + 1, n - changed, share) if changed < n else share < 1
            return (1 - below) * float(np.mean(larger))
        return 1 - below + below * float(np.mean(betainc(changed, n - changed + 1, share)))

    # The probability falls with the size of a positive end, and rises with that of a negative one.
    inner, outer = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (inner + outer) / 2
        inner, outer = (middle, outer) if (above(middle) > alpha) == positive else (inner, middle)
    return outer if positive else -inner
