"""The user's own tasks and rewards, named in a recipe by file: `my_task.py:MyTask`, `my_rewards.py:brevity`.

The path is relative to the recipe's folder. The code is the user's own, named in the user's own recipe: it runs in this
process with the user's rights, outside the sandbox, and the first load prints a warning. A stage records its SHA-256
(pipeline/inputs.py) and runs again when the file has changed. The modules that it imports are not hashed.

Such code may draw from the global generators of random, numpy and torch: every call of it begins with a seed that
follows from its arguments (`repeatable`), so a resumed run draws what the uninterrupted one drew.
"""

import ast
import difflib
import hashlib
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, wraps
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from bessemer.config.places import located, looked_in
from bessemer.errors import UserError
from bessemer.tasks.base import Problem, Task, Verdict
from bessemer.tasks.environment import Environment, Episode, ModelTurn, Observation, shortened
from bessemer.tasks.repeatable import repeatable

RewardFunction = Callable[[Problem, str, Verdict], float]
"""(problem, the whole answer from `<think>` on, the task's verdict) -> a finite number in place of the accuracy."""


def task(name: str, **settings: Any) -> Task:
    """The task `FILE.py:CLASS`. It carries that name, by which a run finds it again."""
    found = _load(name)
    if not isinstance(found, type) or not issubclass(found, Task):
        raise UserError(f"{name} is not a task; derive the class from bessemer.tasks.Task")
    if found.make is Task.make and found.problem is Task.problem:
        raise UserError(f"{name} does not define make; docs/tasks.md has a complete task")
    domain = getattr(found, "domain", "")
    if not isinstance(domain, str) or not domain.isprintable() or domain.strip() in ("", "lm-eval"):
        raise UserError(f"{name} has the domain {domain!r}; set the attribute `domain` to a word for the reports")
    own: dict[str, Any] = {"name": name, "__module__": found.__module__}
    own |= {
        method: _repeated(written) for method in OWN if (written := getattr(found, method)) is not getattr(Task, method)
    }
    if issubclass(found, Environment) and found.reset is not Environment.reset:
        own["reset"] = _repeated_episode(found.reset)
    return type(found.__name__, (found,), own)(**settings)


OWN = ("make", "problem", "grade", "verify", "written", "document")
"""Methods of a task that a user may write."""


def _repeated(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, with the same random numbers for the same arguments."""

    @wraps(method)
    def call(self: Task, *args: object, **named: object) -> object:
        parts = [one.id if isinstance(one, Problem) else one for one in (*args, *named.values())]
        with repeatable(self.name, method.__name__, *parts):
            return method(self, *args, **named)

    return call


def _repeated_episode(reset: Callable[..., Episode]) -> Callable[..., Episode]:
    """`reset` of an environment whose episodes draw the same random numbers after the same turns. Episodes that step at
    the same time share the generators, so theirs are left alone."""

    @wraps(reset)
    def call(self: Environment, problem: Problem, seed: int) -> Episode:
        if self.parallel > 1:
            return reset(self, problem, seed)
        with repeatable(self.name, "reset", problem.id, seed):
            return _RepeatedEpisode(reset(self, problem, seed), (self.name, problem.id, seed))

    return call


class _RepeatedEpisode:
    def __init__(self, episode: Episode, parts: tuple[object, ...]) -> None:
        self.episode, self.parts, self.start, self.close = episode, parts, episode.start, episode.close

    def step(self, turn: ModelTurn) -> Observation:
        self.parts = (*self.parts, turn.text)
        with repeatable(*self.parts):
            return self.episode.step(turn)

    def verdict(self, text: str) -> Verdict:
        with repeatable(*self.parts, "verdict"):
            return self.episode.verdict(text)


def reward_function(name: str) -> RewardFunction:
    """The function `FILE.py:FUNCTION` of a recipe's `reward`."""
    found = _load(name)
    form = f"def {name.rpartition(':')[2]}(problem, answer, verdict): ..."
    if not callable(found) or isinstance(found, type):
        raise UserError(f"{name} is not a function; write {form}")
    try:
        with suppress(ValueError):  # a function of C has no signature
            inspect.signature(found).bind(None, "", None)
    except TypeError as error:
        raise UserError(f"{name} cannot be called with three arguments ({error}); write {form}") from None

    def checked(problem: Problem, answer: str, verdict: Verdict) -> float:
        try:
            value = found(problem, answer, verdict)
        except SystemExit as error:
            raise UserError(f"{name} called sys.exit({error}); return a number") from error
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{name} returned {shortened(repr(value), 100)}; return a number") from None

    return checked


def _load(name: str) -> Any:
    file, _, attribute = name.rpartition(":")
    path = located(file)
    if not path.is_file():
        raise UserError(f"there is no file {file}{looked_in(file)}; write FILE.py:NAME, from the recipe's folder")
    module = _module(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest())
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        near = difflib.get_close_matches(attribute, own, n=1, cutoff=0.0)
        raise UserError(f"{file} defines no {attribute}" + (f"; did you mean {near[0]}?" if near else ""))
    return getattr(module, attribute)


@lru_cache(maxsize=64)  # a stage asks for its tasks many times
def _module(path: Path, digest: str) -> ModuleType:
    warnings.warn(f"{path.name} is your own code: it runs with your rights, outside the sandbox", stacklevel=2)
    _check_imports(path)
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest[:12]}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # where a script finds what lies beside it
    try:
        with repeatable("load", digest):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        where = f"{path}, line {line}" if line else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}; correct the file") from error
    finally:
        with suppress(ValueError):  # the file may have changed the list
            sys.path.remove(str(path.parent))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what its functions import when they are called
    return module


_beside: dict[str, Path] = {}
"""Modules that files of the user import from beside them, now or when a function is called."""


def _check_imports(path: Path) -> None:
    """UserError if a file imports, anywhere, a module beside it that has the name of another: it might get that one."""
    files = [path]
    for file in files:
        try:
            tops = {name.partition(".")[0] for name in _imported(ast.parse(file.read_bytes()))}
        except (SyntaxError, ValueError, OSError):  # loading it says what is wrong
            continue
        for top in sorted(tops):
            places = path.parent / top / "__init__.py", path.parent / f"{top}.py"
            beside = next((place for place in places if place.is_file()), None)
            if beside is None or beside in files:
                continue
            files.append(beside)
            loaded = getattr(sys.modules[top], "__file__", None) or "Python's own" if top in sys.modules else beside
            other = _beside.get(top, loaded)
            if beside.resolve() != Path(other).resolve():
                raise UserError(f"{file} imports {top}, of which there are two, {beside} and {other}; rename the first")
            _beside[top] = beside


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
