"""Countdown problems and verdicts against an independent brute force, and the separation of train and test."""

import itertools
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tasks import Problem, get
from bessemer.tasks.countdown_expressions import all_tries, ordered_tries

TASK = get("countdown")
triples = st.tuples(*[st.integers(1, 15)] * 3)


def brute_force(numbers):
    """(expression, value) for every order, pair of operators and parenthesisation; shares no code with the task."""

    def step(left, op, right):
        if op == "/":
            return None if right == 0 else left / right
        return left + right if op == "+" else left - right if op == "-" else left * right

    for a, b, c in itertools.permutations(numbers):
        x, y, z = map(Fraction, (a, b, c))
        for p, q in itertools.product("+-*/", repeat=2):
            left = step(x, p, y)
            if left is not None and step(left, q, z) is not None:
                yield f"({a}{p}{b}){q}{c}", step(left, q, z)
            right = step(y, q, z)
            if right is not None and step(x, p, right) is not None:
                yield f"{a}{p}({b}{q}{c})", step(x, p, right)


@settings(max_examples=60, deadline=None)
@given(triples, st.integers(1, 100))
def test_verdicts_agree_with_brute_force(numbers, target):
    problem = Problem("p", "", "en", {"numbers": list(numbers), "target": target})
    for expression, value in brute_force(numbers):
        verdict = TASK.verify(problem, f"<think>t</think><answer>{expression}</answer>")
        assert verdict.correct == (value == target)
        assert verdict.reason == ("correct" if value == target else "wrong-value")
        assert verdict.formatted and verdict.answer


@settings(max_examples=100, deadline=None)
@given(triples)
def test_tries_are_true_and_the_ordered_walk_misses_nothing(numbers):
    reachable = {value for _, value in brute_force(numbers)}
    walk = ordered_tries(numbers)
    for attempt in all_tries(numbers) + walk:
        steps, claimed, expression = attempt.write()
        verdict = TASK.verify(
            Problem("p", "", "en", {"numbers": list(numbers), "target": claimed}),
            f"<think>{steps}</think><answer>{expression}</answer>",
        )
        assert verdict.correct and claimed in reachable and 0 <= claimed <= 120
    # a difference of zero can be written both ways, but no target is zero
    assert {t.canonical for t in walk if t.value} == {t.canonical for t in all_tries(numbers) if t.value}
    assert len({t.canonical for t in walk}) == len(walk) <= 17


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("<think>t</think><answer>(3*7)+6</answer>", "correct"),
        ("<think>t</think><answer>3+7+6</answer>", "wrong-value"),
        ("<think>t</think><answer>3*7</answer>", "wrong-numbers"),
        ("<think>t</think><answer>27!</answer>", "unparsable"),
        ("<think>t</think><answer></answer>", "empty"),
        ("<think>t</think>", "no-answer"),
        ("<answer>(3*7)+6</answer>", "no-think"),
        ("<answer>(3*7)+6</answer><answer>(3*7)+6</answer>", "bad-tags"),
    ],
)
def test_every_reason(completion, reason):
    verdict = TASK.verify(Problem("p", "", "en", {"numbers": [3, 7, 6], "target": 27}), completion)
    assert verdict.reason == reason
    assert verdict.correct == (reason in ("correct", "no-think"))
    assert verdict.sound == (reason == "correct")
    assert (verdict.answer is None) == (reason in ("unparsable", "empty", "no-answer", "bad-tags"))


def test_problems_are_solvable_different_and_as_announced():
    for split, least in (("train", 1500), ("test", 200)):
        problems = [TASK.problem(split, i, language="en") for i in range(TASK.size(split))]
        keys = {(*sorted(p.meta["numbers"]), p.meta["target"]) for p in problems}
        assert len(keys) == TASK.size(split) > least
        for problem in problems[:400]:
            *numbers, target = [*sorted(problem.meta["numbers"]), problem.meta["target"]]
            assert 1 <= target <= 60 and all(1 <= n <= 10 for n in numbers)
            assert target in {value for _, value in brute_force(numbers)}
            assert sorted(map(int, re.findall(r"\d+", problem.prompt))) == sorted([*numbers, target])


def test_no_test_multiset_in_training_problems_or_documents():
    test = {tuple(sorted(TASK.problem("test", i).meta["numbers"])) for i in range(20_000)}
    train = {tuple(sorted(TASK.problem("train", i, seed).meta["numbers"])) for seed in (0, 1) for i in range(10_000)}
    assert test and train and not test & train
    assert 0.06 < len(test) / len(test | train) < 0.14
    pages = [TASK.written(i) for i in range(10_000)]
    for page in pages:
        numbers = [*page.problem.meta["numbers"], page.problem.meta["target"]]
        assert sorted(map(int, re.findall(r"\d+", page.text.partition("\n")[0]))) == sorted(numbers)
    assert not test & {tuple(sorted(page.problem.meta["numbers"])) for page in pages}
    other = get("arithmetic")
    # nor may the other task's pages leak them
    sums = {tuple(sorted(map(int, re.findall(r"\d+", other.written(i).problem.prompt)))) for i in range(10_000)}
    assert not test & sums
