"""pass@k and maj@k against enumeration of every subset."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.errors import UserError
from bessemer.tasks import Verdict, verdict_metrics
from bessemer.tasks.verdict_metrics import _wins, by_difficulty, maj_at_k, pass_at_k, rates, reasons


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
    share = maj_at_k(answers, [answer in right for answer in answers], k)
    assert share == pytest.approx(float(expected))
    order = data.draw(st.permutations(answers))
    assert share == maj_at_k(order, [answer in right for answer in order], k)


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


def test_the_rates_of_every_problem():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, True, "wrong-value", "b")
    verdicts = [[yes, yes, no, no], [no, no, no, no], [yes, no, no, no], [yes, yes, yes, yes]]
    assert rates(verdicts, 2) == {
        "pass_at_1": [0.5, 0, 0.25, 1],
        "pass_at_k": [pass_at_k(4, right, 2) for right in (2, 0, 1, 4)],
        "maj_at_k": [maj_at_k([v.answer for v in s], [v.correct for v in s], 2) for s in verdicts],
    }
    at_one = rates(verdicts, 1)
    assert at_one["pass_at_1"] == at_one["maj_at_k"], "maj@1 is pass@1"


def test_by_difficulty_is_a_mean_per_difficulty():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, False, "no-answer", None)
    verdicts = [[yes, no], [yes, yes], [no, no], [yes, no], [yes, yes]]
    means = by_difficulty(verdicts, [10, 2, 10, None, "hard"])
    assert means == {
        "2": {"n": 1, "pass_at_1": 1.0}, "10": {"n": 2, "pass_at_1": 0.25}, "hard": {"n": 1, "pass_at_1": 1.0}
    }  # fmt: skip
    assert list(means) == ["2", "10", "hard"]
    assert by_difficulty(verdicts, [None] * 5) == {}


def test_reasons_are_counted():
    yes, no = Verdict(True, True, "correct", "a"), Verdict(False, False, "no-answer", None)
    assert reasons([[yes, no, no]]) == {"no-answer": 2, "correct": 1}
