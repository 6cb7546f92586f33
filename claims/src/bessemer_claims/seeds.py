"""Tests over a handful of seeds, and Holm's correction for several of them, which scipy lacks.

The seed is the unit: `values` are differences within each seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from scipy import stats

from bessemer.addons.evals.intervals import over_seeds


def p_value(values: Sequence[float], threshold: float = 0.0) -> float:
    """Two-sided p value for a mean that differs from the threshold; 1 with one seed."""
    if len(values) < 2:
        return 1.0
    if statistics.stdev(values) == 0:  # scipy divides by it
        return float(statistics.fmean(values) == threshold)
    return float(stats.ttest_1samp(values, threshold).pvalue)


def equivalent(values: Sequence[float], centre: float, margin: float, confidence: float = 0.95) -> bool:
    """Whether two one-sided tests show that the mean lies within `margin` of `centre` (Schuirmann 1987)."""
    one_sided = over_seeds(values, 2 * confidence - 1)
    return centre - margin < one_sided.low and one_sided.high < centre + margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p values of several tests, in the order given (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
