"""Mathematics problems from a file: `jsonl:PATH`, and `gsm8k:PATH` for answers that end in `#### n`.

PATH is a directory with train.jsonl and test.jsonl, or one file, of which a hash of the question holds a tenth out. A
line has "question" or "problem", and "answer". Questions of the test file are taken out of the training set.

Judging, cheapest first. A gold answer that is a plain number takes plain numbers, compared exactly: an expression with
that value is unfinished work, and often a copy of the question. A gold answer of words takes those words. Everything
else goes to math-verify, one expression, in the referee process; an answer that only repeats a piece of the question
is an echo, since for math-verify `(x+1)^2` answers "expand (x+1)^2". A gold answer that nothing can read is an error
when the file is loaded.
"""

import re
from functools import lru_cache
from pathlib import Path
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
from bessemer.tasks.maths import numeral
from bessemer.tasks.maths.questions import Question, load, peeled, plain_words
from bessemer.tasks.referee import RefereeFault, ask

MAX_CHARS = 300
"""The longest answer that is read at all."""
_HUGE = re.compile(r"[0-9]{16}|\^ ?\{? ?-?[0-9]{4}")


class Maths(Task):
    domain = "maths"
    family = "jsonl"
    phrasings = ("seen",)

    def __init__(self, path: str, **settings: Any):
        self.name = f"{self.family}:{path}"
        questions = load(Path(path), self.family)
        self.pools = {split: _pools(questions[split]) for split in questions}
        self.all_languages = tuple(sorted({q.language for found in questions.values() for q in found}))
        super().__init__(**settings)

    def size(self, split: str) -> int:
        """Problems of the split until one repeats; in the scarcest language where there are several."""
        return min(len(self.pools[split].get(language, ())) for language in self.languages)

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        pool = self.pools[split].get(language)
        if not pool:
            raise UserError(f"{self.name} has no {split} problem in {language!r}; add {split}.jsonl beside the other")
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
        if (number := numeral.read(gold)) is not None:
            return _grade_number(number, answer)
        if (words := plain_words(gold)) is not None:
            said = plain_words(answer)
            return (CORRECT if said == words else WRONG_VALUE, said) if said is not None else (UNPARSABLE, None)
        return _grade_expression(gold, answer, problem.prompt)


class Gsm8k(Maths):
    family = "gsm8k"


def _grade_number(gold: numeral.Numeral, answer: str) -> tuple[str, str | None]:
    found = numeral.read(re.sub(r"^[A-Za-z] ?= ?", "", answer))
    if found is None:
        return UNPARSABLE, None
    if not found.finished:
        return UNFINISHED, found.canonical
    return CORRECT if found.value == gold.value else WRONG_VALUE, found.canonical


def _grade_expression(gold: str, answer: str, prompt: str) -> tuple[str, str | None]:
    left, equals, right = answer.partition("=")
    if equals and "=" not in gold and ("=" in right or not re.fullmatch("[A-Za-z] ?", left)):
        return UNPARSABLE, None  # of a chain of equations math-verify would take the last side
    if "\n" in answer or "$" in answer or _HUGE.search(answer):
        return UNPARSABLE, None  # more than one expression, or a power no answer has
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
    """Whether an expression of some length stands in the question, braces and spaces aside."""
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
