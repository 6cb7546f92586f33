"""Reading mathematics problems from JSON lines, and the forms of an answer that need no algebra.

Every fault in a line is reported here, before a run starts, with its file and line number. Plain numbers are read as
people write them in final answers: 42, -3.50, 1,234, 3/4, \\frac{3}{4}, $18, 75%. They judge nearly all answers to
GSM8K-like problems exactly and in microseconds. A currency, percent or degree sign is a unit and ignored. Digits are
ASCII, and few enough that no number is expensive.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.base import SPLITS, split_of_text
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
MAX_NUMERAL = 60
_DIGITS = "(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})"
_NUMERAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?:\\?\$|[£€¥])? ?(?:"
    rf"(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})"
    rf"|\\[dt]?frac ?\{{(?P<latex_top>-?{_DIGITS})\}} ?\{{(?P<latex_bottom>{_DIGITS})\}}"
    rf"|(?P<whole>{_DIGITS})(?:\.(?P<part>[0-9]{{0,15}}))?|\.(?P<only>[0-9]{{1,15}})"
    r") ?(?:\\?%|°|\^\\circ|\^\{\\circ\})?"
)


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
        questions = {split: list(_questions_of(files[split], family)) if split in files else [] for split in SPLITS}
        tested = {question.text for question in questions["test"]}
        questions["train"] = [question for question in questions["train"] if question.text not in tested]
        return questions
    if not path.is_file():
        raise UserError(f"there is no file or directory {path}; write {family}:PATH with a path that exists")
    every = _questions_of(path, family)
    return {split: [q for q in every if split_of_text(q.text) == split] for split in SPLITS}


def _questions_of(path: Path, family: str) -> tuple[Question, ...]:
    stat = path.stat()
    return _parsed(path, family, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _parsed(path: Path, family: str, changed: int, size: int) -> tuple[Question, ...]:
    """Cached by time and size of the file, because stages create their tasks again for every language."""
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
    """The final answer, checked to be readable."""
    _worked, mark, final = answer.rpartition("####")
    if family == "gsm8k" and not mark:
        raise UserError(f'{where}: the answer has no "#### n"; use jsonl:PATH where "answer" is the final answer alone')
    gold = peeled(final)
    if not gold or len(gold) > MAX_GOLD:
        raise UserError(f"{where}: the final answer is empty or longer than {MAX_GOLD} characters")
    if parse_numeral(gold) is not None or plain_words(gold) is not None:
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
    """An answer without the white space, math delimiters, \\boxed and full stop around it."""
    while True:
        text = text.strip(" \n\t").removesuffix(".")
        match = next((m for pattern in _PEELS if (m := pattern.fullmatch(text))), None)
        if match is None or not _balanced(match["inner"]):
            return text.strip(" \n\t")
        text = match["inner"]


def _balanced(text: str) -> bool:
    """Whether the braces close in order: the outer braces of \\boxed{1} or \\boxed{2} are not a pair."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def plain_words(text: str) -> str | None:
    """An answer in words, in lower case; None for any other answer."""
    match = _WORDS.fullmatch(text)
    return " ".join((match["inner"] or match["bare"]).lower().split()) if match else None


@dataclass(frozen=True)
class Numeral:
    value: Fraction
    finished: bool
    """Whether nothing is left to work out: 3/4 and 42, not 6/8 or 84/2."""

    @property
    def canonical(self) -> str:
        return str(self.value)


def parse_numeral(text: str) -> Numeral | None:
    """None where the text is anything but one plain number."""
    match = _NUMERAL.fullmatch(text) if len(text) <= MAX_NUMERAL else None
    if match is None:
        return None
    top, bottom = match["top"] or match["latex_top"], match["bottom"] or match["latex_bottom"]
    if top is None:
        value = Fraction(f"{(match['whole'] or '0').replace(',', '')}.{match['part'] or match['only'] or '0'}")
        finished = True
    else:
        numerator, denominator = int(top.replace(",", "")), int(bottom.replace(",", ""))
        if denominator == 0:
            return None
        value = Fraction(numerator, denominator)
        finished = value.denominator == denominator > 1
    return Numeral(-value if match["sign"] == "-" else value, finished)
