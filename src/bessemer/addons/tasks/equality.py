"""Whether two expressions in LaTeX are equal, exactly. It runs in the referee process (referee.py), on hostile text.

latex2sympy reads the text and math-verify compares its structure: sets, tuples, intervals, relations, matrices. Their
leaves are compared here instead, because math-verify rounds: it takes 3.141593 for pi, and any number below 10^-6 for
another. Decimals are read as exact fractions, the names of symbols keep their case, odd roots of negative numbers are
real, degrees are fractions of pi.

Two numbers are equal if they agree to DIGITS digits, which two different numbers of 300 characters do not: those
would need exponents of four digits, and an answer with such exponents is not read (`maths._HUGE`). Two expressions in
symbols are equal if they agree at POINTS points, at the last of them to DIGITS digits, and the answer is defined at
each of them where the gold answer is. The points are drawn by a hash of both texts.
"""

import logging
import random
import re
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from bessemer.addons.tasks.forms import echoes, kept
from bessemer.addons.tasks.referee import guard_sympy
from bessemer.errors import UserError

DIGITS = 1200
POINTS, POINT_DIGITS, TRIES = 7, 60, 60
MAX_CANONICAL = 200
_BUILDER = re.compile(r"\\\{ ?[A-Za-z](?: ?\\in ?\\mathbb ?\{?R\}?)? ?(?:\\mid|\\vert|:|\|) ?(?P<relation>[^=]*)\\\}")
_RELATION = re.compile(r"<|>|\\[lg]eq?(?![a-z])|\\neq?(?![a-z])|\\in(?![a-z])")
_CONNECTED = re.compile(
    r"\s*(?:,\s*)?(\\text ?\{ ?(?:and|or|且|或) ?\}|\b(?:and|or)\b|\\land|\\lor|\\wedge|\\vee|且|或"
    r"|,(?![^(\[]*[)\]]))\s*"
)
_COLUMN = re.compile(r"\\langle(?P<inside>[^<>]*)\\rangle")
_DEGREES = re.compile(r"([0-9]+(?:\.[0-9]+)?|[a-z]) ?\^ ?(?:\{ ?\\circ ?\}|\\circ)")
_FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "sec": "sec", "csc": "csc", "cot": "cot", "asin": "asin", "acos": "acos",
    "atan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "asinh": "asinh", "acosh": "acosh",
    "atanh": "atanh", "exp": "exp", "factorial": "factorial", "gamma": "gamma", "floor": "floor", "ceiling": "ceil",
    "Abs": "fabs", "binomial": "binomial", "acot": "acot", "asec": "asec", "acsc": "acsc", "sign": "sign",
}  # fmt: skip
"""Sympy's functions and mpmath's."""


@cache
def library() -> ModuleType:
    """math-verify, with sympy guarded and its rounding replaced.

    Computes one verdict of each expensive kind, so that a fork inherits the tables and caches it needs.
    """
    try:
        import latex2sympy2_extended.latex2sympy2 as reader
        from latex2sympy2_extended import symbols
        from math_verify import grader
    except ImportError as error:
        raise UserError(f"judging mathematics needs math-verify ({error}): pip install math-verify") from error
    guard_sympy()
    logging.disable(logging.WARNING)  # it warns that its own timeout is off, which is intended
    warnings.simplefilter("ignore")
    reader.convert_number = _number
    reader._Latex2Sympy.parse_number = lambda self, text: _number(text)
    for name in ("gamma", "Gamma"):  # letters, not Euler's constant
        symbols.sympy_singleton_map.pop(name, None)
    grader.sympy_numeric_eq = lambda a, b, *rounding: _leaf(a, b)
    grader.sympy_symbolic_eq = lambda a, b: False
    grader.sympy_compare_symbols = lambda a, b: _leaf(a, b)
    for gold, answer in (
        ("x^2+2x+1", "(x+1)^2"),
        (r"\sqrt{3}", "1.7"),
        (r"\{1,2\}", "1,3"),
        ("x=3", "y=3"),
        ("x<1", "(1,2)"),
    ):
        same(parsed(gold), parsed(answer))
    return grader


def _number(text: str) -> Any:
    from sympy import Rational

    return Rational(text.replace(",", "").replace(" ", ""))


def parsed(text: str) -> Any:
    """The expression of a text, as it is written (nothing is evaluated); None if it is not one."""
    try:
        return _read(text)
    except Exception:
        return None


def _read(text: str) -> Any:
    import latex2sympy2_extended.latex2sympy2 as reader
    from sympy import I, Symbol

    normal = reader.NormalizationConfig(units=False, malformed_operators=True, nits=False, boxed="none")
    settings = reader.ConversionConfig(lowercase_symbols=False)
    if (built := _BUILDER.fullmatch(text)) and _RELATION.search(built["relation"]):
        text = built["relation"]
    text = _DEGREES.sub(r"\\left(\\frac{\1\\pi}{180}\\right)", text)
    text = _COLUMN.sub(r"(\g<inside>)", re.sub(r"\\left ?(?=\\langle)|\\right ?(?=\\rangle)", "", text))
    if _RELATION.search(text) and (joined := _CONNECTED.split(text))[1:]:
        return _connected(joined[::2], joined[1::2])
    if "\\pm" in text and not re.search("[,;]", text):
        return _both(text)
    read = reader.latex2sympy(reader.normalize_latex(text, normal), None, True, True, None, settings)
    return read.xreplace({Symbol("i", real=True): I}) if hasattr(read, "xreplace") else read


def _connected(texts: list[str], words: list[str]) -> Any:
    """Inequalities that hold together, or of which one holds, as a set. A comma is "and", unless nothing is left."""
    from sympy import Intersection, S, Union
    from sympy.core.relational import Equality, Relational

    parts = [parsed(text) for text in texts]
    relations = [relation for part in parts for relation in (getattr(part, "_unsorted_args", None) or [part])]
    if not all(isinstance(relation, Relational) and not isinstance(relation, Equality) for relation in relations):
        return None
    if len(set().union(*(relation.free_symbols for relation in relations))) != 1:
        return None
    sets = [part.as_set() for part in parts]
    either = any(re.search("or|vee|或", word) for word in words)
    common = Intersection(*sets)
    return Union(*sets) if either or (common is S.EmptySet and all("," in word for word in words)) else common


def _both(text: str) -> Any:
    """The two values of an expression with plus-minus signs."""
    from latex2sympy2_extended.sets import FiniteSet

    upper, lower = (text.replace("\\pm", sign).replace("\\mp", opposite) for sign, opposite in ("+-", "-+"))
    values = [parsed(text) for text in (upper, lower)]
    return None if None in values else FiniteSet(*values)


def same(gold: Any, answer: Any) -> bool:
    from math_verify import grader
    from sympy import FiniteSet, Interval, MatrixBase, Tuple
    from sympy.core.relational import Relational

    ordered = [isinstance(value, Tuple) or (isinstance(value, Interval) and value.is_open) for value in (gold, answer)]
    for n, (tree, counterpart) in enumerate(((gold, answer), (answer, gold))):
        if ordered[n] and isinstance(counterpart, FiniteSet):
            return False  # (3, 4) is a point or an interval, {3, 4} is not
        if ordered[n] and isinstance(counterpart, MatrixBase) and 1 in counterpart.shape:
            entries = tree.args if isinstance(tree, Tuple) else tree.args[:2]
            return len(entries) == len(counterpart) and all(map(_leaf, entries, counterpart))
    if isinstance(gold, Relational) and isinstance(answer, Relational) and _proportional(gold, answer):
        return True
    try:
        return bool(grader.sympy_expr_eq(gold, answer, 6, 15, True, True))
    except (ValueError, TypeError, AttributeError, NotImplementedError):
        return False


def _proportional(gold: Any, answer: Any) -> bool:
    """Whether two relations are multiples of each other: 2y = 4x + 2 and y = 2x + 1, 2x > 2 and 1 < x."""
    from sympy import Equality, Expr, Unequality

    if not all(isinstance(side, Expr) for side in (gold.lhs, gold.rhs, answer.lhs, answer.rhs)):
        return False  # x = an interval
    symmetric = isinstance(gold, Equality | Unequality)
    if answer.func is gold.func:
        sign = 1
    elif answer.func is gold.reversed.func:
        sign = -1
    else:
        return False
    gold_difference, answer_difference = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    if gold_difference.free_symbols != answer_difference.free_symbols or not gold_difference.free_symbols:
        return False
    ratios = []
    for values in _points(gold_difference, answer_difference):
        a, b = (_value(side, values, POINT_DIGITS) for side in (gold_difference, answer_difference))
        if a is None or b is None or not a or not b:
            continue
        ratios.append(a / b)
        if not _close(ratios[-1], ratios[0], POINT_DIGITS - 10):
            return False
        if len(ratios) == POINTS:
            return symmetric or (not getattr(ratios[0], "imag", 0) and ratios[0].real * sign > 0)
    return False


def _leaf(a: Any, b: Any) -> bool:
    """Whether two expressions, or matrices of them, are equal."""
    from sympy import Basic, MatrixBase

    if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
        alike = isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape
        return alike and all(map(_leaf, a.flat(), b.flat()))
    if not isinstance(a, Basic) or not isinstance(b, Basic):
        return False
    if a == b:
        return True
    if not a.free_symbols and not b.free_symbols:
        return _close(_value(a, {}, DIGITS), _value(b, {}, DIGITS), DIGITS - 100)
    agreed = 0
    for values in _points(a, b):
        value = _value(a, values, POINT_DIGITS)
        if value is None:
            continue
        if not _close(value, _value(b, values, POINT_DIGITS), POINT_DIGITS - 10):
            return False
        agreed += 1
        if agreed == POINTS:
            return _close(_value(a, values, DIGITS), _value(b, values, DIGITS), DIGITS - 100)
    return False


def _points(a: Any, b: Any) -> Any:
    """Values for the symbols: fractions of both signs; whole numbers for a symbol in an exponent or a factorial."""
    from sympy import Pow, Rational, binomial, factorial

    names = sorted(a.free_symbols | b.free_symbols, key=str)
    integral: set[Any] = set()
    for expression in (a, b):
        for part in expression.atoms(Pow, factorial, binomial):
            discrete = not isinstance(part, Pow) or (part.base.is_number and part.base.is_negative)
            integral |= (part.exp if isinstance(part, Pow) else part).free_symbols if discrete else set()
    rng = random.Random(f"{a}/{b}")
    for n in range(TRIES):
        sign = (1, 1, -1)[n % 3]
        yield {
            name: rng.randrange(1, 40)
            if name in integral
            else Rational(rng.choice((sign, sign, 1, -1)) * rng.randrange(1, 4000), rng.randrange(700, 999))
            for name in names
        }


def _close(a: Any, b: Any, digits: int) -> bool:
    if a is None or b is None:
        return False
    from mpmath import mp

    with mp.workdps(digits + 20):
        return bool(abs(a - b) <= mp.mpf(10) ** -digits * max(1, abs(a), abs(b))) and (a == b or digits > 0)


def _value(expression: Any, values: dict[Any, Any], digits: int) -> Any:
    """The value at a point, from the tree as it is written; None where it is not defined."""
    from mpmath import mp
    from sympy import Derivative, Integral, Limit, Product, Sum

    if expression.has(Sum, Product, Integral, Limit, Derivative):
        expression = expression.doit()
    with mp.workdps(digits + 30):
        try:
            number = _walk(expression, values, mp)
            return number if mp.isfinite(number) else None
        except (ValueError, KeyError, ArithmeticError, TypeError, NotImplementedError, AttributeError):
            return None


def _walk(node: Any, values: dict[Any, Any], mp: Any) -> Any:
    if node.is_Symbol:
        value = values[node]
        return mp.mpf(int(value.p)) / int(value.q) if hasattr(value, "p") else mp.mpf(value)
    if node.is_Rational:
        return mp.mpf(int(node.p)) / int(node.q) if node.q != 1 else mp.mpf(int(node.p))
    if node.is_number and not node.args:
        return {"pi": mp.pi, "E": mp.e, "I": mp.j}[str(node)] * 1
    if node.is_Pow:
        base, exponent = _walk(node.base, values, mp), node.exp
        power = _walk(exponent, values, mp)
        if not power.imag and base.imag == 0 and base.real < 0 and power.real != int(power.real):
            root = exponent if exponent.is_Rational else None
            if root is None or root.q % 2 == 0:
                if root is None or values:
                    raise ValueError  # no real value
                return mp.power(base, power)
            return (-1 if root.p % 2 else 1) * mp.power(-base, power)
        if not power.imag and abs(power) < 10**6 and power.real == int(power.real):
            return base ** int(power.real)
        return mp.power(base, power)
    inside = [_walk(part, values, mp) for part in node.args]
    if node.is_Add:
        return mp.fsum(inside)
    if node.is_Mul:
        return mp.fprod(inside)
    name = type(node).__name__
    if name == "UnevaluatedExpr":
        return inside[0]
    if name == "log":
        if values and (inside[0].imag or inside[0].real <= 0):
            raise ValueError
        return mp.log(inside[0]) / (mp.log(inside[1]) if len(inside) > 1 else 1)
    if name in ("asin", "acos") and not inside[0].imag and abs(inside[0]) > 1:
        raise ValueError
    if name in ("Max", "Min"):
        return {"Max": max, "Min": min}[name](inside, key=lambda x: x.real)
    return getattr(mp, _FUNCTIONS[name])(*inside) if name in _FUNCTIONS else _unknown(node, values, mp)


def _unknown(node: Any, values: dict[Any, Any], mp: Any) -> Any:
    """A function that mpmath is not asked for by name."""
    number = node.xreplace(values).evalf(mp.dps)
    if not number.is_number:
        raise ValueError
    return mp.mpmathify(number)


# The operations of the referee.


def prepare(request: dict[str, Any]) -> ModuleType:
    return library()


def judge_gold(_: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """Whether every gold answer is an expression with a value."""
    return {"read": all(_valued(parsed(gold)) for gold in request["golds"])}


def _valued(expression: Any) -> bool:
    from sympy import nan, zoo

    if expression is None or getattr(expression, "has", lambda *_: False)(nan, zoo):
        return False
    return (
        not getattr(expression, "is_number", False)
        or bool(expression.is_infinite)
        or _value(expression, {}, 15) is not None
    )


def judge_same(_: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """{"same": verdict, "canonical": how sympy writes the answer, "kept": whether the answer has the forms asked for,
    "echo": whether it is one of the pieces of the question in another order}, or canonical None if it is not an
    expression. All of the `sides` of an equation must be equal to the answer."""
    texts = [request["gold"], request["answer"], *request.get("sides", ())]
    gold, answer, *sides = (parsed(text) for text in texts)
    if gold is None or answer is None or None in sides:
        return {"same": False, "canonical": None}
    equal = same(gold, answer) and all(same(side, answer) for side in sides)
    in_form = not equal or kept(request.get("forms", ()), texts[:2], (gold, answer))
    copied = equal and _echoed(gold, answer, request.get("pieces", ()))
    return {"same": bool(equal), "canonical": str(answer)[:MAX_CANONICAL], "kept": in_form, "echo": copied}


def _echoed(gold: Any, answer: Any, pieces: Sequence[str]) -> bool:
    from sympy import Expr

    if not isinstance(answer, Expr) or not isinstance(gold, Expr):
        return False
    return echoes(answer, gold, [tree for piece in pieces if isinstance(tree := parsed(piece), Expr)])


def judge_near(_: ModuleType, request: dict[str, Any]) -> dict[str, Any]:
    """{"near": whether an exact number rounds to a decimal with `places` digits after the point}."""
    from mpmath import mp

    exact = parsed(request["exact"])
    value = None if exact is None or exact.free_symbols else _value(exact, {}, POINT_DIGITS)
    if value is None or value.imag:
        return {"near": False}
    with mp.workdps(POINT_DIGITS):
        top, _, bottom = request["decimal"].partition("/")
        off = abs(value - mp.mpf(int(top)) / int(bottom or 1))
        return {"near": bool(2 * off * mp.mpf(10) ** request["places"] <= 1 + mp.mpf(10) ** -20)}
