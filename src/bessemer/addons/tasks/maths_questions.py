"""The forms of an answer that need no algebra: numbers, quantities, clock times and words.

Plain numbers are read as people write them in final answers: 42, -3.50, 1,234, 3/4, \\frac{3}{4}, \\frac34, 2^{10},
1.2\\times 10^3. This judges nearly all answers to GSM8K-like problems exactly and in microseconds. Digits are ASCII,
and few enough that no number is expensive. Units are split off by units.py.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from bessemer.addons.tasks.units import CURRENCY, same_unit

_PEELS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\\(?:boxed|fbox) ?\{(?P<inner>.*)\}",
        r"\$\$(?P<inner>[^$]+)\$\$",
        r"\$(?P<inner>[^$]+)\$",
        r"\\\((?P<inner>.*)\\\)",
        r"\\\[(?P<inner>.*)\\\]",
        r"\\(?:mathbf|boldsymbol|bm|textbf|text|mathrm|mbox) ?\{(?P<inner>[^{}]*[0-9][^{}]*)\}",
        r"\*\*(?P<inner>[^*]+)\*\*",
        r"(?:\\displaystyle(?![a-z])|\\[,;:!]|\\quad|~)(?P<inner>.+)",
        r"(?P<inner>.+?)(?:\\[,;:!]|\\quad|~)",
    )
)
_BRACES = (re.compile(r"\{(?P<inner>.*)\}", re.DOTALL),)
_WORDS = re.compile(
    r"(?:\\(?:text|mbox|textbf|mathrm) ?\{(?P<inner>[A-Za-z][A-Za-z ,.'’-]*)\}"
    r"|(?P<bare>(?!(?:sin|cos|tan|log|ln|exp|sqrt|pi)\b)(?=.*[A-Za-z]{3})[A-Za-z]{2,}(?:[ -][A-Za-z]{2,}){0,7}"
    r"|[\u4e00-\u9fff]{1,20}))\.?"
)
_LEAD = re.compile(
    r"(?:it|they|he|she|this|that|the answer|the function|the number|the series)?\b ?(?:(?:is|are"
    r"|was)\b (?!not\b)|on )(?:on )?",
    re.IGNORECASE,
)
MAX_NUMERAL = 400
MAX_POWER = 1000
"""Maximum bits of a power."""
NO_VALUE = frozenset(("nan", "not a number", "inf", "infinity", "n/a", "#n/a", "not available", "not applicable"))
"""What programs write if there is no value: not an answer, though every echo of it would be right."""
_DIGITS = "(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMERAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?:"
    rf"(?:(?P<plain_ones>[0-9]{{1,9}}) (?=[0-9]{{1,3}}/))?(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})"
    rf"|(?P<ones>[0-9]{{1,9}})? ?\\[dtc]?frac ?(?:\{{(?P<latex_top>-?{_DIGITS})\}}|(?P<bare_top>[0-9])) ?"
    rf"(?:\{{(?P<latex_bottom>-?{_DIGITS})\}}|(?P<bare_bottom>[0-9]))"
    r"|(?P<digits>[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15}) ?"
    r"(?:[eE]|(?:\\times|\\cdot|[×·*]) ?10 ?\^ ?(?P<brace>\{)?)(?P<power>[+-]?[0-9]{1,2})(?(brace)\}|)"
    rf"|(?P<base>{_DIGITS}) ?\^ ?(?:\{{(?P<exponent>-?[0-9]{{1,4}})\}}|(?P<bare_exponent>[0-9]{{1,4}}))"
    r"|(?P<lead>[0-9]{0,15})\.(?P<fixed>[0-9]{0,15})\\overline ?\{(?P<cycle>[0-9]{1,15})\}"
    rf"|(?P<whole>{_DIGITS})(?:\.(?P<part>[0-9]*))?|\.(?P<only>[0-9]+)"
    r")"
)
_HALF = re.compile("(?:上午|下午|早上|晚上|中午|凌晨|傍晚) *")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-5][0-9])(?::([0-5][0-9]))?\s*(?:([ap])\.? ?m\.?)?", re.IGNORECASE)


_SPACES = re.compile(r"(?:\\[ ,;:!]|\s)*")
_SPACES_BACKWARDS = re.compile(r"(?:[ ,;:!]\\(?!\\)|\s)*")
"""White space before an answer, LaTeX's too, and after it, read from the end: a search for the last run would take the
square of the length."""


def _stripped(text: str) -> str:
    start, end = _SPACES.match(text), _SPACES_BACKWARDS.match(text[::-1])
    assert start and end, "both match nothing at least"
    return text[start.end() : max(start.end(), len(text) - end.end())]


def peeled(text: str, braces: bool = False) -> str:
    """An answer without the white space, math delimiters, \\boxed, bold type, full stop and `braces` around it."""
    while True:
        text = _stripped(text).strip(" \r\n\t").removesuffix(".").removesuffix("。")
        match = next((m for pattern in (*_PEELS, *_BRACES[:braces]) if (m := pattern.fullmatch(text))), None)
        if match is None or not _balanced(match["inner"]):
            return text.strip(" \r\n\t")
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
    if match is None:
        return None
    words = " ".join((match["inner"] or match["bare"]).lower().replace("’", "'").split()).strip(" .,")
    return _LEAD.sub("", words, count=1) if _LEAD.match(words) else words


@dataclass(frozen=True)
class Numeral:
    value: Fraction
    finished: bool
    """Whether nothing is left to work out: 3/4 and 42, not 6/8, 84/2 or 2^10."""
    style: str = "decimal"
    """How it is written: decimal (integers too), fraction, mixed, scientific or power."""
    places: int = 0
    """Digits after the point of a decimal."""

    @property
    def canonical(self) -> str:
        return str(self.value)


def _plainly(text: str) -> str:
    """The text without the spaces and signs that LaTeX puts into numbers: 1{,}234 and 1,\\! 234 are 1,234."""
    text = re.sub(r"\\!\s*", "", text.replace("{,}", ",").replace("\u2212", "-"))
    text = re.sub(r"(?<=[0-9])(?:\\[, ]|~)(?=[0-9]{3})", ",", text)
    return text.replace(" ", ",") if re.fullmatch("[+-]?[0-9]{1,3}(?: [0-9]{3})+", text) else text


def parse_numeral(text: str) -> Numeral | None:
    """The number in a text; None if the text is anything but one plain number."""
    return _numeral(_NUMERAL.fullmatch(_plainly(text))) if len(text) <= MAX_NUMERAL else None


def _numeral(match: re.Match[str] | None) -> Numeral | None:
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    top = match["top"] or match["latex_top"] or match["bare_top"]
    if top is not None:
        bottom = match["bottom"] or match["latex_bottom"] or match["bare_bottom"]
        numerator, denominator = int(top.replace(",", "")), int(bottom.replace(",", ""))
        if denominator == 0:
            return None
        value = sign * Fraction(numerator, denominator)
        finished = value.denominator == abs(denominator) > 1
        if ones := match["ones"] or match["plain_ones"]:
            if not 0 < numerator < denominator:
                return None
            return Numeral(value + sign * int(ones), finished, "mixed")
        return Numeral(value, finished, "fraction")
    if match["cycle"]:
        before = f"{match['lead']}{match['fixed']}"
        unit = 10 ** len(match["fixed"]) * (10 ** len(match["cycle"]) - 1)
        return Numeral(sign * Fraction(int(before + match["cycle"]) - int(before or "0"), unit), True)
    if match["digits"]:
        return Numeral(sign * Fraction(f"{match['digits']}e{match['power']}"), True, "scientific")
    if match["base"]:
        base, exponent = int(match["base"].replace(",", "")), int(match["exponent"] or match["bare_exponent"])
        if not base or -1 < exponent < 2 or base.bit_length() * abs(exponent) > MAX_POWER:
            return None
        return Numeral(sign * Fraction(base) ** exponent, False, "power")
    part = match["part"] or match["only"] or ""
    return Numeral(sign * Fraction(f"{(match['whole'] or '0').replace(',', '')}.{part or '0'}"), True, places=len(part))


@dataclass(frozen=True)
class Clock:
    """A time of day; `half` is "a", "p" or "" if it is not said."""

    parts: tuple[int, ...]
    half: str

    def agrees(self, other: "Clock", question: str) -> bool:
        """Whether an answer is this time. It may leave out the half of the day, or count to 24. A half that only the
        answer states must not contradict a question that names the other half alone."""
        if self.half == other.half:
            return self.parts == other.parts
        halved, full = (self, other) if self.half else (other, self)
        if halved.half and full.half:
            return False
        in_24 = (halved.parts[0] % 12 + 12 * (halved.half == "p"), *halved.parts[1:])
        named = set(re.findall(r"[0-9] ?([ap])\.? ?m\b", question.lower()))
        fits = full is other or named != {"a", "p"} - {halved.half}
        return (full.parts == in_24 != halved.parts) or (full.parts == halved.parts and fits)


def parse_clock(text: str) -> Clock | None:
    plain = re.sub(r"\\(?:text|mathrm|mbox) ?|\\[,;:! ]|\\!|[{}~]", " ", text)
    plain = re.sub(r" *[:：时点] *", ":", re.sub(r"分 *$", "", " ".join(plain.split())))
    half = _HALF.match(plain)
    match = _CLOCK.fullmatch(plain[half.end() :] if half else plain)
    if match is None:
        return None
    half_name = (match[4] or "").lower() or ({"上": "a", "早": "a", "凌": "a"}.get(half[0][0], "p") if half else "")
    return Clock(tuple(int(part) for part in match.groups()[:3] if part), half_name)


def parse_quantity(text: str, unit: str) -> Fraction | None:
    """A number, also in scientific notation, alone or with `unit`; None for anything else.

    The unit may be in \\text or \\mathrm; it is not converted.
    """
    if len(text) > MAX_NUMERAL:
        return None
    text = re.sub(r"^\$([^$]+)\$", r"\1", _plainly(text))  # a number between dollars, before its unit
    before = CURRENCY.match(text)
    if before:
        text = before[1] + text[before.end() :]
    match = _NUMERAL.match(text)
    number = _numeral(match)
    if match is None or number is None or not number.finished:
        return None
    given = (before[2] if before else "") + text[match.end() :]
    return number.value if not given.strip() or same_unit(given, unit) else None


def no_value(text: str, *more: str) -> bool:
    """Whether a gold answer is what programs write if they have no value: NO_VALUE, or one of `more`."""
    words = _WORDS.fullmatch(text.strip())
    plain = words["inner"] or words["bare"] if words else re.sub(r"\\(?:text|mbox|mathrm) ?\{(.*)\}", r"\1", text)
    return " ".join(plain.lower().split()).lstrip("+-").strip(" .") in NO_VALUE.union(more)
