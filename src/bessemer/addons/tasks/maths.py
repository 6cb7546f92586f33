"""Mathematics problems from a file: `jsonl:PATH`, and `gsm8k:PATH` for answers that end in `#### n`.

A line has a question and an answer (see files.py); a quantity also has a "unit" that an answer may carry or leave out,
a "tolerance" relative to the gold value, or both.

Judging, cheapest first. A unit is split off and judged alone (units_asked.py). If the gold answer is a plain number,
only plain numbers count, compared exactly: an expression with that value is unfinished work, and often a copy of the
question. A fraction need not be in lowest terms if the question does not ask for them, and a power counts if the
question has none. If the gold answer is words, only those words count. Everything else is one expression, compared in
the referee process (equality.py), exactly; the whole text of the answer must be that expression. A decimal stands for
an irrational number only if the question asks for one. A question that says how to write the answer ("factor", "as a
common fraction") gets that form (forms.py); an answer that only repeats a piece of the question is an echo. A gold
answer that cannot be read, or is not a value ("nan", 1/0), is an error when the file is loaded.

Letters of other alphabets count only if the gold answer has them, or as mathematical signs: some of them look alike.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from bessemer.addons.tasks.files import FileTask, Question
from bessemer.addons.tasks.maths_answers import judge
from bessemer.addons.tasks.maths_questions import (
    no_value,
    parse_clock,
    parse_numeral,
    parse_quantity,
    peeled,
    plain_words,
)
from bessemer.addons.tasks.maths_writing import plainer, values_of
from bessemer.addons.tasks.referee import TIMEOUT, RefereeFault, ask
from bessemer.addons.tasks.units import split_unit
from bessemer.addons.tasks.verifiers import CostlyTask
from bessemer.errors import UserError
from bessemer.tasks.base import CORRECT, UNPARSABLE, WRONG_VALUE, Problem

MAX_CHARS = 300
"""Maximum length in characters of an answer that is read."""
MEASURED = ("unit", "tolerance")
"""Fields of a quantity: a unit that the answer may carry, and a relative tolerance."""
_STEP = re.compile("<<[^<>]*>>")
_LEVEL = re.compile("Level ([1-9])")


class Maths(CostlyTask, FileTask):
    domain = "maths"
    family = "jsonl"
    form = '{"question": "...", "answer": "..."}'

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        question, answer = cls.text(record, where), record.get("answer")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise cls.wrong(where, "no text or number under 'answer'", record)
        _worked, mark, final = str(answer).rpartition("####")
        if cls.family == "gsm8k" and not mark:
            hint = "use jsonl:PATH if 'answer' is only the final answer"
            raise cls.wrong(where, f"the answer has no '#### n'; {hint}", record)
        gold = peeled(final, braces=True)
        if not gold or len(gold) > MAX_CHARS:
            raise cls.wrong(where, f"the final answer is empty or longer than {MAX_CHARS} characters", record)
        if no_value(gold, "null", "none"):
            raise cls.wrong(where, f"the final answer {gold!r} is not a value; leave the line out", record)
        try:
            measured = _measured(record, gold)
        except ValueError as error:
            raise cls.wrong(where, str(error), record) from error
        return Question(question, {"gold": gold, "difficulty": _difficulty(record, str(answer))} | measured)

    @classmethod
    def check(cls, questions: Sequence[tuple[str, Question]]) -> None:
        """Checks gold answers that only algebra can read. Those read together share one fork of the referee."""
        golds = {
            plainer(split_unit(question.meta["gold"])[0]): where
            for where, question in reversed(questions)
            if not _plain(question.meta)
        }
        if golds and not _readable(list(golds)):
            for gold, where in golds.items():
                if not _readable([gold]):
                    fault = f"the answer {gold!r} is not a number, word or LaTeX expression with a value; fix the line"
                    raise UserError(f"{where}: {fault}, or use puzzle:PATH if an answer is text")

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        gold, question = problem.meta["gold"], problem.meta.get("question", problem.prompt)
        if len(answer) > MAX_CHARS:
            return UNPARSABLE, None
        answer = peeled(answer, braces=True)
        if not answer:
            return UNPARSABLE, None
        if not problem.meta.keys().isdisjoint(MEASURED):
            return _grade_quantity(problem.meta, answer)
        if (words := plain_words(gold)) is not None:
            plain = plain_words(answer)
            return (CORRECT if plain == words else WRONG_VALUE, plain) if plain is not None else (UNPARSABLE, None)
        try:
            return judge(gold, answer, question)
        except RefereeFault as fault:
            return TIMEOUT if str(fault) == TIMEOUT else UNPARSABLE, None

    def grade_together(self, problem: Problem, answers: Sequence[str]) -> tuple[str, str | None]:
        """Several boxes may share the values of a list that the question asks for."""
        texts = [peeled(answer, braces=True) for answer in answers]
        if len(values_of(problem.meta["gold"])) == len(texts) > 1 and not any("," in text for text in texts):
            reason, canonical = self.grade(problem, ", ".join(texts))
            if reason == CORRECT:
                return reason, canonical
        return super().grade_together(problem, answers)


class Gsm8k(Maths):
    family = "gsm8k"


def _grade_quantity(meta: dict[str, Any], answer: str) -> tuple[str, str | None]:
    unit, tolerance = meta.get("unit", ""), Fraction(meta.get("tolerance", 0))
    value, gold = parse_quantity(answer, unit), parse_quantity(meta["gold"], unit)
    if value is None or gold is None:
        return UNPARSABLE, None
    return CORRECT if abs(value - gold) <= tolerance * abs(gold) else WRONG_VALUE, f"{float(value):.4g}"


def _measured(record: dict[str, Any], gold: str) -> dict[str, Any]:
    """The fields of a quantity. ValueError if they do not fit each other."""
    measured = {name: record[name] for name in MEASURED if record.get(name) is not None}
    unit, tolerance = measured.get("unit", ""), measured.get("tolerance", 0)
    if not isinstance(unit, str) or isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise ValueError("'unit' must be text and 'tolerance' a number")
    if not 0 <= tolerance <= 0.1:
        raise ValueError(f"the tolerance {tolerance} must be relative and at most 0.1")
    if measured and parse_quantity(gold, unit) is None:
        raise ValueError(f"the answer {gold!r} is not a number, with or without the unit {unit!r}")
    return measured


def _plain(meta: dict[str, Any]) -> bool:
    """Whether a gold answer needs no algebra."""
    gold = meta["gold"]
    if not meta.keys().isdisjoint(MEASURED) or plain_words(gold) is not None:
        return True
    return parse_numeral(split_unit(gold)[0]) is not None or parse_clock(gold) is not None


def _difficulty(record: dict[str, Any], answer: str) -> int:
    level = _LEVEL.fullmatch(str(record.get("level", "")))
    return int(level[1]) if level else min(len(_STEP.findall(answer)), 9)


def _readable(golds: list[str]) -> bool:
    try:
        return bool(ask("maths-read", golds=golds)["read"])
    except RefereeFault:
        return False
