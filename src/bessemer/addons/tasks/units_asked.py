"""Whether a unit is one that a question takes.

A unit fits if it is that of the gold answer. If the gold answer has none, the question decides: by the unit that it
asks for ("in metres", "how many hours", 多少米), else by the quantity ("how far", "area", 面积), whose dimension the
unit must have, in units that the question uses if it uses any of that dimension; else the unit must be one that the
question uses. "How many bolts" takes bolts. An answer may always leave its unit out, and units are not converted.
"""

import re
from functools import lru_cache

from bessemer.addons.tasks.units import COMPOUND, HAN, UNITS, Unit, dimension, plain_unit, same_unit, unit_of

_ASKED = [
    (kinds, re.compile(pattern, re.IGNORECASE))
    for kinds, pattern in (
        ("count", r"\bhow many\b|\bnumber of\b|(?:多少|几)[个只本人条棵头件张块支辆位名种]"),
        ("time", r"\bhow much (?:\w+ )?time|\bduration\b|\bhow old\b|\bages?\b|多久|多长时间|几(?:天|小时|分钟)"),
        ("length time", r"\bhow long\b"),
        ("mass", r"\bhow heavy\b|\bweighs?\b|\bweight\b|\bmass\b|多重|体重|质量|重量"),
        ("speed", r"\bhow fast\b|\bspeeds?\b|\bvelocity\b|速度|多快|时速"),
        ("density", r"\bdensity\b|密度"),
        ("acceleration", r"\bacceleration\b|加速度"),
        ("rate", r"\brates?\b|\bper\b"),
        ("area", r"\bareas?\b|面积"),
        ("volume", r"\bvolumes?\b|\bcapacity\b|体积|容积|容量"),
        ("none", r"\bprobabilit|\bratios?\b|\bfractions?\b|\bproportions?\b|\bslope\b|概率|比值|几分之几"),
        ("percent", r"\bpercent|百分"),
        ("angle", r"\bangles?\b|\\angle|\bdegrees?\b|\bradians?\b|∠|角度|[多少几]度|的度数"),
        ("temperature", r"\btemperature\b|温度|气温"),
        ("force", r"\bforce\b"), ("energy", r"\benergy\b|\bwork done\b"), ("frequency", r"\bfrequency\b"),
        ("pressure", r"\bpressure\b"),
        ("money", r"\bcosts?\b|\bprices?\b|\bearn|\bspen[dt]\b|\bpa(?:y|id)\b|\bprofit|\bmoney\b|\bcharged?\b|\bworth\b"
         r"|\bsav(?:e|ed|ings)\b|\bsalary\b|\bincome\b|\bwages?\b|\bowe|\bbill\b|\bbudget\b|\brevenue\b|\bfees?\b|\btip\b"
         r"|\btax\b|\bin change\b|钱|价格|费用|售价|利润|花费"),
        ("length", r"\bhow (?:far|tall|high|deep|wide|thick)\b|\bdistances?\b|\bperimeters?\b|\blengths?\b|\bheights?\b"
         r"|\bwidths?\b|\bradi(?:us|i)\b|\bdiameters?\b|\bcircumference|\baltitudes?\b|\bdepths?\b|\bhypotenuse\b|\bsides?\b"
         r"|\bdiagonals?\b|\bwavelength\b|周长|距离|长度|多[长远高深宽]|半径|直径|边长|身高|高度|(?-i:(?<![A-Za-z\\])[A-Z]{2}(?![A-Za-z]))"),
    )
]  # fmt: skip
_DIMENSIONS = {
    "speed": (("length", 1), ("time", -1)), "area": (("length", 2),), "volume": (("length", 3),),
    "density": (("length", -3), ("mass", 1)), "acceleration": (("length", 1), ("time", -2)),
}  # fmt: skip
_CUE = re.compile(
    r"\b(?:what|how|find|determine|compute|calculate|evaluate|which|when|give|express|round|answer)\b|求|多少|几|多[长远高久快重]|[?？]",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[?!。？！；\n])|(?<=\.)(?=\s)")
_NAMES = "|".join(
    sorted(
        (
            re.escape(name)
            for name in (*UNITS, *COMPOUND, "metre", "kilometre", "centimetre", "litre")
            if name[0].isascii() and len(name) > 1
        ),
        key=len,
        reverse=True,
    )
)
_PHRASE = (
    rf"(?:(?:square|cubic|sq|cu)[ -])?(?:{_NAMES}|[mgLlhsNJW](?=[/^²³]|\b))(?:s|es)?(?![A-Za-z])(?:\^[0-9]"
    rf"|\b-?squared|[²³])?"
    rf"(?: squared| cubed)?(?:(?: per |/)(?:(?:square|cubic) )?(?:{_NAMES}|[mgLlhs])(?:s"
    rf"|es)?(?![A-Za-z])(?:\^[0-9]|²)?)?"
)
_PHRASE_ZH = (
    "(?:平方|立方)?(?:毫米|厘米|分米|千米|公里|米|秒钟?|分钟|小时|千克|公斤|毫升|公顷|[天日周年岁克吨斤升元角度])"
    "(?:[/每](?:秒|分钟|小时|时))?"
)
_HOURLY = re.compile(rf"每(小时|分钟|秒|时|天)(?:[^，,。每]{{0,4}}?)(多少|几)(个?)({_PHRASE_ZH})")
_EXPLICIT = re.compile(
    r"(?:\b(?:in|number of|many)(?: (?:more|fewer|less|additional|extra|total|full|whole|complete|the|of|terms of))* "
    rf"|\([Ii]n |[(（]单位[:：]? ?)(?P<unit>{_PHRASE})"
    rf"|(?:多少|几|[(（]单位[:：]? ?)(?:个)?(?P<zh>{_PHRASE_ZH}|{_PHRASE})"
)
_USED = re.compile(
    rf"(?:(?<=[0-9)½¼¾])[ -]*|\b(?:a|an|per|one|each|half|in|many|two|three|four|five|six|seven|eight|nine|ten|few"
    rf"|some|[a-z]) |/ ?)"
    rf"(?P<unit>{_PHRASE})|(?:(?<=[0-9几少半一二三四五六七八九十百千万])|/) ?(?P<zh>{_PHRASE_ZH}|(?:{_NAMES}"
    rf"|[mgLl])(?![A-Za-z])(?:\^[23])?)|(?P<sign>°[CF]?|[%€£¥¢])"
)
_PERCENTAGE = re.compile(r"\b(?:as a|what) percent|\bin percent|百分之[几多]|百分比", re.IGNORECASE)
_MONEY_TEXT = re.compile(r"\\\$|\$ ?[0-9][0-9,.]*(?![^$]{0,200}\$)|\bdollars?\b|\bcents?\b|USD", re.IGNORECASE)


@lru_cache(maxsize=1024)
def _asks(question: str) -> tuple[str, tuple[Unit, ...], frozenset[Unit], tuple[str, ...]]:
    """Of a question: its asking part, the units it asks for, all units in it, and the quantities it asks for."""
    sentences = [part for part in _SENTENCE.split(question) if part and part.strip()]
    cued = [n for n, part in enumerate(sentences) if _CUE.search(part)]
    first = next(
        (n for n in reversed(cued) if not re.match(r"\W*(?:give|express|round|answer|write)\b", sentences[n], re.I)),
        None,
    )
    part = "".join(sentences[first if first is not None else (cued or [0])[0] :])
    plain, whole_question = (
        plain_unit(re.sub(r"(?<!\\)\$", " ", part)),
        plain_unit(re.sub(r"(?<!\\)\$(?! ?[0-9])", " ", question)),
    )
    hourly = [unit_of(f"{match[4]}/{match[1]}") for match in _HOURLY.finditer(plain)]  # 每小时多少千米
    explicit = tuple(unit for unit in hourly if unit) + tuple(
        unit for match in _EXPLICIT.finditer(plain) if (unit := unit_of(match["unit"] or match["zh"]))
    )
    if _PERCENTAGE.search(plain):
        explicit += ((("%", 1),),)
    used = {
        unit for match in _USED.finditer(whole_question) if (unit := unit_of(next(filter(None, match.groups()))))
    } | set(explicit)
    if _MONEY_TEXT.search(question):
        used.add((("$", 1),))
    if "元" in question:
        used.add((("¥", 1),))
    if "°" in whole_question or re.search(r"\bangle|\bdegree|\\angle|[角度]", question):
        used.add((("°", 1),))
    cue = _CUE.search(part)
    asking = part[cue.start() :] if cue and not re.match("[?？]", cue[0]) else part
    if re.search(rf"[{HAN}]", part):
        clauses = [clause for clause in re.split("[，,；;。]", part) if _CUE.search(clause)]
        asking = clauses[-1] if clauses and any(pattern.search(clauses[-1]) for _, pattern in _ASKED) else part
    matches = [
        (match.start(), n, kinds) for n, (kinds, pattern) in enumerate(_ASKED) if (match := pattern.search(asking))
    ]
    quantity = min(matches)[2] if matches else ""
    return part, explicit, frozenset(used), tuple(quantity.split())


def unit_fits(answered: str, gold: str, question: str) -> bool:
    """Whether an answer may carry a unit."""
    if not answered:
        return True
    if gold:
        unit = unit_of(answered)
        price = _price(answered, question)  # $ per kg, where the question is what a kg costs
        if price and same_unit(price, gold):
            return True
        return same_unit(answered, gold) or (unit is None and _words(answered) == _words(gold))
    head, _, noun = plain_unit(answered).partition(" of ")
    if noun and unit_of(head) and all(word in _words(question) for word in _words(noun)):
        answered = head  # cups of flour
    elif head := _price(answered, question):
        answered = head
    part, explicit, used, quantities = _asks(question)
    unit = unit_of(answered)
    if unit is None:
        return _counted(answered, part, question, bool(explicit), quantities)
    if explicit:
        return unit in explicit or (_base(unit) == "generic" and any(map(_generic, explicit)))
    size = dimension(unit)
    if _base(unit) == "generic":
        power = dict(unit)["unit"]
        power_of = {"length": 1, "area": 2, "volume": 3}
        return (not quantities and power == 1) or any(power_of.get(quantity) == power for quantity in quantities)
    if not quantities or quantities == ("rate",):
        return unit in used or (quantities != () and any(n < 0 for _, n in unit) and _of_used(unit, used))
    if quantities == ("count",):
        return False
    dimensions = [_DIMENSIONS.get(quantity, ((quantity, 1),)) for quantity in quantities]
    return size in dimensions and _of_used(unit, used)


def asks_a_share(question: str) -> bool:
    """Whether a question may ask for a share: for no unit, and for no quantity that has a dimension or is counted."""
    _, explicit, _, quantities = _asks(question)
    return not explicit and quantities in ((), ("none",), ("percent",))


def _price(answered: str, question: str) -> str:
    """The currency of a price such as "$ per pound", if the question speaks of pounds; else ""."""
    head, per, noun = re.sub(r"/|(?<= )(?:each|every|an?)(?= )", " per ", plain_unit(answered)).partition(" per ")
    money = unit_of(head) if per else None
    if money is None or dimension(money) != (("money", 1),) or not _words(noun):
        return ""
    return head if all(word in _words(question) for word in _words(noun)) else ""


def _base(unit: Unit) -> str:
    return UNITS[unit[0][0]][1]


def _generic(unit: Unit) -> bool:
    return _base(unit) == "generic"


def _of_used(unit: Unit, used: frozenset[Unit]) -> bool:
    """Whether each factor is a unit of the question, where the question has units of that dimension."""
    names = {name for question_unit in used for name, _ in question_unit}
    for name, _ in unit:
        kind = UNITS[name][1]
        rivals = {rival for rival in names if UNITS[rival][1] == kind}
        if rivals and name not in rivals:
            return False
    return True


_STOP = re.compile(
    r"\b(?:do|does|did|are|is|was|were|will|would|can|could|has|have|had|must|should|in|on|at|to|that|which|who|if|when|there|he|she|it"
    r"|they|we|you|such|with|from|for|by)\b|[,.?!;:()]",
    re.IGNORECASE,
)
_IRREGULAR = {
    "people": "person", "children": "child", "men": "man", "women": "woman", "feet": "foot", "mice": "mouse",
    "geese": "goose", "teeth": "tooth", "vertices": "vertex", "dice": "die",
}  # fmt: skip
_FILLER = frozenset(
    ("more", "fewer", "less", "total", "other", "of", "the", "these", "different", "additional", "extra",
     "whole", "full", "such", "a", "an", "in", "all", "his", "her", "their", "its", "each", "some", "altogether",
     "left", "remaining", "exactly", "distinct", "possible")
)  # fmt: skip
_ANY_COUNT = frozenset(("way", "time", "item", "piece", "object", "thing"))


def _words(text: str) -> list[str]:
    return [_singular(word) for word in re.findall(rf"[A-Za-z]+|[{HAN}]+", plain_unit(text))]


def _singular(word: str) -> str:
    word = _IRREGULAR.get(word.lower(), word.lower())
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if re.search("(?:ch|sh|x|s|z)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 3 else word


def _counted(answered: str, part: str, question: str, explicit: bool, quantities: tuple[str, ...]) -> bool:
    """Whether a noun after a number is what the question counts, or at least a thing of the question."""
    words = [word for word in _words(answered) if word not in _FILLER]
    if not words:
        return bool(_words(answered))
    if explicit or (quantities and quantities not in (("count",), ("rate",))):
        return False
    if re.fullmatch(rf"[{HAN}]+", noun := "".join(words)):
        return noun in question or (noun[:1] in "个只本人条棵头件张块支辆位名种次" and noun[1:] in question)
    if all(len(word) == 1 for word in words):
        return False
    head = re.split(r"\b(?:of|in|per|for|with|that|from|to|on)\b|/", plain_unit(answered))[0]
    heads = [word for word in _words(head) if word not in _FILLER] or words
    nouns = _words(question)
    if "count" not in quantities:
        return all(word in nouns for word in heads)
    windows = [
        [word for word in _words(_STOP.split(plain_unit(tail))[0]) if word not in _FILLER][:8]
        for tail in re.split(r"\bhow many\b|\bnumber of\b", part, flags=re.IGNORECASE)[1:]
    ]
    counted = [word for window in windows for word in window]
    if heads[-1] in counted or (counted and heads[-1] in _ANY_COUNT and "count" in quantities):
        return True
    return not counted and heads[-1] in nouns
