"""The effect of each ablation with its paired 95 % interval, as figures and the page of a report show it.

The effect on a perplexity is its ratio to that of the unablated model, and on any other metric the difference. The
interval of a perplexity's ratio is that of the difference of the logarithms, whose standard error follows from the
p-value, because the p-value of a perplexity is that of this difference (evaluation/statistics.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.measurements.ablation.summary import MeasuredMetric

if TYPE_CHECKING:
    import numpy as np
    import pandas

INTERVAL = 0.95
FEWEST = 3  # clusters that an interval needs (evaluation/clustering.py)
SMALLEST = 1e-300  # a smaller p-value may be one that no float holds (evaluation/clustering.py)
LEVEL = 0.05  # of q, below which an effect has a star
# All that an effect is computed from.
COLUMNS = ("value", "baseline", "delta", "delta_stderr", "delta_freedom", "delta_low", "delta_high", "p_value", "n",
           "n_clusters", "precision", "ci_low", "ci_high")  # fmt: skip


@dataclass(frozen=True)
class Effects:
    """The effects of the cells of one metric.

    rows: the columns effect, low and high, with the index of the cells. ratio: whether effects are ratios of
    perplexities, which are 1 if nothing changes; else they are differences, which are then 0.
    """

    rows: pandas.DataFrame
    ratio: bool

    @property
    def reference(self) -> float:
        """The effect of an ablation that changes nothing."""
        return 1.0 if self.ratio else 0.0


def is_ratio(one: MeasuredMetric) -> bool:
    """Return whether the effects on a metric are ratios: it is a perplexity, and all values are positive."""
    cells = one.cells
    positive = all((cells[name].dropna() > 0).all() for name in ("baseline", "value"))
    known = bool(cells["baseline"].notna().any())
    return one.metric.endswith("perplexity") and not one.higher_is_better and positive and known


def effects(one: MeasuredMetric) -> Effects:
    """Return the effects of all cells of a metric, NaN for those without baseline.

    With adaptive precision the interval is that of the rows, over all examples. In exact mode fewer than FEWEST
    clusters have no interval.
    """
    import numpy as np
    import pandas

    cells, ratio = one.cells, is_ratio(one)
    value, baseline, delta, stderr, p, low, high = (
        cells[name].to_numpy(float)
        for name in ("value", "baseline", "delta", "delta_stderr", "p_value", "ci_low", "ci_high")
    )
    clusters = cells["n_clusters"].fillna(cells["n"]).to_numpy(float)
    degrees = np.where(clusters < FEWEST, np.nan, _of(cells, "delta_freedom", clusters - 1))
    adaptive = (cells["precision"] == "adaptive").to_numpy()
    with np.errstate(all="ignore"):
        if not ratio:
            half = _quantile(degrees) * stderr
            found = delta, _of(cells, "delta_low", delta - half), _of(cells, "delta_high", delta + half)
            exact = low, high
        else:
            log = np.log(value / baseline)
            half = _quantile(degrees) * _stderr_of_log(log, p, degrees, stderr / value)
            found = np.exp(log), np.exp(log - half), np.exp(log + half)
            exact = (baseline + low) / baseline, (baseline + high) / baseline
    columns = {"effect": found[0], "low": np.where(adaptive, exact[0], found[1]),
               "high": np.where(adaptive, exact[1], found[2])}
    return Effects(pandas.DataFrame(columns, index=cells.index), ratio)


def _of(cells: pandas.DataFrame, name: str, otherwise: np.ndarray) -> np.ndarray:
    """Return a column, with other numbers where it is null or missing."""
    import numpy as np

    if name not in cells:
        return otherwise
    found = cells[name].to_numpy(float)
    return np.where(np.isnan(found), otherwise, found)


def _quantile(degrees: np.ndarray) -> np.ndarray:
    """Return the quantile of Student's t that bounds the interval; NaN without a degree of freedom."""
    import numpy as np
    from scipy.special import stdtrit

    return stdtrit(np.where(degrees >= 1, degrees, np.nan), (1 + INTERVAL) / 2)


def _stderr_of_log(log: np.ndarray, p: np.ndarray, degrees: np.ndarray, rough: np.ndarray) -> np.ndarray:
    """Return the standard error of the log ratio of which p is the two-sided p-value.

    rough: that of the delta method, which is taken where p is too small for a float.
    """
    import numpy as np
    from scipy.special import stdtrit

    statistic = -stdtrit(np.where(degrees >= 1, degrees, np.nan), p / 2)
    return np.where(log == 0, 0.0, np.where((p > SMALLEST) & (statistic > 0), np.abs(log) / statistic, rough))
