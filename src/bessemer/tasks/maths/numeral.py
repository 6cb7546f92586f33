"""Plain numbers as people write final answers: 42, -3.50, 1,234, 3/4, \\frac{3}{4}, $18, 75%.

This judges nearly all answers to GSM8K-like problems exactly and in microseconds. A currency or percent sign and a
degree sign are units here: they are read over. Digits are ASCII, and few enough that no number is a bomb.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 60
_DIGITS = "(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})"
_NUMERAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?:\\?\$|[£€¥])? ?(?:"
    rf"(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})"
    rf"|\\[dt]?frac ?\{{(?P<latex_top>-?{_DIGITS})\}} ?\{{(?P<latex_bottom>{_DIGITS})\}}"
    rf"|(?P<whole>{_DIGITS})(?:\.(?P<part>[0-9]{{0,15}}))?|\.(?P<only>[0-9]{{1,15}})"
    r") ?(?:\\?%|°|\^\\circ|\^\{\\circ\})?"
)


@dataclass(frozen=True)
class Numeral:
    value: Fraction
    finished: bool
    """Whether nothing is left to work out: 3/4 and 42, not 6/8 or 84/2."""

    @property
    def canonical(self) -> str:
        return str(self.value)


def read(text: str) -> Numeral | None:
    """None where the text is anything but one plain number."""
    match = _NUMERAL.fullmatch(text) if len(text) <= MAX_CHARS else None
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
