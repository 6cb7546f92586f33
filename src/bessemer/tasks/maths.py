"""Mathematics problems from a file: `jsonl:PATH`, and `gsm8k:PATH` for answers that end in `#### n`.

A line has a question and an answer (see files.py); a quantity also has a "unit" that an answer may carry or leave out,
a "tolerance" relative to the gold value, or both.

Judging, cheapest first. If the gold answer is a plain number, only plain numbers count, compared exactly: an expression
with that value is unfinished work, and often a copy of the question. A fraction need not be in lowest terms if the
question does not ask for them, and a power counts if the question has none. If the gold answer is words, only those
words count. Everything else is one expression, judged by math-verify in the referee process; an answer that only
repeats a piece of the question is an echo, because math-verify accepts `(x+1)^2` for "expand (x+1)^2". A gold answer
that cannot be read, or is not a value ("nan", 1/0), is an error when the file is loaded.

math-verify searches a text for anything that parses. Here the whole text of the answer tags must be one expression: it
is put between dollar signs unchanged, and only LaTeX delimited that way is read, without any fallback. It also removes
any unit, even the `t` of `5t`; here that is off, and units are compared (maths_questions.py). Letters of other
alphabets count only if the gold answer has them, or as mathematical signs: some of them parse as their look-alikes.
"""

import logging
import re
import warnings
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache
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
)
from bessemer.tasks.files import FileTask, Question
from bessemer.tasks.maths_questions import (
    Numeral,
    no_value,
    parse_numeral,
    parse_quantity,
    peeled,
    plain_words,
    split_unit,
    unit_fits,
)
from bessemer.tasks.referee import RefereeFault, ask, guard_sympy

MAX_CHARS = 300
"""Maximum length in characters of an answer that is read."""
MAX_CANONICAL = 200
MEASURED = ("unit", "tolerance")
"""Fields of a quantity: a unit that the answer may carry, and a relative tolerance."""
_STEP = re.compile("<<[^<>]*>>")
_LEVEL = re.compile("Level ([1-9])")
_HUGE = re.compile(r"[0-9]{61}|\^ ?\{? ?-?[0-9]{4}")
_LOWEST_TERMS = re.compile("simpl|lowest|reduce|common fraction|irreducible|最简|约分|化简", re.IGNORECASE)
_POWER = re.compile(r"[0-9)}] ?\^|power|exponent|次方|幂|乘方", re.IGNORECASE)
_TIME = re.compile("[0-9]{1,2}(?::[0-5][0-9]){1,2}")
_RATIO = re.compile(
    r"\bratios?\b|\bproportions?\b|比(?!赛)|\bscale\b|\bodds\b"
    r"|(?-i:(?![QA]: [AI] [a-z])\b(?:[A-Z]{1,2}|[a-z]) ?: ?(?:[A-Z]{1,2}|[a-z])\b)",
    re.IGNORECASE,
)
_INTERVAL = re.compile("interval|区间", re.IGNORECASE)
_BASE = re.compile(r"[0-9]+_ ?\{?(\w+)\}?")
_NAME = re.compile(
    r"(?:(?:\\[a-z]+ ?[A-Z]{1,3}|\\[a-z]+|[A-Za-z]|[A-Z]{2,3})(?:_\{?\w{1,4}\}?)?(?:\([A-Za-z0-9, ]{1,9}\))?"
    r"|\([A-Za-z](?:, ?[A-Za-z]){1,3}\)) ?=(?P<value>[^=]+)"
)
"""What an answer may be called: x, x_1, AB, f(2), (x, y), \\theta, \\angle A."""
_AND = re.compile(r"(?:\s*(?:\\[ ,;:]|\\text ?\{ ?(?:or|and|或|和) ?\}|\b(?:or|and)\b|或|和|,|;|\\quad))+")
_OF_WHAT = re.compile("^[A-Za-z]+(?: ?: ?[A-Za-z]+)+ ?= ?")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z](?:_\{?\w+\}?)?) *= *([^=]+)")
SIGNS = frozenset("αβγδεζηθλμπρστφχψωΓΔΘΛΞΠΣΦΨΩ∞√±×÷·−≤≥≠∈∪∩∅°²³⁴")
"""Non-ASCII characters that an expression may hold whatever the gold answer holds."""


class Maths(FileTask):
    domain = "maths"
    family = "jsonl"
    costly = True
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
        gold = peeled(final)
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
            split_unit(question.meta["gold"])[0]: where
            for where, question in reversed(questions)
            if not _plain(question.meta)
        }
        if golds and not _readable(list(golds)):
            for gold, where in golds.items():
                if not _readable([gold]):
                    fault = f"the answer {gold!r} is not a number, word or LaTeX expression with a value; fix the line"
                    raise UserError(f"{where}: {fault}, or use puzzle:PATH if an answer is text")

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        gold = problem.meta["gold"]
        if len(answer) > MAX_CHARS:
            return UNPARSABLE, None
        answer = peeled(answer)
        if not answer:
            return UNPARSABLE, None
        if not problem.meta.keys().isdisjoint(MEASURED):
            return _grade_quantity(problem.meta, answer)
        if (words := plain_words(gold)) is not None:
            given = plain_words(answer)
            return (CORRECT if given == words else WRONG_VALUE, given) if given is not None else (UNPARSABLE, None)
        (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
        number = parse_numeral(gold)
        reason, canonical = (
            _grade_expression(gold, answer, problem.prompt)
            if number is None
            else _grade_number(number, answer, problem.prompt)
        )
        if canonical is None or unit_fits(unit, gold_unit, problem.prompt):
            return reason, canonical
        return WRONG_VALUE, f"{canonical} {unit}"


class Gsm8k(Maths):
    family = "gsm8k"


def _grade_number(gold: Numeral, answer: str, question: str) -> tuple[str, str | None]:
    named = _NAME.fullmatch(answer)
    number = parse_numeral(named["value"].strip() if named else answer)
    if number is None:
        return UNPARSABLE, None
    if not number.finished and not _may_stay(number, answer, question):
        return UNFINISHED, number.canonical
    return CORRECT if number.value == gold.value else WRONG_VALUE, number.canonical


def _may_stay(number: Numeral, answer: str, question: str) -> bool:
    """Whether a power, or a fraction that is not in lowest terms, answers the question as it is."""
    asked = _POWER if number.power else _LOWEST_TERMS
    whole = number.value.denominator == 1
    return number.power == whole and not asked.search(question) and not _echoes(answer, question)


def _grade_quantity(meta: dict[str, Any], answer: str) -> tuple[str, str | None]:
    unit, tolerance = meta.get("unit", ""), Fraction(meta.get("tolerance", 0))
    value, gold = parse_quantity(answer, unit), parse_quantity(meta["gold"], unit)
    if value is None or gold is None:
        return UNPARSABLE, None
    return CORRECT if abs(value - gold) <= tolerance * abs(gold) else WRONG_VALUE, f"{float(value):.4g}"


def _grade_expression(gold: str, answer: str, prompt: str) -> tuple[str, str | None]:
    called = [match and _terms(match[0]) for match in map(_OF_WHAT.match, (gold, answer))]
    if called[0] and called[1] and called[0] != called[1]:
        return WRONG_VALUE, answer  # y : x is not x : y
    gold, answer = (_OF_WHAT.sub("", text.replace("\\:", " ")) for text in (gold, answer))
    ours, theirs = _assigned(gold), _assigned(answer)
    if ours.keys() != theirs.keys() and not any(re.match(r"(?:\\left ?)?\(", text) for text in (gold, answer)):
        ours, theirs = _one_name(ours), _one_name(theirs)
    if ours and theirs and ours.keys() != theirs.keys() and max(len(ours), len(theirs)) > 1:
        return WRONG_VALUE, answer
    if ours and (len(ours) == 1 or "=" not in answer):
        if len(ours) > 1 and answer.startswith("\\{"):
            return WRONG_VALUE, answer  # a set does not say which is which
        gold = _values(ours, prompt)
    if theirs and (len(theirs) == 1 or not ("=" in gold or gold.startswith("\\{") or _INTERVAL.search(prompt))):
        answer = _values(theirs, prompt)
    if "=" in answer and "=" not in gold:
        if (named := _NAME.fullmatch(answer)) is None:
            return UNPARSABLE, None  # of a chain of equations math-verify would take the last side
        answer = named["value"].strip()
    if "\n" in answer or "$" in answer or _HUGE.search(answer):
        return UNPARSABLE, None  # more than one expression, or a power that no answer has
    if not answer.isascii() and not SIGNS.union(gold).issuperset(c for c in answer if not c.isascii()):
        return UNPARSABLE, None
    bases = [_BASE.fullmatch(text) for text in (gold, answer)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return WRONG_VALUE, answer  # math-verify does not read them
    if _TIME.fullmatch(gold) and not _RATIO.search(prompt):
        plain = re.sub(" ?: ?", ":", answer)
        given = [int(part) for part in plain.split(":")] if _TIME.fullmatch(plain) else None
        return CORRECT if given == [int(part) for part in gold.split(":")] else WRONG_VALUE, answer
    try:
        if max(gold.count(":"), answer.count(":")) > 1:
            reason, canonical = _grade_ratio(gold.split(":"), answer.split(":"))
            copied = reason == CORRECT and _echoes(answer, prompt) and _bare(answer) != _bare(gold)
            return ECHO if copied else reason, canonical
        reply = _same(gold, answer)
    except RefereeFault as fault:
        return TIMEOUT if str(fault) == TIMEOUT else UNPARSABLE, None
    if reply["canonical"] is None:
        return UNPARSABLE, None
    if reply["same"] and _echoes(answer, prompt) and _bare(answer) != _bare(gold):
        return ECHO, reply["canonical"]
    return CORRECT if reply["same"] else WRONG_VALUE, reply["canonical"]


def _grade_ratio(gold: list[str], answer: list[str]) -> tuple[str, str | None]:
    """Term by term, and up to a factor if all are numbers. math-verify takes a : b : c for the fraction a / (b c)."""
    ours, theirs = ([parse_numeral(term.strip()) for term in side] for side in (gold, answer))
    values, given = ([term.value for term in side if term is not None] for side in (ours, theirs))
    if len(values) == len(gold) == len(given) == len(answer) and values[0] and given[0]:
        same = [value / values[0] for value in values] == [value / given[0] for value in given]
        return CORRECT if same else WRONG_VALUE, ":".join(str(value / given[0]) for value in given)
    same = len(gold) == len(answer) and all(_same(a, b)["same"] for a, b in zip(gold, answer, strict=True))
    return CORRECT if same else WRONG_VALUE, ":".join(term.strip() for term in answer)


def _assigned(text: str) -> dict[str, list[str]]:
    """{name: values} of `x = 1, y = 2` or `x = 1 or x = 2`; {} for any other text."""
    found, values = [_ASSIGNMENT.fullmatch(part) for part in _AND.split(text)], dict[str, list[str]]()
    if len(found) < 2 or not all(found):
        return {}
    for one in found:
        assert one is not None
        values.setdefault(one[1], []).append(one[2].strip())
    return values if len(values) in (1, len(found)) else {}


def _one_name(assigned: dict[str, list[str]]) -> dict[str, list[str]]:
    """`x_1 = 2, x_2 = 3` as the two values of x."""
    stems = {re.sub(r"_\{?[0-9]+\}?$", "", name) for name in assigned}
    if len(stems) != 1 or len(assigned) < 2:
        return assigned
    return {stems.pop(): [value for values in assigned.values() for value in values]}


def _values(assigned: dict[str, list[str]], prompt: str) -> str:
    """`2, 3` for `x = 2 or x = 3`; `(2, 3)` for `x = 2, y = 3`: math-verify would compare bare values with that as a
    set, in any order. The order is that of a tuple in the question, else of x, y, z, else as written."""
    if len(assigned) == 1:
        return ", ".join(next(iter(assigned.values())))
    plain = re.sub(r"\\left|\\right|\\[,;:! ]", "", prompt)
    tuples = ([part.strip() for part in one.split(",")] for one in re.findall(r"\(([^()]{1,40})\)", plain))
    natural = sorted(assigned) if assigned.keys() <= set("xyz") else list(assigned)
    order = next((names for names in tuples if sorted(names) == sorted(assigned)), natural)
    return f"({', '.join(assigned[name][0] for name in order)})"


def _terms(names: str) -> list[str]:
    """What a ratio is of, `AC : CB =`; a segment has the same length from either end."""
    parts = [part.strip(" =") for part in names.split(":")]
    return ["".join(sorted(part)) if part.isupper() else part for part in parts]


def _echoes(answer: str, prompt: str) -> bool:
    """Whether the question contains the answer, if that has more than two characters; braces and spaces are ignored."""
    return len(_bare(answer)) > 2 and _bare(answer) in _bare(prompt)


def _bare(text: str) -> str:
    return re.sub(r"\\left|\\right|\\[,;! ]|[{}\s]", "", text)


def _measured(record: dict[str, Any], gold: str) -> dict[str, Any]:
    """The fields of a quantity. ValueError if they do not fit each other."""
    found = {name: record[name] for name in MEASURED if record.get(name) is not None}
    unit, tolerance = found.get("unit", ""), found.get("tolerance", 0)
    if not isinstance(unit, str) or isinstance(tolerance, bool) or not isinstance(tolerance, int | float):
        raise ValueError("'unit' must be text and 'tolerance' a number")
    if not 0 <= tolerance <= 0.1:
        raise ValueError(f"the tolerance {tolerance} must be relative and at most 0.1")
    if found and parse_quantity(gold, unit) is None:
        raise ValueError(f"the answer {gold!r} is not a number, with or without the unit {unit!r}")
    return found


def _plain(meta: dict[str, Any]) -> bool:
    """Whether a gold answer needs no algebra."""
    gold = meta["gold"]
    if not meta.keys().isdisjoint(MEASURED) or plain_words(gold) is not None:
        return True
    bare = split_unit(gold)[0]
    return parse_numeral(bare) is not None or _TIME.fullmatch(bare) is not None


def _difficulty(record: dict[str, Any], answer: str) -> int:
    level = _LEVEL.fullmatch(str(record.get("level", "")))
    return int(level[1]) if level else min(len(_STEP.findall(answer)), 9)


def _readable(golds: list[str]) -> bool:
    try:
        return bool(ask("maths-read", golds=golds)["read"])
    except RefereeFault:
        return False


@lru_cache(maxsize=4096)
def _same(gold: str, answer: str) -> dict[str, Any]:
    return ask("maths-same", gold=gold, answer=answer)


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
    normal = library.parser.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = [library.LatexExtractionConfig(normalization_config=normal)]
    results = library.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return [expression for expression in results if not isinstance(expression, str)]


def prepare_library(request: dict[str, Any]) -> ModuleType:
    return _math_verify()


def judge_gold(library: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Whether every gold answer is an expression with a value."""
    return {"read": all(_valued(_parsed(library, gold)) for gold in request["golds"])}


def _valued(expressions: list[Any]) -> bool:
    from sympy import nan, zoo

    return bool(expressions) and not any(getattr(one, "has", lambda *_: False)(nan, zoo) for one in expressions)


def judge_same(library: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """{"same": verdict, "canonical": how sympy writes the answer}, or canonical None if it is not an expression."""
    answer = _parsed(library, request["answer"])
    if not answer:
        return {"same": False, "canonical": None}
    equal = library.verify(_parsed(library, request["gold"]), answer, timeout_seconds=None)
    return {"same": bool(equal), "canonical": str(answer[0])[:MAX_CANONICAL]}
