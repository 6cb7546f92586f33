"""Tools for models, and `tools:NAMES:TASK`, any task with some of them: `tools:calculator:arithmetic`,
`tools:calculator+python:gsm8k:PATH`.

`calculator` is exact: integers, decimals and fractions through + - * / ^ and parentheses, by our own parser.
`python` runs a program in the code sandbox, as the task `code` does, and is refused where that task is.
`no-calculator` has the calculator's name and answers every call with an error: a control.

Nothing that a model writes can stall a tool or fill its memory: numbers, digits, exponents and the length of the text
are bounded, and the sandbox has a clock of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.environment import Environment, LocalTool
from bessemer.errors import UserError
from bessemer.escape import shortened
from bessemer.tasks import registry
from bessemer.tasks.base import Problem, Verdict, Written

MOST_CHARS = 500
MOST_DIGITS = 400
"""Maximum digits of numerator and denominator at every step, and of a number in the text."""
_BOUND = 10**MOST_DIGITS
DEEPEST = 40
PYTHON_SECONDS = 5.0
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?)|(\*\*|[-+*/^()]))", re.ASCII)


def calculate(expression: str) -> str:
    """The exact value: an integer, or a fraction in lowest terms. ValueError, in words for a model, if none."""
    if len(expression) > MOST_CHARS:
        raise ValueError(f"the expression is longer than {MOST_CHARS} characters")
    try:
        return str(_Reader(expression).value())
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def without_tools(name: str) -> str:
    """The task inside `tools:NAMES:TASK`; any other name is itself."""
    family, _, rest = name.partition(":")
    return without_tools(rest.partition(":")[2]) if family == "tools" else name


class _Reader:
    """Recursive descent: sum = product {(+|-) product}, product = sign {(*|/) sign}, sign = {+|-} power,
    power = atom [^ sign]."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        self.at = self.depth = 0
        start = 0
        while start < len(text.rstrip()):
            token = _TOKEN.match(text, start)
            if token is None:
                rest = text[start:].strip()
                raise ValueError(f"{rest[:1]!r} is no digit, operator or parenthesis")
            self.tokens.append(token[1] or token[2].replace("**", "^"))
            start = token.end()

    def value(self) -> Fraction:
        value = self._sum()
        if self.at < len(self.tokens):
            raise ValueError(f"{self.tokens[self.at]!r} follows where the expression has ended")
        return value

    def _sum(self) -> Fraction:
        value = self._product()
        while (sign := self._take("+-")) is not None:
            other = self._product()
            value = _small(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while (sign := self._take("*/")) is not None:
            other = self._signed()
            value = _small(value * other if sign == "*" else value / other)
        return value

    def _signed(self) -> Fraction:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        sign = self._take("+-")
        value = self._power() if sign is None else self._signed()
        self.depth -= 1
        return -value if sign == "-" else value

    def _power(self) -> Fraction:
        value = self._atom()
        if self._take("^") is None:
            return value
        exponent = self._signed()
        if exponent.denominator != 1:
            raise ValueError("an exponent must be an integer")
        power = int(exponent)
        bits = max(value.numerator.bit_length(), value.denominator.bit_length())
        if abs(value) == 1:
            power %= 2
        elif value and abs(power) * (bits - 1) >= _BOUND.bit_length():  # 2^(bits - 1) to that power is too much
            raise ValueError(f"the result has more than {MOST_DIGITS} digits")
        return _small(value**power)

    def _atom(self) -> Fraction:
        if self.at >= len(self.tokens):
            raise ValueError("it ends where a number is due")
        token = self.tokens[self.at]
        self.at += 1
        if token[0].isdigit():
            return _small(Fraction(token))
        if token != "(":
            raise ValueError(f"{token!r} stands where a number is due")
        value = self._sum()
        if self._take(")") is None:
            raise ValueError("a parenthesis is not closed")
        return value

    def _take(self, signs: str) -> str | None:
        if self.at < len(self.tokens) and self.tokens[self.at] in signs:
            self.at += 1
            return self.tokens[self.at - 1]
        return None


def _small(value: Fraction) -> Fraction:
    if abs(value.numerator) >= _BOUND or value.denominator >= _BOUND:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    return value


def run_python(code: str) -> str:
    """What a program prints, and how it ended if it failed. UserError if nothing isolates it."""
    if len(code) > sandbox.SOURCE_LIMIT:
        raise ValueError(f"the program is longer than {sandbox.SOURCE_LIMIT} characters")
    result = sandbox.run(code, seconds=PYTHON_SECONDS)
    if result.status == sandbox.OK:
        return result.stdout.rstrip("\n") or "(the program printed nothing)"
    last = result.stderr.strip().rpartition("\n")[2]
    why = {sandbox.TIMEOUT: f"it ran longer than {PYTHON_SECONDS:g} s", sandbox.MEMORY: "it ran out of memory",
           sandbox.OUTPUT: "it printed too much"}.get(result.status, last or "it ended with an error")  # fmt: skip
    return f"error: {shortened(why, 500)}" + (f"\n{result.stdout[:1000]}" if result.stdout else "")


def _unavailable(**arguments: Any) -> str:
    raise ValueError("the calculator is not available")


def _one_text(name: str, about: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string", "description": about}}, "required": [name]}


CALCULATOR = LocalTool(
    "calculator", "Computes an arithmetic expression exactly.", _one_text("expression", "such as 12*(3+4)/5"), calculate
)
PYTHON = LocalTool(
    "python", "Runs a Python 3 program and returns what it prints.", _one_text("code", "the program"), run_python
)
TOOLS = {"calculator": CALCULATOR, "python": PYTHON, "no-calculator": replace(CALCULATOR, run=_unavailable)}


class TaskWithTools(Environment):
    """`tools:NAMES:TASK`. Problems, verdicts and languages are the task's; so is whether the tools are described."""

    def __init__(self, argument: str, **settings: Any) -> None:
        names, _, task = argument.partition(":")
        chosen = names.split("+")
        if unknown := [name for name in chosen if name not in TOOLS]:
            raise UserError(
                f"tools:{argument}: there is no tool {unknown[0]!r}; write tools:NAMES:TASK with the tools "
                f"{', '.join(TOOLS)}, such as tools:calculator:arithmetic"
            )
        if not task:
            raise UserError(f"tools:{argument} names no task; add one, as in tools:{names}:arithmetic")
        self.task = registry.get(task, **settings)
        self.name, self.domain = f"tools:{argument}", self.task.domain
        added = {TOOLS[name].name: TOOLS[name] for name in chosen}
        self.added = frozenset(added)
        if len(added) < len(chosen):
            raise UserError(f"tools:{argument} names a tool twice (no-calculator is a calculator, too); name it once")
        if isinstance(self.task, Environment):
            if type(self.task).reset is not Environment.reset:
                raise UserError(f"tools:{argument}: {task} plays episodes of its own, with its own tools; write {task}")
            added = {tool.name: tool for tool in self.task.tools} | added
            for name in ("described", "max_turns", "seconds", "observed", "parallel"):
                setattr(self, name, getattr(self.task, name))
        self.tools: Sequence[LocalTool] = list(added.values())
        self.all_languages, self.judged_by = self.task.all_languages, self.task.judged_by
        self.translated = self.task.translated
        self.languages, self.phrasing, self.mix = self.task.languages, self.task.phrasing, self.task.mix
        self.options = self.task.options
        if "python" in chosen:
            sandbox.resolve_level()  # UserError now instead of a failure later

    @classmethod
    def source(cls, argument: str) -> tuple[str, str | None] | None:
        return registry.source_of(argument.partition(":")[2])

    def option_names(self) -> list[str]:
        return self.task.option_names()

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The task's own descriptions of its tools, which it may have changed, and those of the others."""
        own = self.task.schemas if isinstance(self.task, Environment) else []
        own_kept = [schema for schema in own if schema["function"]["name"] not in self.added]
        own_names = {schema["function"]["name"] for schema in own} - self.added
        return own_kept + [schema for schema in super().schemas if schema["function"]["name"] not in own_names]

    def problem(self, split: str, index: int, seed: int = 0, language: str | None = None) -> Problem:
        return self.task.problem(split, index, seed, language)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.task.verify(problem, completion)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        return self.task.written(index, seed, language)

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        return self.task.document(index, seed, language)

    def train_problem(self, index: int, seed: int, language: str | None) -> Problem:
        return self.task.train_problem(index, seed, language)

    def size(self, split: str) -> int | None:
        return self.task.size(split)
