"""Countdown with more and larger numbers."""

import re
from itertools import pairwise

import pytest

import bessemer.addons.tasks.drawn_countdown  # noqa: F401  the deletion test leaves this file out
from bessemer.errors import UserError
from bessemer.tasks import get
from bessemer.tasks.base import split_of
from bessemer.tasks.countdown_expressions import parse_expression

TRY = re.compile(
    r"(back |回到)?(?P<expression>[-+*()0-9]+)(?P<steps>(=[0-9]+[-+*][0-9]+)*)"
    r"=(?P<value>[0-9]+):(?P<target>[0-9]+)(?P<verdict>.*)"
)


def test_more_and_larger_numbers_can_be_asked_for():
    task = get("countdown:5", largest=50, highest_target=500)
    problems = [task.problem(split, n) for split in ("train", "test") for n in range(200)]
    for problem in problems:
        numbers, target = problem.meta["numbers"], problem.meta["target"]
        assert len(numbers) == problem.meta["difficulty"] == 5 and 1 <= min(numbers) <= max(numbers) <= 50
        assert 1 <= target <= 500 and str(target) in problem.prompt
        assert split_of(numbers) == problem.id.split("/")[1]
    assert len({(tuple(sorted(p.meta["numbers"])), p.meta["target"]) for p in problems}) >= 0.99 * len(problems)
    assert task.size("train") is None and max(p.meta["target"] for p in problems) > 60
    of_two = get("countdown:2")
    for n in range(20):
        problem = of_two.problem("test", n)
        x, y = sorted(problem.meta["numbers"], reverse=True)
        assert {"correct"} < {of_two.grade(problem, f"{x}{op}{y}")[0] for op in "+-*"} <= {"correct", "wrong-value"}
    for wrong in ({"largest": 1}, {"highest_target": "60"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; set a whole number"):
            get("countdown:4", **wrong)
    for name in ("countdown:9", "countdown:3.0", "countdown:"):
        with pytest.raises(UserError, match="countdown:"):
            get(name)


def tries(response):
    thoughts = response.partition("<think>")[2].partition("</think>")[0]
    return [TRY.fullmatch(line) for line in thoughts.split("\n") if line]


def test_pages_hold_exact_tries_of_the_train_split_and_give_up_soon():
    task = get("countdown:5", highest_target=30, slip=0.0, truncated=0.0)
    pages = [task.written(n) for n in range(2000)]
    counts = []
    for page in pages:
        numbers, target = sorted(page.problem.meta["numbers"]), page.problem.meta["target"]
        assert split_of(numbers) == "train" and task.document(0) == task.document(0)
        counts.append(len(lines := tries(page.response)))
        for line in lines:
            expression = parse_expression(line["expression"])
            assert sorted(expression.numbers) == numbers and expression.value == int(line["value"])
            assert int(line["target"]) == target and (line["verdict"] in (" yes", "对")) == (expression.value == target)
            running = [parse_expression(step) for step in line["steps"].split("=") if step]
            assert all(0 <= step.value <= 120 for step in running) and running[-1].value == expression.value
        verdict = task.verify(page.problem, page.response)
        assert verdict.correct == bool(lines and int(lines[-1]["value"]) == target) or page.author == "direct"
    thinking = [count for count in counts if count]
    assert 1.7 < sum(thinking) / len(thinking) < 2.2 and sum(count > 8 for count in counts) < 0.01 * len(counts)
    assert 0.09 < counts.count(0) / len(counts) < 0.15


def test_back_changes_the_nearest_earlier_try():
    task = get("countdown:4", give_up=0.0, back=0.5, adjust=0.5, slip=0.0, truncated=0.0)
    returned = 0
    for n in range(300):
        lines = tries(task.written(n).response)
        for at, line in enumerate(lines):
            if line[1]:
                earlier = [(abs(int(e["value"]) - int(e["target"])), k) for k, e in enumerate(lines[:at])]
                nearest = lines[min(earlier, key=lambda pair: (pair[0], -pair[1]))[1]]
                returned += 1
                assert nearest is not lines[at - 1] and differences(nearest["expression"], line["expression"]) <= 2
    assert returned > 300


def test_an_author_who_knows_the_solution_tries_nothing_else():
    task = get("countdown:5", knows=1.0, direct=0.0, slip=0.0, truncated=0.0)
    pages = [task.written(n) for n in range(200)]
    right = [page for page in pages if task.verify(page.problem, page.response).correct]
    assert len(right) > 190 and all(len(tries(page.response)) == 1 for page in right)


def test_a_directed_change_of_an_operator_moves_towards_the_target():
    task = get("countdown:4", give_up=0.0, adjust=1.0, back=0.0, directed=1.0, knows=0.0, slip=0.0, truncated=0.0)
    rank, changes = "-+*", 0
    for n in range(200):
        lines = tries(task.written(n).response)
        for line, after in pairwise(lines):
            first, second = (re.findall(r"[-+*]", each["expression"]) for each in (line, after))
            if sorted(first) == sorted(second):  # two numbers were exchanged
                continue
            if (differs := [(a, b) for a, b in zip(first, second, strict=True) if a != b]) and len(differs) == 1:
                (old, new), low = differs[0], int(line["value"]) < int(line["target"])
                changes += (rank.index(new) > rank.index(old)) == low
                assert (rank.index(new) > rank.index(old)) == low or differences(line[2], after[2]) > 1
    assert changes > 200


def differences(first, second):
    """How many numbers and operators of two chains differ, place by place."""
    pair = [re.findall(r"[0-9]+|[-+*]", text) for text in (first, second)]
    return sum(a != b for a, b in zip(*pair, strict=True))


def test_a_share_outside_its_range_is_refused():
    for wrong, key in (
        ({"give_up": 2.0}, "give_up"),
        ({"back": 0.7, "adjust": 0.6}, "back"),
        ({"max_tries": 0}, "max_tries"),
        ({"knows": -0.1}, "knows"),
    ):
        with pytest.raises(UserError, match=key):
            get("countdown:5", **wrong)
