"""Units of answers: split off, and read as powers of named units, each with a dimension.

What unit a question takes is the matter of units_asked.py. Units are not converted.
"""

import re
from functools import lru_cache

_KINDS = {
    "length": "millimeter mm|centimeter cm|decimeter dm|meter m|kilometer km|inch in|foot feet ft|yard yd|mile mi"
    "|light-year|毫米|厘米|分米|米|千米 公里",
    "time": "second s sec|minute min|hour h hr|day|week|month|year yr|decade|century centurie|millisecond ms|秒 秒钟"
    "|分钟 分|小时 时|天 日|周 星期|月 个月|年|岁",
    "mass": "milligram mg|gram g|kilogram kg kilo|ton tonne|pound lb|ounce oz|克|千克 公斤|吨|斤",
    "volume": "milliliter ml|liter l|gallon gal|quart qt|pint pt|cup|tablespoon|teaspoon|毫升|升",
    "money": "$ dollar usd|cent ¢|€ euro eur|£ gbp|¥ yuan 元 rmb cny 块|rupee|peso|角",
    "angle": "° degree deg 度|radian rad 弧度",
    "temperature": "°C|°F",
    "force": "N newton",
    "energy": "J joule|calorie cal|kJ kilojoule",
    "power": "W watt|kW kilowatt",
    "frequency": "Hz hertz",
    "pressure": "Pa pascal",
    "generic": "unit 单位 个单位",
    "percent": "% percent percentage",
    "area": "acre|hectare|公顷|亩",
}
_SAME = {
    "毫米": "millimeter", "厘米": "centimeter", "分米": "decimeter", "米": "meter", "千米": "kilometer", "秒": "second",
    "分钟": "minute", "小时": "hour", "天": "day", "周": "week", "月": "month", "年": "year", "克": "gram",
    "千克": "kilogram", "吨": "ton", "毫升": "milliliter", "升": "liter", "公顷": "hectare",
}  # fmt: skip
UNITS = {
    name: (_SAME.get(names[0], names[0]), kind)
    for kind, groups in _KINDS.items()
    for names in map(str.split, groups.split("|"))
    for name in names
}
"""Every name of a unit: its first name and its dimension."""
COMPOUND = {"mph": "mile/hour", "kph": "kilometer/hour", "kmph": "kilometer/hour", "fps": "foot/second"}
_POWER = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3, "平方": 2, "立方": 3}
Unit = tuple[tuple[str, int], ...]
"""(name, power) of every factor, sorted: meter^1 second^-1."""

# The text of an answer.
_BLOCK = r"\\(?:text|mbox|mathrm|textrm|textnormal|textbf|rm) ?\{[^{}$]*\}(?: ?\^ ?(?:\{-?[0-9]\}|-?[0-9]))?"
CURRENCY = re.compile(r"([+-]?) ?(\\?\$|[£€¥￥]|(?:US|USD|RMB|Rs\.?) ?\\?\$?) ?(?=[0-9.+-]|\\[dt]?frac)")
_LETTERS = "mgLlhsNJWKVA"
_WORD = (
    rf"(?:[A-Za-z][a-z]+(?:-[a-z]+)*\.?|[kKcmM][A-Za-z]\b|USD|RMB|CNY|EUR|GBP|[{_LETTERS}](?![A-Za-z]))"
    r"(?: ?\^ ?(?:\{-?[0-9]\}|-?[0-9])|[²³])?"
)
HAN = "\u4e00-\u9fff"
_TAIL = re.compile(
    r"(?: ?(?:\\?%|％|\\?\$|[£€¥￥¢]|(?:°|º|\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree) ?(?:\\(?:text|mathrm) ?\{[CF]\}"
    r"|[CF])?)"
    rf"|(?:(?:\\[,;:! ]|~|\s|/|\\cdot|·)*{_BLOCK})+"
    rf"|(?:(?<=[0-9}}!)])|\s)\s*{_WORD}(?:(?: ?/ ?|\s+|·| ?\\cdot ?){_WORD}){{0,7}}"
    rf"|(?:(?<=[0-9}})])|(?<=\\pi)|\s)\s*[{HAN}]{{1,8}}(?:[/每][{HAN}]{{1,3}})?)$"
)
_STACKED = re.compile(rf"\\[dt]?frac ?\{{({_BLOCK})\}} ?\{{({_BLOCK})\}}$")
_ANGLE = re.compile(r"(?:sin|cos|tan|cot|sec|csc)[^+=-]*$")
_PER = re.compile(r"(?:per |an? |each |every |/)")
_NO_UNIT = re.compile(
    r"\b(?:or|and|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|frac|mod|max|min|lim|gcd|lcm|pi|if|for|where|else|otherwise|not|to)\b",
)
_UNFINISHED = re.compile(
    r"(?:[=<>+*/^_,:(|-]|\\(?:in|le|ge|leq|geq|neq|ne|cup|cap|to|times|cdot|pm|mp|approx|sim|and|or|[a-z]*(?:sin|cos|tan|log|ln))"
    r"|\b(?:sin|cos|tan|log|ln|and|or)) *$"
)


def split_unit(text: str, letters: bool = False) -> tuple[str, str]:
    """An answer without its unit, and the unit as it is written; "" for none. Letters that no unit is spelled with
    count as one only if `letters`, since they may be variables."""
    if currency := CURRENCY.match(text):
        rest = currency[1] + text[currency.end() :]
        inner, unit = split_unit(rest)
        if not unit or _same_money(unit, currency[2]):
            return inner, currency[2]
        return (inner, f"{currency[2]} {unit}") if _PER.match(plain_unit(unit)) else (rest, currency[2])
    text = _STACKED.sub(r"\1/\2", text)
    tail = _TAIL.search(text)
    if not tail or not tail.start() or _UNFINISHED.search(text[: tail.start()]):
        return text, ""
    written = tail[0].strip()
    if written[0] in "°º^\\" and _ANGLE.search(text[: tail.start()]) and unit_of(written) == (("°", 1),):
        return text, ""
    plain = "\\text" not in written and "\\m" not in written and "\\rm" not in written
    if plain and written != "min" and (_NO_UNIT.search(written) or not (letters or _spelled_out(written))):
        return text, ""
    return text[: tail.start()].strip(), written


def _spelled_out(written: str) -> bool:
    """Whether bare text after an expression can only be a unit, not a product of letters."""
    unit = unit_of(written)
    return unit is not None and not re.search(
        r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", written.replace("°C", "").replace("°F", "")
    )


def _same_money(unit: str, sign: str) -> bool:
    return unit_of(unit) == unit_of(sign)


def plain_unit(text: str) -> str:
    """A unit or a question without the commands, braces and dollars of LaTeX."""
    text = re.sub(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf|rm)(?![a-zA-Z])", " ", text)
    text = re.sub(r"\^ ?(?:\{ ?\\circ ?\}|\\circ)|\\degree|º", "°", text).replace("²", "^2").replace("³", "^3")
    text = re.sub(r"\\(?:cdot|times)|·", " ", re.sub(r"\\([%$])", r"\1", text)).replace("％", "%").replace("￥", "¥")
    text = re.sub(r"[{}~]|\\[,;:! ]|\\(?![a-zA-Z])", " ", text)
    text = re.sub(r"(?<=[A-Za-z])\.(?=\s|$|[A-Za-z])|[()]", " ", text)
    return re.sub(r" ?([/^]) ?", r"\1", re.sub(r"° ?([CF])\b", r"°\1", " ".join(text.split())))


_MANNER = re.compile(
    r"(?: (?:old|of age|tall|long|wide|high|deep|thick|away|apart|in total|total|altogether|in all|left|remaining"
    r"|more|each))+$"
)


@lru_cache(maxsize=4096)
def unit_of(text: str) -> Unit | None:
    """The unit in a text that is nothing but a unit; None if it is something else, such as a noun."""
    text = _MANNER.sub("", plain_unit(text))
    words = re.findall(rf"[A-Za-z]+(?:-[A-Za-z]+)*|°[CF]?|[%$£€¥¢]|[{HAN}]+|\^-?[0-9]|/", text)
    if "".join(words) != "".join(text.split()):
        return None
    powers: dict[str, int] = {}
    sign, power, last = 1, 1, ""
    for word in [part for token in words for part in _split(token)]:
        if word in ("/", "per", "an", "每"):
            sign, last = -1, ""
        elif word.lower() in _POWER:
            n = _POWER[word.lower()]
            if word.lower().endswith("ed"):
                if not last:
                    return None
                powers[last] *= n
            else:
                power = n
        elif word.startswith("^"):
            if not last:
                return None
            powers[last] *= int(word[1:])
        else:
            name = _named(word)
            if name is None:
                return None
            last = name
            powers[name] = powers.get(name, 0) + sign * power
            power = 1
    return tuple(sorted((name, n) for name, n in powers.items() if n)) or None


def _split(word: str) -> list[str]:
    """Compound names taken apart: mph, 平方厘米, 千米每小时."""
    if word.lower() in COMPOUND:
        return re.findall(r"[a-z]+|/", COMPOUND[word.lower()])
    if word[0] in "平立" and word[:2] in _POWER:
        return [word[:2], *_split(word[2:])] if word[2:] else [word]
    if "每" in word[1:]:
        before, _, after = word.partition("每")
        return [before, "每", after]
    return [word]


def _named(word: str) -> str | None:
    """The first name of a unit: singular, in full, whatever its capitals (but not those of single letters)."""
    for form in (word, word.lower(), word.lower().removesuffix("s"), word.lower().removesuffix("es")):
        if form in UNITS and (len(word) > 1 or form == word or word == "L"):
            return UNITS[form][0]
    lower = word.lower()
    for british, american in (("metre", "meter"), ("litre", "liter")):
        if british in lower:
            return _named(lower.replace(british, american))
    return None


def dimension(unit: Unit) -> tuple[tuple[str, int], ...]:
    powers: dict[str, int] = {}
    for name, n in unit:
        kind = UNITS[name][1]
        kind, n = ("length", 3 * n) if kind == "volume" else ("length", 2 * n) if kind == "area" else (kind, n)
        powers[kind] = powers.get(kind, 0) + n
    return tuple(sorted((kind, n) for kind, n in powers.items() if n))


def same_unit(unit: str, other_unit: str) -> bool:
    """Whether two units are written for the same one: cm^2 and square centimeters; m s and ms are not."""
    return (
        unit_of(unit) == unit_of(other_unit)
        if unit_of(unit) or unit_of(other_unit)
        else plain_unit(unit) == plain_unit(other_unit)
    )
