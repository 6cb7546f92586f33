"""Scores over k samples per problem: pass@k and maj@k (the paper's cons@k).

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
    answer_by_votes = {votes[answer]: answer for answer in right}  # answers with equally many votes win equally often
    wins = sum(number[count] * _wins(votes, answer, abstain, k) for count, answer in answer_by_votes.items())
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


def rates(verdicts: Sequence[Sequence[Verdict]], k: int) -> dict[str, list[float]]:
    """pass_at_1, pass_at_k and maj_at_k of every problem, from its verdicts."""
    pairs = [(sum(v.correct for v in samples), samples) for samples in verdicts]
    return {
        "pass_at_1": pass_at_1(verdicts),
        "pass_at_k": [pass_at_k(len(samples), right, k) for right, samples in pairs],
        "maj_at_k": [maj_at_k([v.answer for v in s], [v.correct for v in s], k) for _, s in pairs],
    }


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
