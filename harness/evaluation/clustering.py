"""Standard errors, degrees of freedom and p-values over clusters of examples.

Examples of one cluster (the windows of a document, the questions to a passage) are not independent. The influences of
the examples on a metric (see `statistics`) are then summed within each of the G clusters. Each sum is divided by 1 - h,
where h is the cluster's share of the weights, which makes it the change of the metric if the cluster is left out. The
variance of the metric is (G - 1) / G times the sum of their squares over n^2. This is the cluster jackknife (CR3),
which holds for few clusters of unequal size better than others (Cameron and Miller, A Practitioner's Guide to
Cluster-Robust Inference, Journal of Human Resources 50, 2015, section VI; MacKinnon, Nielsen and Webb, Journal of
Applied Econometrics 38, 2023). If each example is its own cluster, the variance is that of their sample.

How well this variance is known depends on how unequal the clusters are: of 20 articles the two longest may be half of
the text. Student's t therefore has the degrees of freedom of Satterthwaite, computed for this variance as Bell and
McCaffrey do (Survey Methodology 28, 2002; Imbens and Kolesar, Review of Economics and Statistics 98, 2016; Pustejovsky
and Tipton, Journal of Business and Economic Statistics 36, 2018). Their working model is here that all examples of a
cluster change alike, so that the sum over a cluster varies as its weight does. Of all models of equal correlation
within clusters it has the fewest degrees of freedom. For clusters of equal weight they are G - 1, and the test of a
mean is Student's.

Fewer than FEWEST clusters have a standard error, which says how much they differ, but neither degrees of freedom nor a
p-value. Two clusters are two halves of a short text. As they are neighbours, they are more alike than two other texts
would be, and nothing in them shows by how much (experiments/calibration).

No p-value comes from a variance of zero. If all clusters change by the same amount, p is that of the sign test,
2^(1 - G). The p-value of a count, whose changes are whole numbers, is exact (see `counts`).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from harness.evaluation.counts import are_counts, sign_flip_p

FEWEST = 3  # clusters from which a p-value may come
EQUAL = 1e-12  # a standard error of so small a share of the delta is that of equal changes, apart from rounding
SMALLEST = float(np.finfo(np.float64).tiny)  # stands for every p-value that is smaller, so that none is 0


class Clusters:
    """The clusters of n examples, over which standard errors and p-values are computed.

    groups: int64 [n], the cluster of each example, numbered from 0 without gaps. weight: float64 [n].
    """

    def __init__(self, groups: np.ndarray, weight: np.ndarray) -> None:
        self.groups = groups
        self.count = int(groups.max()) + 1 if len(groups) else 0
        self.share = np.bincount(groups, weight) / weight.sum()

    @cached_property
    def freedom(self) -> float | None:
        """The degrees of freedom of `stderr`; None for fewer than FEWEST clusters.

        With the shares h of the clusters, the sums of the influences are e = (I - h 1') u, where the working model says
        that u has the covariance diag(h^2). The variance is a quadratic form in u. Of the matrix C of that form, which
        is diagonal plus rank two, the degrees of freedom are (tr C)^2 / tr C^2.
        """
        if self.count < FEWEST:
            return None
        h = self.share
        x, y, s = h / (1 - h), h**2 / (1 - h), float(h @ h)
        xx, xy, yy = float(x @ x), float(x @ y), float(y @ y)
        trace = xx - 2 * xy + s * xx
        cross = float(np.sum(x**4)) - 4 * float(np.sum(x**3 * y)) + 2 * s * float(np.sum(x**4))
        of_square = cross + 2 * (xy**2 + xx * yy) + (s * xx) ** 2 - 4 * s * xx * xy
        return float(np.clip(trace**2 / of_square, 1.0, self.count - 1)) if of_square > 0 else 1.0

    def stderr(self, influence: np.ndarray) -> float | None:
        """Return the standard error of the mean of influences, float64 [n], which sum to zero; None for one cluster."""
        n = len(influence)
        if self.count < 2:
            return None
        if self.count == n:
            return float(np.sqrt(np.square(influence).sum() / (n - 1) / n))
        totals = np.bincount(self.groups, influence) / (1 - self.share)
        return float(np.sqrt(np.square(totals).sum() * (self.count - 1) / self.count) / n)

    def p_value(self, delta: float, stderr: float | None, changes: np.ndarray | None = None) -> float | None:
        """Return the two-sided p-value of a delta; None for fewer than FEWEST clusters.

        changes: float64 [n], what changed, if it may be a count.
        """
        if stderr is None or self.freedom is None:
            return None
        if math.isnan(delta) or math.isnan(stderr):
            return math.nan
        if changes is not None and are_counts(changes):
            exact = sign_flip_p(np.bincount(self.groups, changes))
            if exact is not None:
                return max(exact, SMALLEST)
        if changes_are_equal(delta, stderr):
            return max(2.0 ** (1 - self.count), SMALLEST)
        return t_test(delta, stderr, self.freedom)


def changes_are_equal(delta: float, stderr: float) -> bool:
    """Return whether everything changed by the same amount, which is not zero, so that a t-test can say nothing."""
    return delta != 0 and stderr <= EQUAL * abs(delta)


def t_test(delta: float, stderr: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t."""
    if delta == 0:
        return 1.0
    from scipy.special import stdtr  # what scipy.stats.t.sf calls, without its seconds of import

    return max(float(2 * stdtr(freedom, -abs(delta / stderr))), SMALLEST)
