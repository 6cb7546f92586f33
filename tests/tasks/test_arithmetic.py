"""Arithmetic problems: the value agrees with Python, operands separate the splits, only an integer is an answer."""

import re

import pytest

from bessemer.tasks import get

TASK = get("arithmetic")


def operands(problem):
    return tuple(sorted(n for term in problem.meta["terms"] for n in term))


def test_values_agree_with_python():
    for i in range(3000):
        problem = TASK.problem("train", i)
        chain = re.search(r"[\d+*-]+", problem.prompt)[0]
        assert eval(chain) == problem.meta["value"]
        assert 0 <= problem.meta["value"] <= 120
        assert len(operands(problem)) >= 3 and 2 <= len(problem.meta["terms"]) <= 4


def test_splits_are_disjoint():
    train = {operands(TASK.problem("train", i)) for i in range(15_000)}
    test = {operands(TASK.problem("test", i)) for i in range(5_000)}
    documents = {operands(TASK.written(i).problem) for i in range(10_000)}
    assert not test & train and not test & documents


@pytest.mark.parametrize(
    ("answer", "reason", "canonical"),
    [
        ("{value}", "correct", "{value}"),
        (" {value}\n", "correct", "{value}"),
        ("{value}.0", "unparsable", None),
        ("{value}+0", "unparsable", None),
        ("1000", "wrong-value", "1000"),
        ("-{value}", "wrong-value", "-{value}"),
        ("", "empty", None),
        ("٣", "unparsable", None),
        ("9" * 10**6, "unparsable", None),
    ],
)
def test_grades(answer, reason, canonical):
    problem = TASK.problem("test", 1)
    value = problem.meta["value"]
    verdict = TASK.verify(problem, f"<think>t</think><answer>{answer.replace('{value}', str(value))}</answer>")
    assert verdict.reason == reason
    assert verdict.answer == (canonical and canonical.replace("{value}", str(value)))
