"""Judges one answer to a mathematics problem: units, names and equations are taken off, then the value is compared."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from bessemer.addons.tasks.forms import asked
from bessemer.addons.tasks.maths_questions import Numeral, parse_clock, parse_numeral
from bessemer.addons.tasks.maths_writing import (
    assigned,
    bare,
    is_name,
    misnamed,
    named,
    paired,
    pieces,
    plainer,
    sides,
    unnamed,
    unworded,
)
from bessemer.addons.tasks.referee import ask
from bessemer.addons.tasks.units import split_unit, unit_of
from bessemer.addons.tasks.units_asked import asks_a_share, unit_fits
from bessemer.tasks.base import CORRECT, UNPARSABLE, WRONG_VALUE

UNFINISHED, ECHO = "unfinished", "echo"
Judged = tuple[str, str | None]
"""A reason code and the canonical form of the answer; None if it could not be read."""
_HUGE = re.compile(r"[0-9]{61}|\^ ?\{? ?-?[0-9]{4}")
_POWER = re.compile(r"[0-9)}] ?\^|power|exponent|次方|幂|乘方", re.IGNORECASE)
_STYLES = {
    "fraction": re.compile(
        r"(?:as|in|into|to) (?:an? )?(?:\w+ )?fractions?\b|common fraction|fraction form|分数", re.IGNORECASE
    ),
    "decimal": re.compile(
        r"(?:as|in|into|to) (?:an? )?(?:\w+ )?decimals?\b(?! place)|decimal form|用小数|为小数", re.IGNORECASE
    ),
    "mixed": re.compile(r"mixed (?:number|fraction|numeral)|带分数", re.IGNORECASE),
    "scientific": re.compile(r"scientific notation|standard form|科学记数法|科学计数法", re.IGNORECASE),
}
"""How a question asks a number to be written."""
_ROUGH = re.compile(
    r"nearest|(?:as|in|into|to) (?:an? )?(?:\w+ )?decimals?\b|decimal (?:place|form|approx|answer)|significant|\bround"
    r"|approximat|estimate|\\approx|≈|用小数|精确到|保留|近似|大约",
    re.IGNORECASE,
)
_PLACES = re.compile(
    r"nearest (?P<named>tenth|hundredth|thousandth|integer|whole|cent|degree|unit|dollar|meter|mile|minute|hour|year)"
    r"|(?P<count>\d|one|two|three|four|five|six) (?:decimal|places|d\.p)|保留(?P<zh>[0-9一二两三四])位小数|nearest"
    r"|significant|精确到",
    re.IGNORECASE,
)
_PLACE = {"tenth": 1, "hundredth": 2, "thousandth": 3, "cent": 2, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5,
          "six": 6, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4}  # fmt: skip
LEAST_DIGITS = 3
"""Digits that an approximation must have if the question does not say how many."""
_RATIO = re.compile(
    r"\bratios?\b|\bproportions?\b|比(?!赛)|\bscale\b|\bodds\b"
    r"|(?-i:(?![QA]: [AI] [a-z])\b(?:[A-Z]{1,2}|[a-z]) ?: ?(?:[A-Z]{1,2}|[a-z])\b)",
    re.IGNORECASE,
)
_IN_INTERVALS = re.compile(r"interval notation|(?:as|of) an? (?:union of )?intervals?\b|用区间|区间表示", re.IGNORECASE)
_BASE = re.compile(r"[0-9]+_ ?\{?(\w+)\}?")
_LOG = re.compile(r"\\log(?![_a-z]| ?_)")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|log|ln|lg|int|sum|prod|lim|binom|det|gcd)(?![a-z])|!")
_NO_SHARE = re.compile(r"^(?!.*percent).*(?:fraction|decimal|分数|小数)", re.IGNORECASE | re.DOTALL)
_OF_WHAT = re.compile("^[A-Za-z]+(?: ?: ?[A-Za-z]+)+ ?= ?")
SIGNS = frozenset("αβγδεζηθλμπρστφχψωΓΔΘΛΞΠΣΦΨΩ")
"""Non-ASCII characters that an expression may hold whatever the gold answer holds."""
_PERCENT, _DEGREE = (("%", 1),), (("°", 1),)


def judge(gold: str, answer: str, question: str) -> Judged:
    """The verdict on an answer from which wrapping is peeled. Raises RefereeFault."""
    ratio = _RATIO.search(question) is not None
    if (time := parse_clock(gold)) is not None and not ratio:
        answer_time = parse_clock(answer)
        return CORRECT if answer_time and time.agrees(answer_time, question) else WRONG_VALUE, answer
    answer = unworded(answer, question, ratio)
    gold, gold_unit = split_unit(gold)
    *names, last = sides(plainer(gold))
    number = parse_numeral(last) if all(map(is_name, names)) else None
    if number and names:
        called, gold = sides(plainer(answer))[:-1], last
        if called and is_name(called[0]) and bare(called[0]) != bare(names[0]):
            return WRONG_VALUE, answer
    exact, sign, decimal = re.sub(r"\\simeq|≈|≐", r"\\approx", answer).partition("\\approx")
    if sign and (not is_name(exact) or exact.strip() in ("\\pi", "e")):
        return _rounded(gold, exact, decimal, question)
    answer = (f"{exact}={decimal}" if sign else answer).strip()
    if misnamed(plainer(answer), question):
        return WRONG_VALUE, answer
    steps: list[str] = []
    if "=" in answer and "=" not in gold and not assigned(plainer(answer)) and not _OF_WHAT.match(answer):
        answer, steps = named(answer, question)
        if number and parse_numeral(split_unit(answer)[0]) is None and steps:  # 42 = 6 * 7
            answer, steps = steps[0], [*steps[1:], answer]
        if not answer:
            return UNPARSABLE, None
    value, unit = split_unit(answer, letters=number is not None)
    reason, canonical = _number(number, value, question) if number else _expression(gold, value, question)
    if canonical is not None and not unit_fits(unit, gold_unit, question):
        reason, canonical = WRONG_VALUE, f"{canonical} {unit}"
    if reason != CORRECT and _converted(number, gold, gold_unit, value, unit, question):
        reason = CORRECT
    if reason == CORRECT and steps:
        plain = tuple(split_unit(plainer(step))[0] for step in steps)
        return (CORRECT, canonical) if _same(gold, value, plain)["same"] else (UNPARSABLE, None)
    return reason, canonical


def _converted(number: Numeral | None, gold: str, gold_unit: str, value: str, unit: str, question: str) -> bool:
    """Whether an answer is a percentage equal to a plain gold answer, degrees equal to radians, or a fraction equal to
    a percentage; not if the question asks for the other."""
    answered_unit, expected_unit = (unit_of(text) if text else None for text in (unit, gold_unit))
    numeral = parse_numeral(value)
    if numeral is None:
        return False
    if (
        number
        and answered_unit == _PERCENT
        and not gold_unit
        and asks_a_share(question)
        and not _NO_SHARE.search(question)
    ):
        return number.value == numeral.value / 100
    if number and expected_unit == _PERCENT and not unit and not re.search("percent|%|百分", question, re.IGNORECASE):
        return number.value == numeral.value * 100
    if answered_unit == _DEGREE and "\\pi" in gold and not re.search("radian|弧度", question, re.IGNORECASE):
        top, bottom = numeral.value.numerator, numeral.value.denominator
        return _same(gold, f"\\frac{{{top}\\pi}}{{{180 * bottom}}}")["same"]
    return False


def _rounded(gold: str, exact: str, decimal: str, question: str) -> Judged:
    """`exact \\approx decimal`: one of the two is the answer, and they agree."""
    if not exact.strip():
        return judge(gold, decimal.strip(), question)
    last = sides(exact)[-1]
    numeral = parse_numeral(split_unit(decimal.strip(), letters=True)[0])
    if numeral is None or not _near(plainer(split_unit(last, letters=True)[0]), numeral):
        return UNPARSABLE, None
    verdicts = [judge(gold, side.strip(), question) for side in (exact, decimal)]
    return next((verdict for verdict in verdicts if verdict[0] == CORRECT), verdicts[0])


def _near(exact: str, numeral: Numeral) -> bool:
    """Whether a number rounds to a decimal."""
    return bool(ask("maths-near", exact=exact, decimal=str(numeral.value), places=numeral.places)["near"])


def _number(gold: Numeral, answer: str, question: str) -> Judged:
    number = parse_numeral(answer)
    if number is None:
        return UNPARSABLE, None
    if number.value != gold.value:
        return CORRECT if _approximates(gold, number, question) else WRONG_VALUE, number.canonical
    if not number.finished and not _may_stay(number, answer, question):
        return UNFINISHED, number.canonical
    is_integer = gold.value.denominator == 1
    asks = [style for style, pattern in _STYLES.items() if pattern.search(question)]
    if gold.style in asks and number.style != gold.style and (not is_integer or gold.style == "scientific"):
        return UNFINISHED, number.canonical
    return CORRECT, number.canonical


def _approximates(gold: Numeral, number: Numeral, question: str) -> bool:
    """Whether one of two numbers is the other, rounded as the question allows."""
    if gold.style == "decimal" and gold.places:  # rounded itself; the question may leave open how far
        open_ended = _ROUGH.search(question) and not _PLACES.search(question)
        return bool(open_ended) and number.places > gold.places and _rounds(number.value, gold)
    return _takes(question, number) and _rounds(gold.value, number)


def _rounds(value: Fraction, numeral: Numeral) -> bool:
    return abs(value - numeral.value) * 2 * 10**numeral.places <= 1


def _takes(question: str, number: Numeral) -> bool:
    """Whether the question takes this decimal for an exact value."""
    if number.style != "decimal" or not number.places or not _ROUGH.search(question):
        return False
    places = _PLACES.search(question)
    if places is None:
        return number.places >= LEAST_DIGITS or number.value * 10**number.places >= 10 ** (LEAST_DIGITS - 1)
    named_places = places["named"] or places["count"] or places["zh"]
    if named_places is None:
        return False
    n_places = named_places.lower()
    return number.places == (int(n_places) if n_places.isdigit() else _PLACE.get(n_places, 0))


def _may_stay(number: Numeral, answer: str, question: str) -> bool:
    """Whether a power, or a fraction that is not in lowest terms, answers the question as it is."""
    if number.style == "power":
        return not _POWER.search(question)
    return number.value.denominator > 1 and "simplify" not in asked(question) and not _echoes(answer, question)


def _expression(gold: str, answer: str, question: str) -> Judged:
    written = plainer(answer)
    gold, answer = unnamed(plainer(gold), written)
    called = [match and _terms(match[0]) for match in map(_OF_WHAT.match, (gold, answer))]
    if called[0] and called[1] and called[0] != called[1]:
        return WRONG_VALUE, answer  # y : x is not x : y
    gold, answer = (_OF_WHAT.sub("", text.replace("\\:", " ")) for text in (gold, answer))
    gold, answer = paired(gold, answer, question)
    if not answer or (gold[0] + answer[0] in ("([", "[(") and gold[-1] + answer[-1] in (")]", "])")):
        return WRONG_VALUE, written
    if "=" in answer and "=" not in gold:
        answer, steps = named(answer, question)
        if steps or not answer:
            return UNPARSABLE, None
    if "\n" in answer or "$" in answer or (_HUGE.search(answer) and not _HUGE.search(gold)):
        return UNPARSABLE, None  # more than one expression, or a power that no answer has
    if not answer.isascii() and not SIGNS.union(gold).issuperset(c for c in answer if not c.isascii()):
        return UNPARSABLE, None
    bases = [_BASE.fullmatch(text) for text in (gold, answer)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return WRONG_VALUE, answer  # the parser does not read them
    copied = _echoes(answer, question) and bare(answer) != bare(gold)
    if max(gold.count(":"), answer.count(":")) > 1:
        reason, canonical = _ratio(gold.split(":"), answer.split(":"))
        return ECHO if copied and reason == CORRECT else reason, canonical
    if _IN_INTERVALS.search(question) and re.match(r"[\[(\\]", gold) and re.search(r"<|>|\\[lg]eq?(?![a-z])", answer):
        return UNFINISHED, answer
    numeral = parse_numeral(answer)
    if numeral and _takes(question, numeral) and _near(gold, numeral):
        return CORRECT, numeral.canonical
    forms = asked(question)
    reply = _same(gold, answer, forms=forms, pieces=pieces(question))
    if reply["canonical"] is None or not reply["same"]:
        return UNPARSABLE if reply["canonical"] is None else WRONG_VALUE, reply["canonical"]
    copied = copied or reply["echo"]
    if reply["echo"] or (copied and not forms):
        return ECHO, reply["canonical"]
    worked_out = not _FUNCTION.search(answer) or _FUNCTION.search(gold) or not _FUNCTION.search(question)
    if not reply["kept"] or not worked_out:
        return ECHO if copied else UNFINISHED, reply["canonical"]
    return CORRECT, reply["canonical"]


def _ratio(gold: list[str], answer: list[str]) -> tuple[str, str | None]:
    """Term by term, and up to a factor if all are numbers. math-verify takes a : b : c for the fraction a / (b c)."""
    gold_terms, answer_terms = ([parse_numeral(term.strip()) for term in side] for side in (gold, answer))
    values, answer_values = ([term.value for term in side if term is not None] for side in (gold_terms, answer_terms))
    if len(values) == len(gold) == len(answer_values) == len(answer) and values[0] and answer_values[0]:
        is_same = [value / values[0] for value in values] == [value / answer_values[0] for value in answer_values]
        return CORRECT if is_same else WRONG_VALUE, ":".join(str(value / answer_values[0]) for value in answer_values)
    is_same = len(gold) == len(answer) and all(_same(a, b)["same"] for a, b in zip(gold, answer, strict=True))
    return CORRECT if is_same else WRONG_VALUE, ":".join(term.strip() for term in answer)


def _terms(names: str) -> list[str]:
    """What a ratio is of, `AC : CB =`; a segment has the same length from either end."""
    parts = [part.strip(" =") for part in names.split(":")]
    return ["".join(sorted(part)) if part.isupper() else part for part in parts]


def _echoes(answer: str, question: str) -> bool:
    """Whether the question contains the answer, if that has more than two characters; braces and spaces are ignored."""
    return len(bare(answer)) > 2 and bare(answer) in bare(question)


@lru_cache(maxsize=4096)
def _same(
    gold: str, answer: str, sides: tuple[str, ...] = (), forms: tuple[str, ...] = (), pieces: tuple[str, ...] = ()
) -> dict[str, Any]:
    """equality.judge_same. A bare `\\log` is natural if the gold answer writes `\\ln`."""
    if "\\ln" in gold and not _LOG.search(gold):
        answer = _LOG.sub(r"\\ln", answer)
    return ask("maths-same", gold=gold, answer=answer, sides=sides, forms=forms, pieces=pieces)
