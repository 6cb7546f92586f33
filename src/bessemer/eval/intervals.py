"""Intervals and tests for a handful of seeds: Student's t in closed form, Holm's correction, shares of problems.

The seed is the unit: `values` are differences within each seed. With one seed the interval is unbounded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from bessemer.tasks.verdict_metrics import widened, wilson


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    middle: float
    low: float
    high: float


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    if freedom % 2:
        term = total = math.cos(angle) if freedom > 1 else 0.0
        for k in range(2, freedom - 1, 2):
            term *= square * k / (k + 1)
            total += term
        return 0.5 + (angle + sine * total) / math.pi
    term = total = 1.0
    for k in range(1, freedom - 2, 2):
        term *= square * k / (k + 1)
        total += term
    return 0.5 + sine * total / 2


@cache
def t_quantile(share: float, freedom: int) -> float:
    """The value that T exceeds with probability 1 - share."""
    if not (0 < share < 1 and freedom >= 1):
        raise ValueError(f"no quantile {share} with {freedom} degrees of freedom")
    if share < 0.5:
        return -t_quantile(1 - share, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < share else (low, middle)
    return (low + high) / 2


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
    return t_quantile((1 + confidence) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)


def wider(*intervals: Interval) -> Interval:
    """The widest of the intervals, such as those over seeds and over the problems within them."""
    return max(intervals, key=lambda one: one.high - one.low)


def p_value(values: Sequence[float], threshold: float = 0.0) -> float:
    """Two-sided p value for a mean that differs from the threshold; 1 with one seed."""
    n = len(values)
    if n < 2:
        return 1.0
    spread, gap = statistics.stdev(values), statistics.fmean(values) - threshold
    if spread == 0:
        return 1.0 if gap == 0 else 0.0
    return 2 * (1 - t_cdf(abs(gap) * math.sqrt(n) / spread, n - 1))


def equivalent(values: Sequence[float], centre: float, margin: float, confidence: float = 0.95) -> bool:
    """Whether two one-sided tests show that the mean lies within `margin` of `centre` (Schuirmann 1987)."""
    one_sided = over_seeds(values, 2 * confidence - 1)
    return centre - margin < one_sided.low and one_sided.high < centre + margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p values of several tests, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = highest
    return corrected


def shares_apart(one: float, other: float, problems: int) -> Interval:
    """Difference of two shares of `problems` independent problems, with Newcombe's 95 % interval (1998, method 10)."""
    (low, high), (other_low, other_high) = wilson(one, problems), wilson(other, problems)
    gap = one - other
    return Interval(
        gap, gap - math.hypot(one - low, other_high - other), gap + math.hypot(high - one, other - other_low)
    )


Rates = Mapping[int, float]
"""The number of a problem in its task -> a measure of its answers."""


def stratified(rows: Sequence[tuple[str, Rates]], seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean of the means of rows (task, rates), with the 95 % bootstrap within each task, `widened`. One draw of a
    task's problems serves all of its rows: in another language or at another temperature they are the same problems.
    """
    rng = np.random.default_rng(seed)
    means, sizes = [], []
    for task in dict.fromkeys(task for task, _ in rows):
        mine = [rates for name, rates in rows if name == task]
        problems = sorted(set().union(*mine))
        sizes.append(len(problems))
        drawn = rng.integers(len(problems), size=(resamples, len(problems)))
        for rates in mine:
            values = np.array([rates.get(problem, np.nan) for problem in problems])
            means.append(np.nanmean(values[drawn], axis=1))
    middle = statistics.fmean(statistics.fmean(rates.values()) for _, rates in rows)
    low, high = np.nanquantile(np.mean(means, axis=0), [0.025, 0.975]).tolist()
    return Interval(middle, *widened(middle, low, high, min(sizes)))


def problems_of(rows: Sequence[tuple[str, Rates]]) -> int:
    """The number of different problems in rows (task, rates)."""
    return len({(task, problem) for task, rates in rows for problem in rates})
