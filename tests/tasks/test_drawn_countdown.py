"""Countdown with more and larger numbers."""

import pytest

import bessemer.addons.tasks.drawn_countdown  # noqa: F401  the deletion test leaves this file out
from bessemer.errors import UserError
from bessemer.tasks import get
from bessemer.tasks.base import split_of


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
    with pytest.raises(UserError, match="no pre-training documents"):
        task.document(0)
    for wrong in ({"largest": 1}, {"highest_target": "60"}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; set a whole number"):
            get("countdown:4", **wrong)
    for name in ("countdown:9", "countdown:3.0", "countdown:"):
        with pytest.raises(UserError, match="countdown:"):
            get(name)
