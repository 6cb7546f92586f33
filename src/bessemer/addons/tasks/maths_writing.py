"""How answers to mathematics are written: signs, names on the left of an equation, lists of named values.

Everything here turns one text into another that says the same; nothing judges. Text is hostile and at most
`maths.MAX_CHARS` long.
"""

import re

_LETTER = (
    r"(?:\\(?!text|frac|sqrt)[A-Za-z]+ ?\{? ?[A-Z]{0,4}\}?|[A-Za-z]|[A-Z]{2,4})"
    r"(?:_ ?(?:\{[\w, +-]{1,9}\}|\w)|\^\{?(?:\\prime|\*|-1)\}?|'){0,4}"
)
_NAME = re.compile(
    rf"\s*(?:{_LETTER}(?: ?(?:\\left ?)?\([^()=<>]{{1,24}}\))?|(?:\\left ?)?\|{_LETTER}(?:\\right ?)?\|"
    rf"|\(?{_LETTER}(?:, ?{_LETTER}){{1,3}}\)?|\([A-Za-z](?:, ?[A-Za-z]){{1,3}}\)"
    r"|\\[dt]?frac ?\{ ?d\^?\d? ?[a-z]? ?\} ?\{ ?d ?[a-z]\^?\d? ?\}"
    r"|\\(?:text|mathrm|textbf) ?\{[^{}0-9]{1,60}\}(?:_\w)?|[A-Za-z][A-Za-z ]{2,40}"
    r"|[A-Z]{1,2} ?(?:\\cup|\\cap|\\mid) ?[A-Z])\s*"
)
"""What an answer may be called: x, x_1, AB, f(2), f'(x), |AB|, (x, y), \\theta, \\angle A, \\text{Area}, dy/dx."""
_EQUALS = re.compile(r"(?<![<>!\\:])=(?!=)")
_WANTED = re.compile(
    r"(?:find|what is|what's|compute|evaluate|calculate|determine|simplify|求|计算|化简)"
    r"(?: the)?(?: exact)?(?: value)?(?: of)?",
    re.IGNORECASE,
)
_SPAN = re.compile(r"\$([^$]{1,60})\$|\\\((.{1,60}?)\\\)")
PIECES = 4
_AFTER = re.compile(
    r"\b(?:factor|expand|simplify|compute|evaluate|calculate|rationalize)(?: completely| fully)?:? ([^.,;?$\n]{3,60})",
    re.IGNORECASE,
)
_INDEXED = re.compile(r"([A-Za-z])(?:'+|\^-1|\^\\prime|_(?:[0-9]+|[A-Za-z](?![a-z])))?(?:\([^()]{1,24}\))?")
_PLAINER = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"\\(?:displaystyle|limits|mathstrut)(?![a-z])|\\;|\\!\s*|\\phantom ?\{[^{}]*\}", ""),
        (r"√ ?\(([^()]*)\)", r"\\sqrt{\1}"), (r"√ ?\{", r"\\sqrt{"), (r"√ ?([0-9]+|[a-z])", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"), (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        ("≤|<=|⩽|\\\\leqslant(?![a-z])", r"\\le "), ("≥|>=|⩾|\\\\geqslant(?![a-z])", r"\\ge "), ("≠|!=", r"\\ne "),
        ("∞", r"\\infty "), ("∪", r"\\cup "), ("∩", r"\\cap "), ("∈", r"\\in "), ("±", r"\\pm "),
        ("×", r"\\times "), ("·", r"\\cdot "), ("÷", "/"), ("−|–", "-"), ("²", "^2"), ("³", "^3"), ("⁴", "^4"),
        ("，", ","), ("（", "("), ("）", ")"), ("：", ":"), (r"\*\*", "^"), ("°", r"^\\circ "), ("∅", r"\\emptyset "),
        (r"\\(?:operatorname|mathrm|text) ?\{(arc[a-z]{3}|sin|cos|tan|cot|sec|csc|ln|log)\}", r"\\\1 "),
        (r"\\(?:mathrm|text) ?\{([eid])\}", r"\1"),
        (r"\\dfrac|\\tfrac|\\cfrac", r"\\frac"), (r"\\mathbf ?\{([^{}]*)\}", r"\1"), (r"\\,(?!\d\d\d)", " "),
    )
)  # fmt: skip
"""Writings that the parser does not know, or misreads."""
_LIST_AND = re.compile(
    r"\s*(?:,\s*)?(?:\\text ?\{ ?(?:or|and|或|和) ?\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|或|、|;|；)\s*"
)
_AND = re.compile(r"(?:\s*(?:\\[ ,;:]|\\text ?\{ ?(?:or|and|或|和) ?\}|\b(?:or|and)\b|或|和|,|;|\\quad))+")
_ASSIGNMENT = re.compile(r"\s*((?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?) *= *([^=]+)")
_INTERVAL = re.compile("interval|区间", re.IGNORECASE)
_MODULUS = re.compile(r"\\? ?\(?\s*\\?(?:pmod|bmod|mod) ?\{?([0-9]+)\}?\)?\s*$")
_SENTENCE = re.compile(
    r"^\\(?:text|textbf|mathrm) ?\{(?![^{}]*\b(?:not?|less|more|most|least|about|between|over|under"
    r"|or)\b)[A-Za-z ,']+:? ?\}"
    r"\s*(?=[-\\$0-9])"
)
_TO = re.compile(r"\s*(?:\\text ?\{ ?to ?\}|\bto\b|比)\s*(?=[0-9])")


def plainer(text: str) -> str:
    """The text in the writing that the parser knows."""
    for old, new in _PLAINER:
        text = old.sub(new, text)
    return text.strip()


def bare(text: str) -> str:
    """The text without white space and what LaTeX has for it."""
    return re.sub(r"\\left|\\right|\\[,;! ]|[{}\s]", "", text)


def pieces(question: str) -> tuple[str, ...]:
    """The last PIECES expressions of a question, and what follows a verb without dollars."""
    spans = [dollars or parenthesised for dollars, parenthesised in _SPAN.findall(question)] + _AFTER.findall(question)
    return tuple(side for span in spans[-PIECES:] for side in sides(plainer(span)) if len(side) > 2)


def unworded(answer: str, question: str, ratio: bool) -> str:
    """The answer without the words of a sentence before its number, and without a modulus of the question."""
    answer = _MODULUS.sub(lambda match: "" if match[1] in question else match[0], answer)
    answer = _SENTENCE.sub("", answer).strip()
    return _TO.sub(":", answer) if ratio else answer


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def sides(text: str) -> list[str]:
    """The sides of an equation or chain of equations; one for any other text."""
    return [side.strip() for side in _EQUALS.split(text)]


def _asking(question: str) -> str:
    """What follows "find the value of", without white space."""
    return bare(_WANTED.split(question)[-1].replace("$", "")) if _WANTED.search(question) else ""


def named(answer: str, question: str) -> tuple[str, list[str]]:
    """The value of an equation, its last side, and the sides before that. A name on the left is none of them, nor is
    the expression that the question asks for. ("", []) if the equation begins with something else."""
    first, *rest = sides(answer)
    if not rest:
        return answer, []
    if not all(rest):
        return "", []
    asking = _asking(question)
    is_asked_for = len(bare(first)) > 2 and asking.startswith(bare(first))
    if re.match("(?:it|this|that|its|the)", asking):  # "The product $xy$ ... Find it."
        is_asked_for |= any(
            bare(first) == bare(dollars or parenthesised) for dollars, parenthesised in _SPAN.findall(question)
        )
    if is_name(first) or is_asked_for:
        return rest[-1], rest[:-1]
    if "," in answer or not re.fullmatch(r"[0-9+\-*/(). {}^\\a-z]+", first):
        return "", []
    return rest[-1], [first, *rest[:-1]]


def misnamed(answer: str, question: str) -> bool:
    """Whether an answer is called like what is asked for, but is another one: f(2) for f(-2), f for f', a_9 for a_5."""
    first, *rest = sides(answer)
    if not rest:
        return False
    asked_name, name = _INDEXED.match(_asking(question)), _INDEXED.fullmatch(bare(first))
    if asked_name is None or name is None or asked_name[1] != name[1] or asked_name[0] == asked_name[1]:
        return False
    return name[0] not in (asked_name[0], asked_name[1])


def unnamed(gold: str, answer: str) -> tuple[str, str]:
    """Both without the same name on their left."""
    gold_sides, answer_sides = sides(gold), sides(answer)
    if (
        len(gold_sides) == len(answer_sides) == 2
        and bare(gold_sides[0]) == bare(answer_sides[0])
        and is_name(gold_sides[0])
    ):
        return gold_sides[1], answer_sides[1]
    return gold, answer


def paired(gold: str, answer: str, question: str) -> tuple[str, str]:
    """Gold answer and answer in one notation, if either names several values: `x = 1, y = 2`. The answer is "" if they
    do not name the same ones."""
    gold_values, answer_values = assigned(gold), assigned(answer)
    if gold_values.keys() != answer_values.keys() and not any(
        re.match(r"(?:\\left ?)?\(", text) for text in (gold, answer)
    ):
        gold_values, answer_values = _one_name(gold_values), _one_name(answer_values)
    if (
        gold_values
        and answer_values
        and gold_values.keys() != answer_values.keys()
        and max(len(gold_values), len(answer_values)) > 1
    ):
        return gold, ""
    if len(gold_values) > 1 and answer.startswith("\\{"):
        return gold, ""  # a set does not say which is which
    if gold_values and (len(gold_values) == 1 or "=" not in answer):
        gold, answer = _values(gold_values, question), answer if len(gold_values) == 1 else _tuple(answer)
    if answer_values and (
        len(answer_values) == 1 or not ("=" in gold or gold.startswith("\\{") or _INTERVAL.search(question))
    ):
        gold, answer = gold if len(answer_values) == 1 else _tuple(gold), _values(answer_values, question)
    if not gold_values and not answer_values and "=" not in gold:
        gold, answer = (
            _LIST_AND.sub(", ", text) if not re.search(r"[<>]|\\[lg]e", text) else text for text in (gold, answer)
        )
    return gold, answer


def values_of(text: str) -> list[str]:
    """The values of a bare list or of a plus-minus sign; one for any other text."""
    if re.match(r"(?:\\left ?)?[(\[]", text) or "=" in text:
        return [text]
    return text.split("\\pm") if text.count("\\pm") == 1 else _LIST_AND.sub(",", text.strip("\\{} ")).split(",")


def _tuple(text: str) -> str:
    """A bare list as a tuple."""
    return text if re.match(r"(?:\\left ?)?[(\[{\\]", text) or "," not in text else f"({text})"


def assigned(text: str) -> dict[str, list[str]]:
    """{name: values} of `x = 1, y = 2` or `x = 1 or x = 2`; {} for any other text."""
    assignments, values = [_ASSIGNMENT.fullmatch(part) for part in _AND.split(text)], dict[str, list[str]]()
    if len(assignments) < 2 or not all(assignments):
        return {}
    for match in assignments:
        assert match is not None
        values.setdefault(match[1], []).append(match[2].strip())
    return values if len(values) in (1, len(assignments)) else {}


def _one_name(assigned: dict[str, list[str]]) -> dict[str, list[str]]:
    """`x_1 = 2, x_2 = 3` as the two values of x."""
    stems = {re.sub(r"_\{?[0-9]+\}?$", "", name) for name in assigned}
    if len(stems) != 1 or len(assigned) < 2:
        return assigned
    return {stems.pop(): [value for values in assigned.values() for value in values]}


def _values(assigned: dict[str, list[str]], question: str) -> str:
    """`2, 3` for `x = 2 or x = 3`; `(2, 3)` for `x = 2, y = 3`: math-verify would compare bare values with that as a
    set, in any order. The order is that of a tuple in the question, else of x, y, z, else as written."""
    if len(assigned) == 1:
        return ", ".join(next(iter(assigned.values())))
    plain = re.sub(r"\\left|\\right|\\[,;:! ]", "", question)
    tuples = (
        [part.strip() for part in tuple_text.split(",")] for tuple_text in re.findall(r"\(([^()]{1,40})\)", plain)
    )
    natural = sorted(assigned) if assigned.keys() <= set("xyz") else list(assigned)
    order = next((names for names in tuples if sorted(names) == sorted(assigned)), natural)
    return f"({', '.join(assigned[name][0] for name in order)})"
