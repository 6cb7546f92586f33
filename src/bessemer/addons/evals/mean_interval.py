"""95 % intervals of a mean over problems (the hook `interval`): bootstrap, widened for few problems, and Wilson's."""

from collections.abc import Sequence

import numpy as np

from bessemer.errors import UserError

FEW = 5
"""If fewer problems are above 0, or below 1, a bootstrap is too narrow."""


def mean_interval(rates: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of rates, one for each problem: 95 % bootstrap over the problems, `widened`.

    If fewer than FEW of them are above 0, or below 1, resampling sees too little spread (for 0 of 6 it gives the
    interval 0 to 0). The interval then also spans Wilson's for that mean over the problems, the widest that rates
    between 0 and 1 can have.
    """
    mean, low, high = bootstrap(rates, seed)
    low, high = (min(1.0, max(0.0, end)) for end in widened(mean, low, high, len(rates)))
    spread = min(sum(rate > 0 for rate in rates), sum(rate < 1 for rate in rates))
    if spread < FEW or low == high:
        lowest, highest = wilson(mean, len(rates))
        low, high = min(low, lowest), max(high, highest)
    return mean, low, high


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` independent trials, which is not empty at 0 and 1 (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): 95 % percentile bootstrap, seeded; blind to spread when all values are equal."""
    if not len(values):
        raise UserError("there is nothing to average; score at least one problem")
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[picks].mean(axis=1), [0.025, 0.975])
    return float(sample.mean()), float(low), float(high)


def widened(mean: float, low: float, high: float, n: int) -> tuple[float, float]:
    """The ends of a percentile bootstrap over `n` values, moved out to where Student's interval would end: resampling
    sees only (n - 1) / n of the variance, and takes what it sees for certain. Student's quantile as a multiple of the
    normal one is Fisher's expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5), within 0.1 % for n >= 8."""
    factor = widening(n)
    return mean - factor * (mean - low), mean + factor * (high - mean)


def widening(n: int) -> float:
    """By how much `widened` moves the ends out; 1 for a single value, whose spread is unknown."""
    if n < 2:
        return 1.0
    return (n / (n - 1)) ** 0.5 * (1 + 1.2104 / (n - 1) + 1.4401 / (n - 1) ** 2 + 1.304 / (n - 1) ** 3)
