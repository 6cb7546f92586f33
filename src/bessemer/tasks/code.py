"""Small functions to write, judged by their results: `code` from our own families, `code:PATH` from a JSONL file.

The answer is Python source between the answer tags, in a code fence or bare. It runs in the sandbox (sandbox/), which
refuses to run code without isolation, and only the values come back. The hidden tests of a template problem are derived
from the problem, so they are the same everywhere and appear in no document. In addition to the reasons of every task:
wrong-output, error, timeout, memory, output (it wrote too much), syntax-error, no-function, too-long.

A line of a file is an object with `prompt`, `entry_point` (the name of the function to write) and `tests`, a list of
objects with `input` (the list of arguments) and `output`; optional are `id`, `language` ("en" or "zh"; else guessed
from the prompt) and `difficulty`. The split of a line is a hash of its prompt. A broken line is an error when the task
is made.
"""

import json
import math
import re
from functools import lru_cache
from keyword import iskeyword
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks import sandbox
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import (
    SPLITS,
    Problem,
    Task,
    Verdict,
    Written,
    read_templates,
    split_of_text,
    stable_hash,
    stable_random,
)
from bessemer.tasks.code_functions import FAMILIES, HELD_OUT, CodeMix, TargetFunction, functions_of, respond
from bessemer.tasks.readability import share

NAME = "f"
LONGEST = 10_000  # characters of an answer
TOO_LONG = "too-long"
TEMPLATES = read_templates("code")
_FENCE = re.compile("```(?:python|py)?[ \t]*\n")
_FIELDS = {"prompt": str, "entry_point": str, "tests": list}


class SandboxedTask(Task):
    """A task whose answers are run. A subclass writes `tests`; `meta["function"]` is the name that is called."""

    domain = "code"

    def tests(self, problem: Problem) -> sandbox.Tests:
        raise NotImplementedError

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Like `Task.verify`, but an answer that cannot be correct is not run."""
        reply = parse_reply(completion)
        if reply.problem is None:
            return super().verify(problem, completion)
        source = None if reply.answer is None else source_of(reply.answer) or None
        return Verdict(False, False, reply.problem, source)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        """The canonical form is the source without its fence and blank lines."""
        source = source_of(answer)
        if not source:
            return sandbox.NO_FUNCTION, None
        if len(source) > LONGEST:
            return TOO_LONG, None
        return _reason_of(source, problem.meta["function"], json.dumps(self.tests(problem))), source


class Code(SandboxedTask):
    name = "code"
    Mix = CodeMix

    def size(self, split: str) -> int:
        """Number of different functions in a split."""
        return len(functions_of(split))

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        size = self.size(split)
        goal = _shuffled(split, seed, index // size)[index % size]
        templates = TEMPLATES[language, phrasing]
        template = self.rng("problem", split, index, seed).randrange(len(templates))
        prompt = templates[template].format(argument=goal.family.argument, words=goal.words(language))
        meta = {
            "function": NAME,
            "family": goal.family.name,
            "parameters": list(goal.parameters),
            "held_out": "family" if goal.family.name in HELD_OUT else "parameters" if split == "test" else None,
            "difficulty": goal.family.difficulty,
            "template": f"{language}-{phrasing}-{template}",
        }
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def tests(self, problem: Problem) -> sandbox.Tests:
        """The hidden tests; they depend only on the function, not on seed, index or wording."""
        return _hidden_tests(_goal(problem).key)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem = self.train_problem(index, seed, language)
        author, response = respond(_goal(problem), problem.language, self.mix, self.rng("document", index, seed))
        return Written(problem, author, response)


def source_of(answer: str) -> str:
    """The program in an answer: the content of its first code fence, or all of it, without blank lines."""
    opening = _FENCE.search(answer)
    if opening:
        answer = answer[opening.end() :].partition("```")[0]
    return "\n".join(line.rstrip() for line in answer.strip().splitlines() if line.strip())


def _goal(problem: Problem) -> TargetFunction:
    return TargetFunction(FAMILIES[problem.meta["family"]], tuple(problem.meta["parameters"]))


@lru_cache(maxsize=1024)  # used by every sample of a group
def _hidden_tests(key: str) -> sandbox.Tests:
    goal = next(one for split in SPLITS for one in functions_of(split) if one.key == key)
    return goal.tests(stable_random("code tests", key))


@lru_cache(maxsize=4096)  # the samples of a group often give the same answer
def _reason_of(source: str, function: str, tests: str) -> str:
    return sandbox.judge(source, function, json.loads(tests)).reason


@lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, epoch: int) -> tuple[TargetFunction, ...]:
    return tuple(sorted(functions_of(split), key=lambda one: stable_hash("code", split, seed, epoch, one.key)))


class CodeFile(SandboxedTask):
    """The problems of one file, repeated endlessly, in a new order each epoch."""

    def __init__(self, path: str, **settings: Any):
        self.name = f"code:{path}"
        self._rows = _read_problems(Path(path))
        self.all_languages = tuple(sorted({row["language"] for row in self._rows}))
        super().__init__(**settings)

    def size(self, split: str) -> int:
        return len(self._lines(split, ""))

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        numbers = self._lines(split, language)
        if not numbers:
            raise UserError(f"{self.name}: none of its {len(self._rows)} lines falls into the {split} split; add more")
        epoch, place = divmod(index, len(numbers))
        number = sorted(numbers, key=lambda n: stable_hash(split, seed, epoch, self._rows[n]["prompt"]))[place]
        row = self._rows[number]
        meta = {"function": row["entry_point"], "row": number, "difficulty": row.get("difficulty", 1)}
        return Problem(f"{self.name}/{row.get('id', number)}", row["prompt"], row["language"], meta)

    def tests(self, problem: Problem) -> sandbox.Tests:
        return [(test["input"], test["output"]) for test in self._rows[problem.meta["row"]]["tests"]]

    def _language(self, language: str | None, *parts: object) -> str:
        """Each line has its own language; "" leaves the choice to the order of the lines."""
        return "" if language is None else super()._language(language, *parts)

    def _lines(self, split: str, language: str) -> list[int]:
        """Line numbers of a split, from 0; those in any of the task's languages where `language` is ""."""
        languages = (language,) if language else self.languages
        rows = enumerate(self._rows)
        return [n for n, row in rows if split_of_text(row["prompt"]) == split and row["language"] in languages]


def _read_problems(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"code:{path} cannot be read: {error}; give the path of a JSONL file in UTF-8") from error
    rows = [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no problem; write one JSON object a line (prompt, entry_point, tests)")
    return rows


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    for name, kind in _FIELDS.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind) or not row[name]:
            raise UserError(f"{where} needs {name!r}, a {kind.__name__} that is not empty")
    if not row["entry_point"].isidentifier() or iskeyword(row["entry_point"]):
        raise UserError(f"{where}: entry_point {row['entry_point']!r} is not a valid function name")
    for number, test in enumerate(row["tests"], start=1):
        if not isinstance(test, dict) or not isinstance(test.get("input"), list) or "output" not in test:
            raise UserError(f"{where}: test {number} needs 'input', a list of arguments, and 'output'")
        if not _finite(test):
            raise UserError(f"{where}: test {number} holds a number that is not finite")
    row.setdefault("language", "zh" if share(row["prompt"], "zh") >= 0.5 > share(row["prompt"], "en") else "en")
    if row["language"] not in ("en", "zh"):
        raise UserError(f"{where}: language {row['language']!r} is not known; use 'en' or 'zh'")
    return row


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return math.isfinite(value) if isinstance(value, float) else True
