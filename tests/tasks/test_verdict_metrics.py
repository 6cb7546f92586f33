"""pass@k and maj@k against enumeration of every subset, and the bootstrap interval against the normal one."""

from collections import Counter
from fractions import Fraction
from itertools import combinations, product
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bessemer.errors import UserError
from bessemer.tasks import Verdict, verdict_metrics
from bessemer.tasks.verdict_metrics import (
    _wins,
    bootstrap,
    by_difficulty,
    maj_at_k,
    mean_interval,
    pass_at_k,
    reasons,
    score,
    widened,
    wilson,
)


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


def test_answers_with_equally_many_votes_are_counted_once(monkeypatch):
    """128 programs that are all right and all differ took five seconds."""
    counted = []
    monkeypatch.setattr(verdict_metrics, "_wins", lambda *args: counted.append(args) or _wins(*args))
    answers = [f"program {n}" for n in range(120)] + ["twice"] * 2 + ["other"] * 2
    assert maj_at_k(answers, [True] * 124, 62) == pytest.approx(1.0) and len(counted) == 2


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


def test_none_and_all_right_have_an_interval():
    """0 of 6 does not mean that nothing will ever be right, and one more right sample must not narrow the interval."""
    none, all_ = mean_interval([0.0] * 6), mean_interval([1.0] * 6)
    assert none[:2] == (0.0, 0.0) and none[2] == pytest.approx(0.390, abs=1e-3), "Wilson's, as tables print it"
    assert (all_[0], all_[2]) == (1.0, 1.0) and all_[1] == pytest.approx(1 - none[2])
    assert mean_interval([0.125] + [0.0] * 5)[2] > none[2]
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("n", [6, 20, 60])
def test_the_interval_holds_the_truth_as_often_as_it_says(share, n):
    """For problems that are right or wrong. The bootstrap alone covers a share of 0.02 in 20 problems a third of the
    time."""
    draw = np.random.default_rng(5)
    held = [low <= share <= high for _ in range(200) for _, low, high in [mean_interval(draw.random(n) < share)]]
    assert np.mean(held) > 0.88


@pytest.mark.parametrize("n", [6, 8, 12])
def test_the_interval_of_rates_over_few_problems_is_wide_enough(n):
    """The bootstrap alone covers 87 to 92 %."""
    rates = np.random.default_rng(1).beta(0.6, 0.9, size=(600, n))
    found = [mean_interval(values) for values in rates]
    assert np.mean([low <= 0.4 <= high for _, low, high in found]) > 0.925
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in found)


@pytest.mark.parametrize("n", [3, 8, 30, 300])
def test_widened_reaches_as_far_as_student_s_interval(n):
    """For values whose resampled means are normal."""
    low, high = widened(1.0, 1.0 - 1.96 * (n - 1) ** 0.5, 1.0 + 1.96 * (n - 1) ** 0.5, n)
    assert (high - 1, 1 - low) == pytest.approx([n**0.5 * stats.t.ppf(0.975, n - 1)] * 2, rel=0.04 if n == 3 else 0.001)
    assert widened(1.0, 1.0, 1.0, 1) == (1.0, 1.0)


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(0).random(300).tolist()
    mean, low, high = mean_interval(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert (mean, low, high) == mean_interval(values)
    assert mean_interval(values, seed=1) != (mean, low, high)


def test_interval_against_every_resample():
    """Four values have 256 resamples: the ends are the exact 2.5 % and 97.5 % points of their means."""
    values = [0.0, 0.25, 0.5, 1.0]
    means = [fmean(picks) for picks in product(values, repeat=4)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    for seed in range(5):
        mean, low, high = bootstrap(values, seed, resamples=20_000)
        assert mean == 0.4375 and (low, high) == pytest.approx(tuple(expected), abs=1 / 16)
        assert min(means) <= low < mean < high <= max(means)


def test_every_rate_has_its_interval():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, True, "wrong-value", "b")
    verdicts = [[yes, yes, no, no], [no, no, no, no], [yes, no, no, no], [yes, yes, yes, yes]] * 5
    row = score(verdicts, 2, seed=3)
    some = [pass_at_k(4, right, 2) for right in (2, 0, 1, 4)] * 5
    majority = [maj_at_k([v.answer for v in s], [v.correct for v in s], 2) for s in verdicts]
    for name, values in (("pass@1", [0.5, 0, 0.25, 1] * 5), ("pass@2", some), ("maj@2", majority)):
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == mean_interval(values, 3)
    one = score(verdicts, 1)
    assert one["pass@1"] == one["maj@1"] == 0.4375, "maj@1 is pass@1"


def test_by_difficulty_is_a_mean_per_difficulty():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, False, "no-answer", None)
    verdicts = [[yes, no], [yes, yes], [no, no], [yes, no], [yes, yes]]
    found = by_difficulty(verdicts, [10, 2, 10, None, "hard"])
    assert found == {
        "2": {"n": 1, "pass_at_1": 1.0}, "10": {"n": 2, "pass_at_1": 0.25}, "hard": {"n": 1, "pass_at_1": 1.0}
    }  # fmt: skip
    assert list(found) == ["2", "10", "hard"]
    assert by_difficulty(verdicts, [None] * 5) == {}


def test_score_of_two_problems():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, False, "no-answer", None)
    row = score([[yes, yes, no, no], [no, no, no, no]])
    assert row["pass@1"] == 0.25 and row["pass@4"] == 0.5 and row["maj@4"] == 0.5 and row["formatted"] == 0.25
    assert row["pass@1_low"] <= 0.25 <= row["pass@1_high"]
    assert reasons([[yes, no, no]]) == {"no-answer": 2, "correct": 1}
