"""Intervals for a handful of seeds and for shares of problems.

The seed is the unit: `values` are differences within each seed. With one seed the interval is unbounded.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bessemer.addons.evals.mean_interval import FEW, widened, widening, wilson


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    middle: float
    low: float
    high: float


def over_seeds(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's interval, which is infinite with one seed."""
    middle = statistics.fmean(values)
    reach = smallest_visible(values, confidence)
    return Interval(middle, middle - reach, middle + reach)


def smallest_visible(values: Sequence[float], confidence: float = 0.95) -> float:
    """t s sqrt(1/n): the smallest effect that this run could have distinguished from zero."""
    n = len(values)
    if n < 2:
        return math.inf
    from scipy.special import stdtrit  # Student's quantile; a report without seeds does not wait for scipy

    return float(stdtrit(n - 1, (1 + confidence) / 2)) * statistics.stdev(values) / math.sqrt(n)


def wider(*intervals: Interval) -> Interval:
    """The widest of the intervals, such as those over seeds and over the problems within them."""
    return max(intervals, key=lambda interval: interval.high - interval.low)


def shares_apart(one: float, other: float, problems: int) -> Interval:
    """Difference of two shares of `problems` independent problems, with Newcombe's 95 % interval (1998, method 10)."""
    (low, high), (other_low, other_high) = wilson(one, problems), wilson(other, problems)
    gap = one - other
    return Interval(
        gap, gap - math.hypot(one - low, other_high - other), gap + math.hypot(high - one, other - other_low)
    )


Rates = Mapping[int | str, float]
"""The number or name of a problem -> a measure of its answers."""


def stratified(
    rows: Sequence[tuple[str, Rates]], lowest: float = 0.0, seed: int = 0, resamples: int = 2000
) -> Interval:
    """The mean of the means of rows (pool, rates), with the 95 % bootstrap within each pool, each row's draws moved out
    as `widened` does for its number of problems. One draw of a pool's problems serves all of its rows: in another
    language or at another temperature they are the same problems. The draws of a row of fewer than FEW problems, among
    others, follow Wilson's interval at every confidence: so few say little about their spread, and one nothing. Rates
    lie between `lowest` and 1.
    """
    rng = np.random.default_rng(seed)
    sizes = [len(rates) for _, rates in rows]
    several = len({pool for pool, _ in rows}) > 1 or len(set(sizes)) > 1
    smallest = min((size for size in sizes if size >= FEW or not several), default=1)
    means = []
    for pool in dict.fromkeys(pool for pool, _ in rows):
        pool_rates = [rates for name, rates in rows if name == pool]
        problems = sorted(set().union(*pool_rates))
        drawn = rng.integers(len(problems), size=(resamples, len(problems)))
        z = rng.standard_normal(resamples) if several and min(map(len, pool_rates)) < FEW else np.zeros(0)
        for rates in pool_rates:
            mean, scale = statistics.fmean(rates.values()), 1 / widening(smallest)
            if several and len(rates) < FEW:
                draws = lowest + (1 - lowest) * _wilson_at((mean - lowest) / (1 - lowest), len(rates), z)
            else:
                values = np.array([rates.get(problem, np.nan) for problem in problems])
                draws, scale = _means(values[drawn]), widening(len(rates)) / widening(smallest)
            means.append(scale * draws + (1 - scale) * mean)
    middle = statistics.fmean(statistics.fmean(rates.values()) for _, rates in rows)
    low, high = np.nanquantile(np.mean(means, axis=0), [0.025, 0.975]).tolist()
    low, high = widened(middle, low, high, smallest)
    return Interval(middle, min(low, middle), max(high, middle))


def _means(drawn: np.ndarray) -> np.ndarray:
    """NaN for a draw without a problem of the row, which `nanquantile` leaves out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(drawn, axis=1)


def _wilson_at(share: float, n: int, z: np.ndarray) -> np.ndarray:
    """The end of Wilson's interval that lies z standard errors from a share of n trials, to the side of z's sign."""
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (share + z * z / (2 * n) + half) / (1 + z * z / n)


def problems_of(rows: Sequence[tuple[str, Rates]]) -> int:
    """The number of different problems in rows (pool, rates)."""
    return len({(pool, problem) for pool, rates in rows for problem in rates})
