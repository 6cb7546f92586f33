"""The user's own tasks, named in a recipe: `my_task.py:MyTask` (plugins.py).

Such code may draw from the global generators of random, numpy and torch: every call of it begins with a seed that
follows from its arguments (`repeatable`), so a resumed run draws what the uninterrupted one drew.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from bessemer import plugins
from bessemer.errors import UserError
from bessemer.repeatable import repeatable
from bessemer.tasks.base import Problem, Task


def task(name: str, **settings: Any) -> Task:
    """The task whose class `plugins.find` finds. It carries that name, by which a run finds it again."""
    cls = plugins.find("tasks", name, derives=Task)
    if cls.make is Task.make and cls.problem is Task.problem:
        raise UserError(f"{name} does not define make; docs/tasks.md has a complete task")
    domain = getattr(cls, "domain", "")
    if not isinstance(domain, str) or not domain.isprintable() or domain.strip() in ("", "lm-eval"):
        raise UserError(f"{name} has the domain {domain!r}; set the attribute `domain` to a word for the reports")
    own: dict[str, Any] = {"name": name, "__module__": cls.__module__}
    own |= {
        method: _repeated(written) for method in OWN if (written := getattr(cls, method)) is not getattr(Task, method)
    }
    own |= cls.repeated()
    return type(cls.__name__, (cls,), own)(**settings)


OWN = ("make", "problem", "grade", "verify", "written", "document")
"""Methods of a task that a user may write."""


def _repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with the same random numbers for the same arguments."""

    @wraps(method)
    def call(self: Task, *args: object, **named: object) -> object:
        parts = [part.id if isinstance(part, Problem) else part for part in (*args, *named.values())]
        with plugins.blamed(self.name, type(self)), repeatable(self.name, method.__name__, *parts):
            return method(self, *args, **named)

    return call
