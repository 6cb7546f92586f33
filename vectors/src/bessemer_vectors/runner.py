"""Runs an adapter over the cases: `check(adapter)`.

An adapter is a module or any other object with a function per topic it offers (`topics`). A case ends in one of four
ways: it agrees; it differs, perhaps by the value of a rival; it is not offered; or it failed, because the function
raised or returned what cannot be compared.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from bessemer_vectors.compare import Unusable, difference
from bessemer_vectors.reader import Case, Topic, load
from bessemer_vectors.reference.pipelines import judge

AGREES, DIFFERS, FAILED, NOT_OFFERED = "agrees", "differs", "failed", "not offered"
OUTCOMES = (AGREES, DIFFERS, FAILED, NOT_OFFERED)


class AdapterError(Exception):
    """An adapter that cannot be loaded; one line."""


@dataclass(frozen=True)
class Result:
    """The outcome of one case."""

    case: str
    outcome: str
    text: str = ""
    """Where it differs, or why it failed or is not offered."""
    relative: float | None = None
    """Largest relative difference over the outputs that were returned; None if there is no number."""
    compared: tuple[str, ...] = ()
    rivals: tuple[tuple[str, str, str], ...] = ()
    """(name, formula, source) of the rivals whose values it has."""


@dataclass(frozen=True)
class TopicReport:
    """The outcomes of a topic."""

    topic: Topic
    results: tuple[Result, ...]

    def count(self, outcome: str) -> int:
        return sum(result.outcome == outcome for result in self.results)

    def largest(self) -> float | None:
        """Largest relative difference of the cases that agree or differ by a number."""
        return max((result.relative for result in self.results if result.relative is not None), default=None)


@dataclass(frozen=True)
class Report:
    """The outcomes of an adapter."""

    name: str
    topics: tuple[TopicReport, ...] = field(default_factory=tuple)

    def count(self, outcome: str) -> int:
        return sum(report.count(outcome) for report in self.topics)


def load_adapter(path: Path) -> ModuleType:
    """The module of a file, whose folder joins the search path. AdapterError, one line, if it cannot be loaded."""
    if not path.is_file():
        raise AdapterError(f"{path}: no such file; give the path of an adapter")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(f"bessemer_vectors_adapter_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise AdapterError(f"{path}: an adapter is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise AdapterError(f"{path} cannot be loaded: {said(error)}") from None
    return module


def check(adapter: Any, only: Iterable[str] = (), topics: dict[str, Topic] | None = None) -> Report:
    """Every case of the topics (`only` those named; all by default). `adapter` is a module, an object or the path of a
    file; its NAME, if it has one, heads the report. ValueError if a topic does not exist."""
    if isinstance(adapter, (str, Path)):
        adapter = load_adapter(Path(adapter))
    known = load() if topics is None else topics
    wanted = list(only) or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no topic {unknown[0]}; the topics are {', '.join(known)}")
    reports = [
        TopicReport(known[name], tuple(run(adapter, known[name], case) for case in known[name].cases))
        for name in wanted
    ]
    return Report(str(getattr(adapter, "NAME", getattr(adapter, "__name__", "adapter"))), tuple(reports))


def run(adapter: Any, topic: Topic, case: Case) -> Result:
    function = getattr(adapter, topic.name, None)
    if function is None:
        return Result(case.name, NOT_OFFERED)
    try:
        got = function(**copy.deepcopy(case.inputs))
    except NotImplementedError as reason:
        return Result(case.name, NOT_OFFERED, " ".join(str(reason).split()))
    except (Exception, SystemExit) as error:
        return Result(case.name, FAILED, said(error))
    try:
        outputs = named_outputs(got, topic, case)
        return judged(outputs, topic, case)
    except Unusable as error:
        return Result(case.name, FAILED, str(error))
    except Exception as error:  # an object whose conversion raises
        return Result(case.name, FAILED, f"its result cannot be read: {said(error)}")


def said(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def named_outputs(got: Any, topic: Topic, case: Case) -> dict[str, Any]:
    """The outputs by name, those that are compared. Unusable if there are none, or others."""
    if got is None:
        raise Unusable("it returned None; return a dict of outputs")
    if not (isinstance(got, dict) and set(got) & set(topic.outputs)):
        if len(topic.outputs) > 1:
            raise Unusable(f"it did not return a dict with some of {', '.join(topic.outputs)}")
        got = {topic.outputs[0]: got}
    if others := [name for name in got if name not in topic.outputs]:
        raise Unusable(f"{others[0]!r} is no output of the topic; its outputs are {', '.join(topic.outputs)}")
    if "actions" in got:
        try:
            given = judge(got["actions"], **case.inputs)
        except ValueError as error:
            raise Unusable(str(error)) from None
        got = {name: value for name, value in got.items() if name != "actions"} | given
    return {name: value for name, value in got.items() if name in case.expected}


def judged(outputs: dict[str, Any], topic: Topic, case: Case) -> Result:
    if not outputs:
        raise Unusable(f"none of {', '.join(case.expected)} was returned")
    worst, text, wrong = 0.0, "", False
    for name, value in outputs.items():
        try:
            gap = difference(value, case.expected[name])
        except Unusable as error:
            raise Unusable(f"{name}: {error}") from None
        if not gap.agrees(topic.tolerance):
            wrong = True
            text = text or f"{name} {gap.text}".replace(" [", "[")
        worst = max(worst, gap.relative)
    relative = worst if worst != float("inf") else None
    if not wrong:
        return Result(case.name, AGREES, relative=relative, compared=tuple(outputs))
    rivals = tuple(
        (rival.name, rival.formula, rival.source) for rival in case.rivals if has(outputs, case, rival.expected, topic)
    )
    return Result(case.name, DIFFERS, text, relative, tuple(outputs), rivals)


def has(outputs: dict[str, Any], case: Case, expected: dict[str, Any], topic: Topic) -> bool:
    """Whether the outputs are those of a rival."""
    values = case.expected | expected
    try:
        return all(difference(value, values[name]).agrees(topic.tolerance) for name, value in outputs.items())
    except Unusable:
        return False
