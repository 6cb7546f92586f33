"""Mathematics problems from a file: `jsonl:PATH`, and `gsm8k:PATH` for answers that end in `#### n`.

PATH is a directory with train.jsonl and test.jsonl, or one file, a tenth of which is held out by a hash of the
question. A line has "question" or "problem", and "answer". Questions of the test file are removed from the training
set.

Judging, cheapest first. If the gold answer is a plain number, only plain numbers count, compared exactly: an expression
with that value is unfinished work, and often a copy of the question. If it is words, only those words count. Everything
else is one expression, judged by math-verify in the referee process; an answer that only repeats a piece of the
question is an echo, because math-verify accepts `(x+1)^2` for "expand (x+1)^2". A gold answer that cannot be read is
an error when the file is loaded.

math-verify searches a text for anything that parses. Here the whole text of the answer tags must be one expression: it
is put between dollar signs unchanged, and only LaTeX delimited that way is read, without any fallback.
"""

import logging
import re
import warnings
from functools import cache, lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.base import (
    CORRECT,
    ECHO,
    TIMEOUT,
    UNFINISHED,
    UNPARSABLE,
    WRONG_VALUE,
    Problem,
    Task,
    stable_hash,
)
from bessemer.tasks.maths_questions import Numeral, Question, load, parse_numeral, peeled, plain_words
from bessemer.tasks.referee import RefereeFault, ask, guard_sympy

MAX_CHARS = 300
"""Maximum length in characters of an answer that is read."""
MAX_CANONICAL = 200
_HUGE = re.compile(r"[0-9]{16}|\^ ?\{? ?-?[0-9]{4}")


class Maths(Task):
    domain = "maths"
    family = "jsonl"
    phrasings = ("seen",)

    def __init__(self, path: str, **settings: Any):
        self.name = f"{self.family}:{path}"
        questions = load(Path(path), self.family)
        self.pools = {split: _pools(questions[split]) for split in questions}
        self.all_languages = tuple(sorted({q.language for group in questions.values() for q in group}))
        super().__init__(**settings)

    def size(self, split: str) -> int:
        """Problems of the split before one repeats; those of the scarcest language if there are several."""
        return min(len(self.pools[split].get(language, ())) for language in self.languages)

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        pool = self.pools[split].get(language)
        if not pool:
            raise UserError(f"{self.name} has no {split} problem in {language!r}; add a file {split}.jsonl")
        question = pool[_order(len(pool), self.name, split, seed, language, index // len(pool))[index % len(pool)]]
        meta = {"gold": question.gold, "line": question.line, "difficulty": question.difficulty}
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", question.text, language, meta)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        gold = problem.meta["gold"]
        if len(answer) > MAX_CHARS:
            return UNPARSABLE, None
        answer = peeled(answer)
        if not answer:
            return UNPARSABLE, None
        if (number := parse_numeral(gold)) is not None:
            return _grade_number(number, answer)
        if (words := plain_words(gold)) is not None:
            given = plain_words(answer)
            return (CORRECT if given == words else WRONG_VALUE, given) if given is not None else (UNPARSABLE, None)
        return _grade_expression(gold, answer, problem.prompt)


class Gsm8k(Maths):
    family = "gsm8k"


def _grade_number(gold: Numeral, answer: str) -> tuple[str, str | None]:
    number = parse_numeral(re.sub(r"^[A-Za-z] ?= ?", "", answer))
    if number is None:
        return UNPARSABLE, None
    if not number.finished:
        return UNFINISHED, number.canonical
    return CORRECT if number.value == gold.value else WRONG_VALUE, number.canonical


def _grade_expression(gold: str, answer: str, prompt: str) -> tuple[str, str | None]:
    left, equals, right = answer.partition("=")
    if equals and "=" not in gold and ("=" in right or not re.fullmatch("[A-Za-z] ?", left)):
        return UNPARSABLE, None  # of a chain of equations math-verify would take the last side
    if "\n" in answer or "$" in answer or _HUGE.search(answer):
        return UNPARSABLE, None  # more than one expression, or a power that no answer has
    try:
        reply = _same(gold, answer)
    except RefereeFault as fault:
        return TIMEOUT if str(fault) == TIMEOUT else UNPARSABLE, None
    if reply["canonical"] is None:
        return UNPARSABLE, None
    if reply["same"] and _echoes(answer, prompt) and _bare(answer) != _bare(gold):
        return ECHO, reply["canonical"]
    return CORRECT if reply["same"] else WRONG_VALUE, reply["canonical"]


def _echoes(answer: str, prompt: str) -> bool:
    """Whether the question contains the answer, if it is of some length; braces and spaces are ignored."""
    return len(_bare(answer)) > 2 and _bare(answer) in _bare(prompt)


def _bare(text: str) -> str:
    return re.sub(r"\\left|\\right|\\[,;! ]|[{}\s]", "", text)


@lru_cache(maxsize=4096)
def _same(gold: str, answer: str) -> dict[str, Any]:
    return ask("maths-same", gold=gold, answer=answer)


def _pools(questions: list[Question]) -> dict[str, list[Question]]:
    pools: dict[str, list[Question]] = {}
    for question in questions:
        pools.setdefault(question.language, []).append(question)
    return pools


@lru_cache(maxsize=64)
def _order(size: int, *key: object) -> tuple[int, ...]:
    return tuple(sorted(range(size), key=lambda i: stable_hash(*key, i)))


# In the referee process.


@cache
def _math_verify() -> ModuleType:
    """math-verify, with sympy guarded.

    Computes one verdict of each expensive kind, so that a fork inherits the tables and caches it needs.
    """
    try:
        import math_verify
    except ImportError as error:
        raise UserError(f"judging mathematics needs math-verify ({error}): pip install math-verify") from error
    guard_sympy()
    logging.disable(logging.WARNING)  # it warns that its own timeout is off, which is intended
    warnings.simplefilter("ignore")
    for gold, answer in (("x^2+2x+1", "(x+1)^2"), (r"\sqrt{3}", "1.7"), (r"\{1,2\}", "1,3"), ("x=3", "y=3")):
        math_verify.verify(_parsed(math_verify, gold), _parsed(math_verify, answer), timeout_seconds=None)
    return math_verify


def _parsed(library: ModuleType, text: str) -> list[Any]:
    """The expressions math-verify reads; strings that it cannot interpret are left out."""
    config = [library.LatexExtractionConfig()]
    results = library.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in results if not isinstance(expression, str)]


def prepare_library(request: dict[str, Any]) -> ModuleType:
    return _math_verify()


def judge_gold(library: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Whether a gold answer is an expression."""
    return {"read": bool(_parsed(library, request["gold"]))}


def judge_same(library: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """{"same": verdict, "canonical": how sympy writes the answer}, or canonical None where it is no expression."""
    answer = _parsed(library, request["answer"])
    if not answer:
        return {"same": False, "canonical": None}
    equal = library.verify(_parsed(library, request["gold"]), answer, timeout_seconds=None)
    return {"same": bool(equal), "canonical": str(answer[0])[:MAX_CANONICAL]}
