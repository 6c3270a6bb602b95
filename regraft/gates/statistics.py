"""Intervals for paired comparisons: two models, the same rows.

Two averages on the same rows are not independent, so their own intervals say little about their difference: what counts
is on how many rows one model is right and the other wrong. Rows are taken as independent of each other; where many rows
share one phrasing they are not quite, and the intervals are then somewhat too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
_RESAMPLES = 5_000
_BLOCK = 2_000_000  # numbers drawn at once: 16 MB


@dataclass(frozen=True)
class Estimate:
    """A measured value with its two-sided interval."""

    value: float
    low: float
    high: float
    rows: int


def proportion(successes: int, rows: int, confidence: float) -> Estimate:
    """Return a share with Wilson's score interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212)."""
    if not 0 <= successes <= rows or rows < 1:
        raise ValueError(f"{successes} of {rows} rows is no share")
    z, share = _quantile(confidence), successes / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == rows else min(1.0, centre + half)
    return Estimate(share, low, high, rows)


def paired_difference(gained: int, lost: int, rows: int, confidence: float) -> Estimate:
    """Return the difference of two shares on the same rows with Tango's score interval.

    It keeps its coverage where few rows or none differ, where the textbook interval has no width. T. Tango, Equivalence
    test and confidence interval for the difference in proportions for the paired-sample design, Statistics in Medicine
    17, 1998, 891-908.

    Args:
        gained: rows on which only the first model is right.
        lost: rows on which only the second is right.
        rows: all rows, those on which both agree included.
        confidence: two-sided, above 0 and under 1.
    """
    if min(gained, lost) < 0 or gained + lost > rows or rows < 1:
        raise ValueError(f"{gained} gained and {lost} lost of {rows} rows is no comparison")
    z, value = _quantile(confidence), (gained - lost) / rows

    def statistic(difference: float) -> float:
        """Tango's T; falls as `difference` rises, and is 0 at the measured difference."""
        b = -gained - lost + (2 * rows - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        share = (sqrt(max(0.0, b * b - 8 * rows * c)) - b) / (4 * rows)  # of lost rows, were `difference` true
        variance = rows * (2 * share + difference * (1 - difference))
        distance = gained - lost - rows * difference
        if variance <= 1e-12 * rows:
            return 0.0 if abs(distance) <= 1e-9 * rows else float("inf") if distance > 0 else float("-inf")
        return distance / sqrt(variance)

    def bound(outside: float, target: float) -> float:
        """Find by bisection where the statistic is `target`, between the measured difference and `outside`."""
        inside = value
        for _ in range(60):
            middle = (inside + outside) / 2
            if abs(statistic(middle)) <= abs(target):
                inside = middle
            else:
                outside = middle
        return inside

    return Estimate(value, bound(-1.0, z), bound(1.0, -z), rows)


def mean_interval(values: Sequence[float], confidence: float, *, seed: int = 0) -> Estimate:
    """Return the mean with a bootstrap interval, bias-corrected and accelerated (BCa).

    For differences of losses, which are skewed. B. Efron, Better bootstrap confidence intervals, J. Am. Stat. Assoc.
    82, 1987, 171-185. The same values, seed and numpy give the same interval.

    Args:
        values: one for each row, finite, at least two.
        confidence: two-sided, above 0 and under 1.
        seed: of the resampling.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2 or not np.isfinite(sample).all():
        raise ValueError(f"expected at least two finite values, found {len(sample)}")
    mean, centred = float(sample.mean()), sample - sample.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        return Estimate(mean, mean, mean, len(sample))
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // len(sample))
    means = np.concatenate(
        [
            sample[random.integers(0, len(sample), (min(block, _RESAMPLES - start), len(sample)))].mean(axis=1)
            for start in range(0, _RESAMPLES, block)
        ]
    )
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / _RESAMPLES), 1 - 1 / _RESAMPLES))
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    levels = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = bias + _NORMAL.inv_cdf(tail)
        levels.append(_NORMAL.cdf(bias + shifted / (1 - acceleration * shifted)))
    low, high = (float(bound) for bound in np.quantile(means, levels))
    return Estimate(mean, low, high, len(sample))


def _quantile(confidence: float) -> float:
    if not isfinite(confidence) or not 0 < confidence < 1:
        raise ValueError(f"a confidence between 0 and 1, found {confidence}")
    return _NORMAL.inv_cdf((1 + confidence) / 2)
