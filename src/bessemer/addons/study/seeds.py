"""Tests over a handful of seeds, the correction for many of them, and how many seeds a question needs.

The seed is the unit: `values` are differences within each seed. Differences of seeds are taken as normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from bessemer.addons.evals.intervals import over_seeds


def alike(values: Sequence[float]) -> bool:
    """Whether several values are the same, but for rounding: no spread, so no interval and no p value."""
    return len(values) > 1 and max(values) - min(values) <= 1e-12 * max(1.0, *map(abs, values))


def p_value(values: Sequence[float], threshold: float = 0.0) -> float:
    """Two-sided p value for a mean that differs from the threshold; 1 with one seed."""
    if len(values) < 2:
        return 1.0
    if statistics.stdev(values) == 0:  # scipy divides by it
        return float(statistics.fmean(values) == threshold)
    return float(stats.ttest_1samp(values, threshold).pvalue)


def p_equivalent(values: Sequence[float], centre: float, margin: float) -> float:
    """The p value of two one-sided tests that the mean lies within `margin` of `centre` (Schuirmann 1987)."""
    return max(
        float(stats.ttest_1samp(values, end, alternative=side).pvalue)
        for end, side in ((centre - margin, "greater"), (centre + margin, "less"))
    )


def equivalent(values: Sequence[float], centre: float, margin: float, confidence: float = 0.95) -> bool:
    """Whether two one-sided tests show that the mean lies within `margin` of `centre` (Schuirmann 1987)."""
    one_sided = over_seeds(values, 2 * confidence - 1)
    return centre - margin < one_sided.low and one_sided.high < centre + margin


def corrected(p_values: Sequence[float]) -> list[float]:
    """p values after Benjamini and Hochberg's procedure (1995), in the order given: a p value at or below q marks a
    discovery if no more than the share q of all discoveries may be false, in expectation."""
    return [float(q) for q in stats.false_discovery_control(p_values, method="bh")] if p_values else []


MOST = 10_000


def seeds_for(values: Sequence[float], margin: float, confidence: float = 0.95) -> int | None:
    """How many seeds with the spread of these values have an interval that reaches no farther than `margin`, by
    t s / sqrt n. None without spread, without a margin, or above MOST."""
    if len(values) < 2 or margin <= 0 or alike(values):
        return None
    spread = statistics.stdev(values)
    low, high = 2, MOST
    while low < high:
        n = (low + high) // 2
        if float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread / math.sqrt(n) <= margin:
            high = n
        else:
            low = n + 1
    return low if low < MOST else None


def chance_beyond(n: int, effect: float, spread: float, confidence: float = 0.95) -> float:
    """The power of a one-sided rule: how likely the t interval of n seeds lies beyond a bound, if the true mean lies
    `effect` beyond it and seeds have the standard deviation `spread`. By the noncentral t distribution."""
    if n < 2:
        return 0.0
    if spread <= 0:
        return float(effect > 0)
    cut = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return float(stats.nct.sf(cut, n - 1, effect * math.sqrt(n) / spread))


def chance_within(n: int, offset: float, margin: float, spread: float, confidence: float = 0.95) -> float:
    """The power of an equivalence rule: how likely the t interval of n seeds lies within `margin` of a centre, if the
    true mean lies `offset` from it. The mean's probability, averaged over the sample's standard deviation."""
    if n < 2:
        return 0.0
    if spread <= 0:
        return float(abs(offset) < margin)
    error = spread / math.sqrt(n)
    shares = (np.arange(2_000) + 0.5) / 2_000  # quantiles of the sample's standard deviation, equally likely
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error * np.sqrt(stats.chi2.ppf(shares, n - 1) / (n - 1))
    room = np.maximum(margin - reach, 0.0)
    inside = stats.norm.cdf((room - offset) / error) - stats.norm.cdf((-room - offset) / error)
    return float(np.mean(np.where(room > 0, inside, 0.0)))


def fewest(chance: Callable[[int], float], power: float, least: int = 2, most: int = 1_000) -> int | None:
    """The fewest seeds, at least `least`, with which `chance(n)` reaches `power`; None above `most`. The chance must
    rise with n."""
    if chance(most) < power:
        return None
    low, high = least, most
    while low < high:
        n = (low + high) // 2
        low, high = (low, n) if chance(n) >= power else (n + 1, high)
    return low
