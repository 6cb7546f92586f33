"""`code:PATH`: functions to write, from a JSONL file of one's own.

A line is an object with `prompt`, `entry_point` (the name of the function to write) and `tests`, a list of objects with
`input` (the list of arguments) and `output`; and if you like `id`, `language` ("en" or "zh"; else told from the prompt)
and `difficulty`. The split of a line is a hash of its prompt. A broken line is an error when the task is made.
"""

import json
import math
from keyword import iskeyword
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks import sandbox
from bessemer.tasks.base import Problem, split_of_text, stable_hash
from bessemer.tasks.code.task import Judged
from bessemer.tasks.reading.language import share

_FIELDS = {"prompt": str, "entry_point": str, "tests": list}


class CodeFile(Judged):
    """The lines of one file; an endless list of them, in an order of its own each time round."""

    def __init__(self, path: str, **settings: Any):
        self.name = f"code:{path}"
        self._rows = _read(Path(path))
        self.all_languages = tuple(sorted({row["language"] for row in self._rows}))
        super().__init__(**settings)

    def size(self, split: str) -> int:
        return len(self._of(split, None))

    def make(self, split: str, index: int, seed: int, language: str | None, phrasing: str) -> Problem:
        numbers = self._of(split, language)
        if not numbers:
            raise UserError(f"{self.name}: none of its {len(self._rows)} lines falls into the {split} split; add more")
        epoch, place = divmod(index, len(numbers))
        number = sorted(numbers, key=lambda n: stable_hash(split, seed, epoch, self._rows[n]["prompt"]))[place]
        row = self._rows[number]
        meta = {"function": row["entry_point"], "row": number, "difficulty": row.get("difficulty", 1)}
        return Problem(f"{self.name}/{row.get('id', number)}", row["prompt"], row["language"], meta)

    def tests(self, problem: Problem) -> sandbox.Tests:
        return [(test["input"], test["output"]) for test in self._rows[problem.meta["row"]]["tests"]]

    def _language(self, language: str | None, *parts: object) -> str | None:
        """A problem has the language it is written in; None leaves the choice to the order of the lines."""
        return None if language is None else super()._language(language, *parts)

    def _of(self, split: str, language: str | None) -> list[int]:
        """Line numbers of a split, from 0."""
        languages = self.languages if language is None else (language,)
        rows = enumerate(self._rows)
        return [n for n, row in rows if split_of_text(row["prompt"]) == split and row["language"] in languages]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"code:{path} cannot be read: {error}; give the path of a JSONL file in UTF-8") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no problem; write one JSON object a line (prompt, entry_point, tests)")
    return rows


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {error}") from error
    for name, kind in _FIELDS.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind) or not row[name]:
            raise UserError(f"{where} needs {name!r}, a {kind.__name__} that is not empty")
    if not row["entry_point"].isidentifier() or iskeyword(row["entry_point"]):
        raise UserError(f"{where}: entry_point {row['entry_point']!r} is no name a function can have")
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
