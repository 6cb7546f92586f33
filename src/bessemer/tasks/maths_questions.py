"""The forms of an answer that need no algebra: numbers, quantities and words.

Plain numbers are read as people write them in final answers: 42, -3.50, 1,234, 3/4, \\frac{3}{4}, $18, 75%. They judge
nearly all answers to GSM8K-like problems exactly and in microseconds. A currency, percent or degree sign is a unit and
ignored. Digits are ASCII, and few enough that no number is expensive.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

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
    r") ?(?P<mark>\\?%|°|\^\\circ|\^\{\\circ\})?"
)


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


_SCIENTIFIC = re.compile(
    r"(?P<digits>[+-]?(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})) ?"
    r"(?:[eE]|(?:\\times|\\cdot|[×·*]) ?10 ?\^ ?\{?)(?P<power>[+-]?[0-9]{1,2})\}?"
)
_UNIT_DRESS = re.compile(r"\\(?:text|mathrm|rm|cdot|[,;! ])|[{}\s~$·*]")


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


def parse_quantity(text: str, unit: str) -> Fraction | None:
    """A number, also in scientific notation, alone or before `unit`; None for anything else.

    The unit may stand in \\text or \\mathrm; it is not converted.
    """
    if len(text) > 2 * MAX_NUMERAL:
        return None
    value, rests = None, [text]
    if match := _SCIENTIFIC.match(text):
        value, rests = Fraction(f"{match['digits']}e{match['power']}"), [text[match.end() :]]
    elif match := _NUMERAL.match(text):
        number = parse_numeral(match[0])
        value = number.value if number and number.finished else None
        rests = [text[match.end() :], (match["mark"] or "") + text[match.end() :]]  # of °C the sign is half
    accepted = {"", _UNIT_DRESS.sub("", unit)}
    return value if any(_UNIT_DRESS.sub("", rest) in accepted for rest in rests) else None
