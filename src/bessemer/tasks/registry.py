"""Tasks by name: ours, those of other packages, and the user's own."""

from importlib import import_module
from typing import Any

from bessemer import plugins
from bessemer.config.places import located
from bessemer.tasks import user_code
from bessemer.tasks.base import Task, file_and_split, known

REGISTRY = {
    "arithmetic": ("bessemer.tasks.arithmetic", "Arithmetic"),
    "code": ("bessemer.tasks.code", "Code"),
    "countdown": ("bessemer.tasks.countdown", "Countdown"),
    "general": ("bessemer.tasks.general", "General"),
    "logic": ("bessemer.tasks.logic", "Logic"),
    "products": ("bessemer.tasks.products", "Products"),
    "sums": ("bessemer.tasks.sums", "DigitSums"),
    "words": ("bessemer.tasks.word_problems", "WordProblems"),
}
FAMILIES = {
    "choice:PATH": ("bessemer.tasks.exact", "MultipleChoice"),
    "general:PATH": ("bessemer.tasks.general", "GeneralFile"),
    "code:PATH": ("bessemer.tasks.code_files", "CodeFile"),
    "gsm8k:PATH": ("bessemer.tasks.maths", "Gsm8k"),
    "gym:NAME": ("bessemer.tasks.gym", "Gym"),
    "jsonl:PATH": ("bessemer.tasks.maths", "Maths"),
    "puzzle:PATH": ("bessemer.tasks.exact", "Puzzle"),
    "env:URL": ("bessemer.tasks.env_server", "ServerEnvironment"),
    "verifiers:NAME": ("bessemer.tasks.env_verifiers", "VerifiersEnvironment"),
    "tools:NAMES:TASK": ("bessemer.tasks.tools", "TaskWithTools"),
}
"""Tasks whose name carries an argument after the colon; their class takes it first."""


def names() -> list[str]:
    """Every name `get` knows, and the patterns of those with an argument."""
    return sorted([*REGISTRY, *FAMILIES, *plugins.names("tasks")])


def get(name: str, **settings: Any) -> Task:
    """The task called `name`, which may be code of the user's own (plugins.py); settings are `languages`, `phrasing`
    and those of its `Options` and `Mix`. UserError for an unknown name or setting."""
    task = _make(name, settings)
    task.settings = settings
    return task


def _make(name: str, settings: dict[str, Any]) -> Task:
    family, colon, argument = name.partition(":")
    for pattern, (module, attribute) in FAMILIES.items():
        if colon and pattern.startswith(f"{family}:"):
            return getattr(import_module(module), attribute)(argument, **settings)
    if plugins.OWN_FILE.fullmatch(name) or "." in family or name in plugins.names("tasks"):
        return user_code.task(name, **settings)
    module, attribute = REGISTRY[known(name, names(), "there is no task")]
    return getattr(import_module(module), attribute)(**settings)


def file_of(name: str) -> str | None:
    """The file or directory that a task is made from, as its name gives it; None for a task without one."""
    name = without_tools(name)
    if plugins.OWN_FILE.fullmatch(name):
        return name.rpartition(":")[0]
    family, _, argument = name.partition(":")
    if f"{family}:PATH" not in FAMILIES:
        return None
    return file_and_split(argument.replace("@shuffle", ""))[0] or None  # `general` has a form without a file


def without_tools(name: str) -> str:
    """The task inside `tools:NAMES:TASK`; any other name is itself."""
    family, _, rest = name.partition(":")
    return without_tools(rest.partition(":")[2]) if family == "tools" else name


def shared_file(first: str, second: str) -> str | None:
    """The file that two tasks, by their names, both take problems from; None if there is none, or if each problem of
    the file is in only one split."""
    (one, whole), (other, its_whole) = (
        file_and_split(without_tools(name).partition(":")[2].replace("@shuffle", "")) for name in (first, second)
    )
    if not one or not other or (whole is None and its_whole is None) or not located(one).exists():
        return None
    return one if located(one).resolve() == located(other).resolve() else None
