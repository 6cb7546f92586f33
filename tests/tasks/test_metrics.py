"""pass@k and maj@k against enumeration of every subset, and the bootstrap interval against the normal one."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.errors import UserError
from bessemer.tasks import Verdict
from bessemer.tasks.metrics import maj_at_k, mean_interval, pass_at_k, reasons, score


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_subsets(n):
    for correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations([i < correct for i in range(n)], k))
            assert pass_at_k(n, correct, k) == pytest.approx(fmean(map(any, subsets)))


def majority(answers, right):
    votes = Counter(answer for answer in answers if answer is not None)
    best = [answer for answer, count in votes.items() if count == max(votes.values())]
    return Fraction(sum(answer in right for answer in best), len(best)) if best else Fraction(0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_subsets(answers, data):
    right = data.draw(st.sets(st.sampled_from("abcd")))
    k = data.draw(st.integers(1, len(answers)))
    subsets = list(combinations(answers, k))
    expected = sum(majority(subset, right) for subset in subsets) / len(subsets)
    got = maj_at_k(answers, [answer in right for answer in answers], k)
    assert got == pytest.approx(float(expected))
    order = data.draw(st.permutations(answers))
    assert got == maj_at_k(order, [answer in right for answer in order], k)


def test_maj_at_one_is_pass_at_one_and_ties_are_fair():
    assert maj_at_k(["a", "b", "c", "a"], [True, False, False, True], 1) == 0.5
    assert maj_at_k(["a", "b"], [True, False]) == 0.5
    assert maj_at_k(["a", "b", None, None], [True, False, False, False]) == 0.5
    assert maj_at_k([None, None], [False, False]) == 0.0
    assert maj_at_k(["a", "a"], [False, True]) == 1.0  # the same answer, once without its thinking


def test_k_out_of_range():
    for k in (0, 4):
        with pytest.raises(UserError):
            pass_at_k(3, 1, k)
    with pytest.raises(UserError):
        maj_at_k([], [])
    with pytest.raises(UserError):
        mean_interval([])


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(0).random(300).tolist()
    mean, low, high = mean_interval(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert (mean, low, high) == mean_interval(values)
    assert mean_interval(values, seed=1) != (mean, low, high)


def test_score_of_two_problems():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, False, "no-answer", None)
    row = score([[yes, yes, no, no], [no, no, no, no]])
    assert row["pass@1"] == 0.25 and row["pass@4"] == 0.5 and row["maj@4"] == 0.5 and row["formatted"] == 0.25
    assert row["pass@1_low"] <= 0.25 <= row["pass@1_high"]
    assert reasons([[yes, no, no]]) == {"no-answer": 2, "correct": 1}
