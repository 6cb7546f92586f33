"""The forms of an answer that need no algebra: numbers, quantities and words.

Plain numbers are read as people write them in final answers: 42, -3.50, 1,234, 3/4, \\frac{3}{4}, \\frac34, 2^{10},
1.2\\times 10^3. This judges nearly all answers to GSM8K-like problems exactly and in microseconds. Digits are ASCII,
and few enough that no number is expensive.

A unit after an answer (a percent or degree sign, \\text{...}, one of BARE) or a currency sign on either side is split
off and compared: it must be that of the gold answer or, if that has none, one that the question names. It may be left
out.
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
MAX_NUMERAL = 400
MAX_POWER = 1000
"""Maximum bits of a power."""
NO_VALUE = frozenset(("nan", "not a number", "inf", "infinity", "n/a", "#n/a", "not available", "not applicable"))
"""What programs write if there is no value: not an answer, though every echo of it would be right."""
_DIGITS = "(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMERAL = re.compile(
    rf"(?P<sign>[+-]?) ?(?:"
    rf"(?P<top>{_DIGITS}) ?/ ?(?P<bottom>{_DIGITS})"
    rf"|(?P<ones>[0-9]{{1,9}})? ?\\[dt]?frac ?(?:\{{(?P<latex_top>-?{_DIGITS})\}}|(?P<bare_top>[0-9])) ?"
    rf"(?:\{{(?P<latex_bottom>{_DIGITS})\}}|(?P<bare_bottom>[0-9]))"
    r"|(?P<digits>[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15}) ?"
    r"(?:[eE]|(?:\\times|\\cdot|[×·*]) ?10 ?\^ ?(?P<brace>\{)?)(?P<power>[+-]?[0-9]{1,2})(?(brace)\}|)"
    rf"|(?P<base>{_DIGITS}) ?\^ ?(?:\{{(?P<exponent>[0-9]{{1,4}})\}}|(?P<bare_exponent>[0-9]{{1,4}}))"
    r"|(?P<lead>[0-9]{0,15})\.(?P<fixed>[0-9]{0,15})\\overline ?\{(?P<cycle>[0-9]{1,15})\}"
    rf"|(?P<whole>{_DIGITS})(?:\.(?P<part>[0-9]*))?|\.(?P<only>[0-9]+)"
    r")"
)
BARE = (
    "mm|cm|dm|km|kg|mg|ml|inch|inches|feet|foot|ft|miles?|yards?|meters?|metres?|liters?|litres?|grams?|hours?|minutes?"
    "|seconds?|days?|weeks?|months?|years?|degrees?|percent|dollars?|cents?|euros?|units?|mph|points?|people|apples?|students?"
)
"""Units that are recognised without \\text; other letters count as a product of variables."""
_BLOCK = r"\\(?:text|mbox|mathrm|textrm|textnormal|rm) ?\{[^{}$]*\}(?: ?\^ ?(?:\{-?[0-9]\}|[0-9]))?"
_CURRENCY = re.compile(r"([+-]?) ?(\\?\$|[£€¥]) ?(?=[0-9.+-])")
_TAIL = re.compile(
    r"(?: ?(?:\\?%|\\?\$|[£€¥]|(?:°|\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree) ?[CF]?)"
    rf"|(?:(?:\\[,;:! ]|~|\s|/|\\cdot)*{_BLOCK})+"
    rf"|(?:(?<=[0-9}}])|\s)\s*(?:(?:square|cubic|sq\.?) )?(?:{BARE})"
    r"(?: ?\^ ?(?:\{[23]\}|[23])|[²³])?|(?<=[0-9}])\s*[\u4e00-\u9fff]{1,4})$"
)
_UNFINISHED = re.compile(r"(?:[=<>+*/^_,(|-]|\\(?:in|le|ge|leq|geq|neq|ne|cup|cap|to|times|cdot|pm|mp|approx|sim)) *$")
_SAME_UNIT = {"percent": "%", "percentage": "%", "degree": "°", "dollar": "$", "euro": "€"}
_SPELLED = {
    "mm": "millimeter", "cm": "centimeter", "km": "kilometer", "millimetre": "millimeter", "centimetre": "centimeter",
    "metre": "meter", "kilometre": "kilometer", "feet": "foot", "ft": "foot", "inche": "inch", "yd": "yard",
    "mg": "milligram", "kg": "kilogram", "lb": "pound", "lbs": "pound", "oz": "ounce", "ml": "milliliter",
    "litre": "liter", "hr": "hour", "hrs": "hour", "min": "minute", "sec": "second", "mph": "mile/hour",
    "kph": "kilometer/hour",
}  # fmt: skip
_LETTERS = {"m": "meter", "g": "gram", "l": "liter", "L": "liter", "h": "hour", "s": "second", "in": "inch"}
"""Single letters; and a word that means something else in a question, unless it follows a number or a stroke."""
_NAMED = {
    "%": "%|percent|百分",
    "°": r"°|\\circ|degree|angle|度|角",
    "$": r"\\\$|\$ ?[0-9]|dollar|(?<![a-z])cents?(?![a-z])|USD|元",
    "€": "€|euro|欧元",
    "£": "£|pound|镑",
    "¥": "¥|yuan|yen|元",
}


def peeled(text: str) -> str:
    """An answer without the white space, math delimiters, \\boxed and full stop around it."""
    while True:
        text = text.strip(" \r\n\t").removesuffix(".").removesuffix("。")
        match = next((m for pattern in _PEELS if (m := pattern.fullmatch(text))), None)
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
    return " ".join((match["inner"] or match["bare"]).lower().split()) if match else None


@dataclass(frozen=True)
class Numeral:
    value: Fraction
    finished: bool
    """Whether nothing is left to work out: 3/4 and 42, not 6/8, 84/2 or 2^10."""
    power: bool = False

    @property
    def canonical(self) -> str:
        return str(self.value)


def _plainly(text: str) -> str:
    """The text without the spaces and signs that LaTeX puts into numbers: 1{,}234 and 1,\\!234 are 1,234."""
    text = text.replace("{,}", ",").replace("\\!", "").replace("\u2212", "-")
    return re.sub(r"(?<=[0-9])\\,(?=[0-9]{3})", ",", text)


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
        finished = value.denominator == denominator > 1
        if match["ones"]:  # a mixed number
            if not 0 < numerator < denominator:
                return None
            value += sign * int(match["ones"])
        return Numeral(value, finished)
    if match["cycle"]:
        before = f"{match['lead']}{match['fixed']}"
        unit = 10 ** len(match["fixed"]) * (10 ** len(match["cycle"]) - 1)
        return Numeral(sign * Fraction(int(before + match["cycle"]) - int(before or "0"), unit), True)
    if match["digits"]:
        return Numeral(sign * Fraction(f"{match['digits']}e{match['power']}"), True)
    if match["base"]:
        base, exponent = int(match["base"].replace(",", "")), int(match["exponent"] or match["bare_exponent"])
        if exponent < 2 or base.bit_length() * exponent > MAX_POWER:
            return None
        return Numeral(Fraction(sign * base**exponent), False, True)
    plain = f"{(match['whole'] or '0').replace(',', '')}.{match['part'] or match['only'] or '0'}"
    return Numeral(sign * Fraction(plain), True)


def parse_quantity(text: str, unit: str) -> Fraction | None:
    """A number, also in scientific notation, alone or with `unit`; None for anything else.

    The unit may be in \\text or \\mathrm; it is not converted.
    """
    if len(text) > MAX_NUMERAL:
        return None
    text = re.sub(r"^\$([^$]+)\$", r"\1", _plainly(text))  # a number between dollars, before its unit
    before = _CURRENCY.match(text)
    if before:
        text = before[1] + text[before.end() :]
    match = _NUMERAL.match(text)
    number = _numeral(match)
    if match is None or number is None or not number.finished:
        return None
    given = unit_form((before[2] if before else "") + text[match.end() :])
    return number.value if given in ("", unit_form(unit)) else None


def split_unit(text: str) -> tuple[str, str]:
    """An answer without its unit, and the unit in the form in which units are compared; "" for none."""
    if before := _CURRENCY.match(text):
        return before[1] + text[before.end() :], unit_form(before[2])
    tail = _TAIL.search(text)
    if not tail or not tail.start() or _UNFINISHED.search(text[: tail.start()]):
        return text, ""
    return text[: tail.start()].strip(), unit_form(tail[0])


def unit_form(unit: str) -> str:
    """The form to compare. cm^2 and \\text{ cm}^2, degrees and ^\\circ have one form; m s and ms have two."""
    unit = re.sub(r"\\(?:text|mbox|mathrm|textrm|textnormal|rm)(?![a-zA-Z])", " ", unit)
    unit = re.sub(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree", "°", unit).replace("²", "^2").replace("³", "^3")
    unit = re.sub(r"\\cdot|\\[,;:! ]|[\s~·*]+", "·", re.sub(r"\\([%$])", r"\1", unit))
    unit = re.sub(r"·*([/^()°])·*", r"\1", re.sub("[{}]|··+", lambda m: "·" if m[0][0] == "·" else "", unit))
    unit = re.sub("[A-Za-z]+", lambda word: _LETTERS.get(word[0], _spelled(word[0])), unit.strip("·.").replace(".", ""))
    unit = _powers(unit, "·")
    return _SAME_UNIT.get(unit, unit)


def _spelled(word: str) -> str:
    """A unit's name, in the singular, for its name or abbreviation; other words as they are, in lower case."""
    name = word.lower().removesuffix("s") if len(word) > 3 else word
    return _SPELLED.get(name if len(word) > 3 else word.lower(), name)


def _powers(text: str, space: str) -> str:
    """`centimeter^2` for square centimeter, `mile/hour` for mile per hour."""
    text = re.sub(rf"\b(square|sq|cubic){space}([a-z]+)", lambda m: f"{m[2]}^{3 if m[1] == 'cubic' else 2}", text)
    return re.sub(rf"{space}per{space}", "/", text)


def unit_fits(given: str, gold: str, question: str) -> bool:
    """Whether an answer may carry a unit: none, that of the gold answer, or one that the question names."""
    if given in ("", gold):
        return True
    if gold:
        return False
    if given in _NAMED:
        return re.search(_NAMED[given], question, re.IGNORECASE) is not None
    question = re.sub(r"(?<=[A-Za-z])\.", "", question.replace("²", "^2").replace("³", "^3"))  # p.m., sq. ft.
    text = re.sub(r"\\[a-z]+|\\[,;:! ]|[{}$~]", " ", question)
    before = r"[0-9/(（少几位-] *|\b(?:in|of|or|many|much|per|square|cubic|sq|kg) +|(?<![A-Za-z])(?=\w/)"
    text = re.sub(rf"({before})([mglLhs])(?![A-Za-z])", lambda m: m[1] + _LETTERS[m[2]], text)
    text = re.sub(r"(?<=[0-9/-])( *)in(?![A-Za-z])", r"\1inch", text)
    text = re.sub(" +", " ", re.sub("[A-Za-z]+", lambda word: _spelled(word[0]), text))
    text = _powers(text, " ").replace("^ ", "^")
    if len(given) == 1 and given.isascii():  # a variable, e or i; and N, J, K, which have no plural
        return given.isupper() and re.search(rf"(?<![A-Za-z]){given}(?![A-Za-z])", text) is not None
    stem = re.escape(given.replace("·", " ")) + ("?" if len(given) > 3 and given.endswith("e") else "")
    return re.search(rf"(?<![A-Za-z/]){stem}(?:s|es|e)?(?![A-Za-z^/])", text, re.IGNORECASE) is not None


def no_value(text: str, *more: str) -> bool:
    """Whether a gold answer is what programs write if they have no value: NO_VALUE, or one of `more`."""
    words = _WORDS.fullmatch(text.strip())
    plain = words["inner"] or words["bare"] if words else re.sub(r"\\(?:text|mbox|mathrm) ?\{(.*)\}", r"\1", text)
    return " ".join(plain.lower().split()).lstrip("+-").strip(" .") in NO_VALUE.union(more)
