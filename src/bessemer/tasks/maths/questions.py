"""Reading mathematics problems from JSON lines, and the forms of an answer that need no algebra.

Everything that can be wrong with a line is found here, before a run starts, and named with its file and number.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.base import SPLITS, split_of_text
from bessemer.tasks.maths import numeral
from bessemer.tasks.referee import RefereeFault, ask

MAX_GOLD = 300
_STEP = re.compile("<<[^<>]*>>")
_LEVEL = re.compile("Level ([1-9])")
_HAN = re.compile("[\u3400-\u9fff]")
_PEELS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\\boxed ?\{(?P<inner>.*)\}",
        r"\$\$(?P<inner>[^$]+)\$\$",
        r"\$(?P<inner>[^$]+)\$",
        r"\\\((?P<inner>.*)\\\)",
        r"\\\[(?P<inner>.*)\\\]",
    )
)
_WORDS = re.compile(r"(?:\\(?:text|mbox|textbf|mathrm) ?\{(?P<inner>[A-Za-z][A-Za-z ]*)\}|(?P<bare>[A-Za-z]{3,}))")


@dataclass(frozen=True)
class Question:
    text: str
    gold: str
    language: str
    difficulty: int
    """Worked steps of a GSM8K answer, the level of a MATH problem, 0 where the line says neither; at most 9."""
    line: int


def load(path: Path, family: str) -> dict[str, list[Question]]:
    """{"train": [...], "test": [...]} of a directory or a file. Errors name file and line."""
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if not files:
            raise UserError(f"{path} has neither train.jsonl nor test.jsonl; name the file itself, or add one")
        found = {split: list(_read(files[split], family)) if split in files else [] for split in SPLITS}
        asked = {question.text for question in found["test"]}
        found["train"] = [question for question in found["train"] if question.text not in asked]
        return found
    if not path.is_file():
        raise UserError(f"there is no file or directory {path}; write {family}:PATH with a path that exists")
    questions = _read(path, family)
    return {split: [q for q in questions if split_of_text(q.text) == split] for split in SPLITS}


def _read(path: Path, family: str) -> tuple[Question, ...]:
    stat = path.stat()
    return _parsed(path, family, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _parsed(path: Path, family: str, changed: int, size: int) -> tuple[Question, ...]:
    """Cached by time and size of the file: stages make their tasks anew for every language."""
    try:
        with path.open(encoding="utf-8") as file:
            questions = tuple(_questions(file, path, family))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    if not questions:
        raise UserError(f"{path} holds no problem; each line is a JSON object with a question and an answer")
    return questions


def _questions(lines: Iterator[str], path: Path, family: str) -> Iterator[Question]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a {type(record).__name__}; each line is an object with a question and an answer")
        text = record.get("question", record.get("problem"))
        answer = record.get("answer")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f'{where}: no text under "question" or "problem"')
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f'{where}: no text or number under "answer"')
        gold = _gold(str(answer), family, where)
        language = "zh" if _HAN.search(text) else "en"
        yield Question(text.strip(), gold, language, _difficulty(record, str(answer)), number)


def _gold(answer: str, family: str, where: str) -> str:
    """The final answer, known to be readable."""
    _worked, mark, final = answer.rpartition("####")
    if family == "gsm8k" and not mark:
        raise UserError(f'{where}: the answer has no "#### n"; use jsonl:PATH where "answer" is the final answer alone')
    gold = peeled(final)
    if not gold or len(gold) > MAX_GOLD:
        raise UserError(f"{where}: the final answer is empty or longer than {MAX_GOLD} characters")
    if numeral.read(gold) is not None or plain_words(gold) is not None:
        return gold
    try:
        readable = ask("maths-read", gold=gold)["read"]
    except RefereeFault:
        readable = False
    if not readable:
        raise UserError(f"{where}: the answer {gold!r} is no number, word or LaTeX expression; correct the line")
    return gold


def _difficulty(record: dict[str, Any], answer: str) -> int:
    level = _LEVEL.fullmatch(str(record.get("level", "")))
    return int(level[1]) if level else min(len(_STEP.findall(answer)), 9)


def peeled(text: str) -> str:
    """Without the white space, math delimiters, \\boxed and the full stop around an answer."""
    while True:
        text = text.strip(" \n\t").removesuffix(".")
        match = next((found for pattern in _PEELS if (found := pattern.fullmatch(text))), None)
        if match is None or not _balanced(match["inner"]):
            return text.strip(" \n\t")
        text = match["inner"]


def _balanced(text: str) -> bool:
    """Whether the braces close in order: the outer ones of \\boxed{1} or \\boxed{2} are no pair."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def plain_words(text: str) -> str | None:
    """The words of an answer in words, in lower case; None for what is not that."""
    match = _WORDS.fullmatch(text)
    return " ".join((match["inner"] or match["bare"]).lower().split()) if match else None
