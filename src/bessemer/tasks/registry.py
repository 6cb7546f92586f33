"""Finds tasks by name: ours, those of the entry-point group `bessemer.tasks`, and the user's own.

An entry point names a class. If tasks of that class carry an argument in their name, as in `jsonl:data.jsonl`, the
entry point is called `jsonl.PATH`, and the class takes the argument first.
"""

from importlib import util
from typing import Any

from bessemer import plugins
from bessemer.config.places import located
from bessemer.tasks import arithmetic, countdown, user_code  # the first two are built in
from bessemer.tasks.base import Task, known

__all__ = ["arithmetic", "countdown"]


def names() -> list[str]:
    """Every name `get` knows, and the patterns of those with an argument."""
    return [name.replace(".", ":") for name in plugins.names("tasks")]


def get(name: str, **settings: Any) -> Task:
    """The task called `name`, or the user's own `FILE.py:CLASS`; settings are `languages`, `phrasing` and those of its
    `Options` and `Mix`. UserError for an unknown name or setting."""
    member, argument = _split(name)
    if member is None and not _is_own(name):
        known(name, names(), "there is no task")
    kind = None if member is None else plugins.find("tasks", member)
    if kind is None or (not argument and not kind.__module__.startswith("bessemer.")):
        task = user_code.task(name, **settings)
    else:
        task = kind(*argument, **settings)
    task.settings = settings
    return task


def source_of(name: str) -> tuple[str, str | None] | None:
    """The file or directory that a task is made from, as its name gives it, and the split that its problems all belong
    to, if one does; None for a task without a file, and for an unknown one."""
    member, argument = _split(name)
    if member is None:
        return (name.rpartition(":")[0], None) if plugins.OWN_FILE.fullmatch(name) else None
    return plugins.find("tasks", member).source(*argument) if argument else None


def shared_file(first: str, second: str) -> str | None:
    """The file that two tasks, by their names, both take problems from; None if there is none, or if each problem of
    the file is in only one split."""
    source, other = source_of(first), source_of(second)
    if source is None or other is None or (source[1] is None and other[1] is None) or not located(source[0]).exists():
        return None
    return source[0] if located(source[0]).resolve() == located(other[0]).resolve() else None


def _is_own(name: str) -> bool:
    """Whether a name may be of the user's own code. A module in no package that is not here is a family misspelt."""
    module = name.partition(":")[0]
    named = plugins.OWN_MODULE.fullmatch(name) and ("." in module or util.find_spec(module) is not None)
    return bool(plugins.OWN_FILE.fullmatch(name) or named)


def _split(name: str) -> tuple[str | None, list[str]]:
    """The registered name, and the argument if there is one; None for what is not registered."""
    family, colon, argument = name.partition(":")
    for member in plugins.names("tasks"):
        if member == name:
            return member, []
        if colon and member.startswith(f"{family}."):
            return member, [argument]
    return None, []
