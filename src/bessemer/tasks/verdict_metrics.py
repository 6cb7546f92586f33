"""Scores over k samples per problem: pass@k, maj@k (the paper's cons@k), and a mean with its 95 % interval.

maj@k, exactly: take k of the n samples without replacement, give each answer one vote (None abstains), and let the
answer with the most votes win. Ties are broken at random, and the score is the expectation: when t answers tie, each
counts 1/t. So the score is deterministic and favours neither the first nor the right answer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np

from bessemer.errors import UserError
from bessemer.tasks.base import Verdict

FEW = 5
"""If fewer problems are above 0, or below 1, a bootstrap is too narrow."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, taken without replacement, contain one of the `correct` (Chen et al. 2021)."""
    _check_k(n, k)
    return 1.0 - comb(n - correct, k) / comb(n, k)


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Expected accuracy of the majority over all k-subsets of the samples; k=None takes all of them.

    An answer counts as right when any sample giving it was judged correct. No vote at all counts as wrong.
    """
    n = len(answers)
    k = n if k is None else k
    _check_k(n, k)
    votes = Counter(answer for answer in answers if answer is not None)
    right = {answer for answer, ok in zip(answers, correct, strict=True) if ok and answer is not None}
    abstain = n - votes.total()
    number = Counter(votes[answer] for answer in right)
    one = {votes[answer]: answer for answer in right}  # answers with equally many votes win equally often
    wins = sum(number[count] * _wins(votes, answer, abstain, k) for count, answer in one.items())
    return float(wins / comb(n, k))


def _wins(votes: Counter, answer: str, abstain: int, k: int) -> Fraction:
    """Number of k-subsets that `answer` wins, a t-way tie counting 1/t.

    For each number of votes r it can get: ways[used, tied] counts how the other answers can take `used` seats with at
    most r each, `tied` of them with exactly r; abstentions fill the rest.
    """
    total = Fraction(0)
    others = [count for other, count in votes.items() if other != answer]
    for r in range(1, min(votes[answer], k) + 1):
        ways = {(0, 0): comb(votes[answer], r)}
        for count in others:
            grown: dict[tuple[int, int], int] = {}
            for (used, tied), number in ways.items():
                for take in range(min(count, r, k - r - used) + 1):
                    key = (used + take, tied + (take == r))
                    grown[key] = grown.get(key, 0) + number * comb(count, take)
            ways = grown
        for (used, tied), number in ways.items():
            total += Fraction(number * comb(abstain, k - r - used), 1 + tied)
    return total


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


def score(verdicts: Sequence[Sequence[Verdict]], k: int | None = None, seed: int = 0) -> dict[str, float]:
    """One row of an evaluation from the verdicts of every problem: pass@1, pass@k and maj@k, each with the ends of its
    interval as `_low` and `_high`, and the share that is formatted.

    k=None takes the number of samples of the problem with the fewest.
    """
    k = min(map(len, verdicts), default=0) if k is None else k
    rights = [sum(v.correct for v in samples) for samples in verdicts]
    some = [pass_at_k(len(s), c, k) for c, s in zip(rights, verdicts, strict=True)]
    majority = [maj_at_k([v.answer for v in s], [v.correct for v in s], k) for s in verdicts]
    row: dict[str, float] = {}
    for name, values in ((f"pass@{k}", some), (f"maj@{k}", majority), ("pass@1", pass_at_1(verdicts))):
        row[name], row[f"{name}_low"], row[f"{name}_high"] = mean_interval(values, seed)
    return row | {"formatted": float(np.mean([v.formatted for s in verdicts for v in s]))}


def pass_at_1(verdicts: Sequence[Sequence[Verdict]]) -> list[float]:
    """The share of correct samples of every problem."""
    return [sum(v.correct for v in samples) / len(samples) for samples in verdicts]


def by_difficulty(verdicts: Sequence[Sequence[Verdict]], difficulties: Sequence[int | str | None]) -> dict[str, Any]:
    """{difficulty: {"n": problems, "pass_at_1": mean}}, easiest first; a problem without a difficulty (None) is left
    out. Keys are strings, as in JSON."""
    values: dict[int | str, list[float]] = {}
    for difficulty, value in zip(difficulties, pass_at_1(verdicts), strict=True):
        if difficulty is not None:
            values.setdefault(difficulty, []).append(value)
    ordered = sorted(values, key=lambda difficulty: (isinstance(difficulty, str), difficulty))
    return {str(d): {"n": len(values[d]), "pass_at_1": float(np.mean(values[d]))} for d in ordered}


def reasons(verdicts: Iterable[Sequence[Verdict]]) -> dict[str, int]:
    """Histogram of reason codes, most common first."""
    return dict(Counter(v.reason for samples in verdicts for v in samples).most_common())


def _check_k(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise UserError(f"k is {k} but there are {n} samples per problem; choose k between 1 and {n}")
