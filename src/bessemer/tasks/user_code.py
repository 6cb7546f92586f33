"""The user's own tasks and rewards, named in a recipe: `my_task.py:MyTask`, `my_rewards.py:brevity` (plugins.py).

Such code may draw from the global generators of random, numpy and torch: every call of it begins with a seed that
follows from its arguments (`repeatable`), so a resumed run draws what the uninterrupted one drew.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from bessemer import plugins
from bessemer.errors import UserError
from bessemer.escape import shortened
from bessemer.repeatable import repeatable
from bessemer.tasks.base import Problem, Task, Verdict

RewardFunction = Callable[[Problem, str, Verdict], float]
"""(problem, the whole answer from `<think>` on, the task's verdict) -> a finite number in place of the accuracy."""


def task(name: str, **settings: Any) -> Task:
    """The task whose class `plugins.find` finds. It carries that name, by which a run finds it again."""
    found = plugins.find("tasks", name, derives=Task)
    if found.make is Task.make and found.problem is Task.problem:
        raise UserError(f"{name} does not define make; docs/tasks.md has a complete task")
    domain = getattr(found, "domain", "")
    if not isinstance(domain, str) or not domain.isprintable() or domain.strip() in ("", "lm-eval"):
        raise UserError(f"{name} has the domain {domain!r}; set the attribute `domain` to a word for the reports")
    own: dict[str, Any] = {"name": name, "__module__": found.__module__}
    own |= {
        method: _repeated(written) for method in OWN if (written := getattr(found, method)) is not getattr(Task, method)
    }
    own |= found.repeated()
    return type(found.__name__, (found,), own)(**settings)


OWN = ("make", "problem", "grade", "verify", "written", "document")
"""Methods of a task that a user may write."""


def _repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with the same random numbers for the same arguments."""

    @wraps(method)
    def call(self: Task, *args: object, **named: object) -> object:
        parts = [one.id if isinstance(one, Problem) else one for one in (*args, *named.values())]
        with plugins.blamed(self.name, type(self)), repeatable(self.name, method.__name__, *parts):
            return method(self, *args, **named)

    return call


def reward_function(name: str) -> RewardFunction:
    """The function `FILE.py:FUNCTION` of a recipe's `reward`."""
    found = plugins.find("rewards", name, takes="problem, answer, verdict")

    def checked(problem: Problem, answer: str, verdict: Verdict) -> float:
        value = found(problem, answer, verdict)
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name} returned {shortened(repr(value), 100)}; return a number") from None

    return checked
