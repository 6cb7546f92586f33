"""The form in which a question asks for an expression, and whether an answer has it.

An equal expression is no answer to "factor x^2 - 9" if it is x^2 - 9 in another order, so these verbs are judged by the
tree of the answer as it is written, beside that of the gold answer. A form that the gold answer does not have is not
asked of the answer. `kept` runs in the referee process.

  factor       as many factors, of the same degrees, as the gold answer has, none with a common number left in it
  expand       a sum of products without sums, no two of them alike
  simplify     nothing left to work out in any sum, product or root, and no longer than the gold answer
  rationalize  no root below a fraction bar
  complex      a + bi, nothing left to multiply
  positive     no negative exponent
  slope        y = ..., if it is an equation
  isolated     the letter of the gold answer alone on one side, if it is an equation
  square       a square of a sum
  prime        a product of powers of primes
  single       one term, one logarithm

`echoes` finds a piece of the question in any order of its terms and factors.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import Any

_ASKS = {
    "factor": r"(?<!common )(?<!scale )(?<!\bthe )(?<!\ba )\bfactor(?:i[sz]e)?\b(?! of)|factored form|因式分解"
    r"|分解因式",
    "expand": r"\bexpand(?:ed)?\b|multiply out|展开",
    "simplify": r"simpl(?:if|est)|lowest terms|\breduce|irreducible|化简|最简|约分",
    "rationalize": r"rationali[sz]|有理化",
    "complex": r"\bform \$?(?:\\\()? ?a ?[+±] ?b ?i",
    "positive": r"positive exponents?|正指数",
    "slope": r"slope[- ]intercept|斜截式",
    "isolated": r"\bsolve\b.{0,60}\bfor \$?[A-Za-z]\b|in terms of|\bexpress \$?[A-Za-z]\b|the subject"
    r"|解出|用.{1,12}表示",
    "square": r"complet\w+ the square|vertex form|配方|顶点式",
    "prime": r"prime factori[sz]ation|prime factors|product of primes|质因数|素因数",
    "single": r"single (?:fraction|logarithm|term|power)",
}
_FRACTION = re.compile(r"\\[dt]?frac ?\{?([0-9]+)\}? ?\{?([0-9]+)\}?|(?<![0-9.])([0-9]+) ?/ ?([0-9]+)(?![0-9.])")
_TIMES = re.compile(r"\\cdot|\\times|\*")
LONGER = 1
"""By how many numbers and letters a simplified answer may exceed the gold answer."""


def asked(question: str) -> tuple[str, ...]:
    """The forms that a question asks for; none if it both factors and expands."""
    forms = tuple(form for form, verb in _ASKS.items() if re.search(verb, question, re.IGNORECASE))
    return () if {"factor", "expand"} <= set(forms) else forms


def kept(forms: Sequence[str], texts: Sequence[str], trees: Sequence[Any]) -> bool:
    """Whether an answer equal to the gold answer has the forms. `texts` and `trees`: of the gold answer, the answer."""
    from sympy import Expr

    if not all(isinstance(tree, Expr) for tree in trees):
        forms = [form for form in forms if form in ("positive", "slope", "isolated")]
    return all(_KEPT[form](*texts, *trees) or not _KEPT[form](texts[0], texts[0], trees[0], trees[0]) for form in forms)


def _factored(_: str, __: str, gold: Any, answer: Any) -> bool:
    gold_factors, answer_factors = (_factors(tree) for tree in (gold, answer))
    return sorted(degree for degree, _ in gold_factors) == sorted(degree for degree, _ in answer_factors) and (
        max((content for _, content in answer_factors), default=1)
        <= max((content for _, content in gold_factors), default=1)
    )


def _factors(tree: Any, times: int = 1) -> list[tuple[int, int]]:
    """(total degree, common whole number of the coefficients) of every factor with a letter."""
    from sympy import Poly, PolynomialError

    if tree.is_Mul:
        return [factor for part in tree.args for factor in _factors(part, times)]
    if tree.is_Pow and tree.exp.is_Integer and tree.exp > 0:
        return _factors(tree.base, times * int(tree.exp))
    if not tree.free_symbols:
        return []
    try:
        poly = Poly(tree.doit(), *sorted(tree.free_symbols, key=str))
    except PolynomialError:
        return [(1, 1)] * times
    coefficients = [c for c in poly.coeffs() if c.is_Integer]
    all_integers = len(coefficients) == len(poly.coeffs())
    return [(poly.total_degree(), gcd(*map(int, coefficients)) if all_integers else 1)] * times


def _expanded(_: str, __: str, gold: Any, answer: Any) -> bool:
    from sympy import Add, expand

    terms = list(_terms(answer))
    if any(part.is_Add and part.free_symbols for term in terms for part in _parts(term)):
        return False
    return len(terms) == len(Add.make_args(expand(answer.doit()))) == len(list(_terms(gold)))


def _multiplied(_: str, __: str, ___: Any, answer: Any) -> bool:
    return not any(part.is_Add for term in _terms(answer) for part in _parts(term))


def _positive(_: str, text: str, __: Any, ___: Any) -> bool:
    return not re.search(r"\^ ?\{? ?-", text)


def _slope(_: str, text: str, __: Any, ___: Any) -> bool:
    return "=" not in text or re.match(r"\s*y\s*=", text) is not None


def _isolated(gold_text: str, text: str, _: Any, __: Any) -> bool:
    name, *rest = gold_text.split("=")
    sides = text.split("=")
    if len(rest) != 1 or len(sides) != 2:
        return True
    own = [re.sub(r"[{}\s]", "", side) for side in (name, *sides)]
    return any(own[n] == own[0] and own[0] not in re.sub(r"\\[a-z]+", "", own[3 - n]) for n in (1, 2))


def _square(_: str, __: str, ___: Any, answer: Any) -> bool:
    return any(node.is_Pow and node.exp == 2 and node.base.is_Add for node in _nodes(answer))


def _prime(_: str, text: str, __: Any, ___: Any) -> bool:
    from sympy import isprime

    factors = [re.fullmatch(r"([0-9]{1,15})(?:\^\{?[0-9]+\}?)?", part.strip()) for part in _TIMES.split(text)]
    return all(part is not None and isprime(int(part[1])) for part in factors)


def _single(_: str, __: str, ___: Any, answer: Any) -> bool:
    logs = sum(type(node).__name__ == "log" for node in _nodes(answer))
    return len(list(_terms(answer))) == 1 and logs <= 1


def echoes(answer: Any, gold: Any, pieces: Sequence[Any]) -> bool:
    """Whether an answer has the shape of a piece of the question, and the gold answer has another."""
    shape = _shape(answer)
    return isinstance(shape, tuple) and shape != _shape(gold) and shape in map(_shape, pieces)


def _shape(tree: Any) -> Any:
    """A tree without the order of terms and factors, zeros and ones, its powers of ten written out; a number or a name
    is a text."""
    if tree.is_Add or tree.is_Mul:
        flat = _terms(tree) if tree.is_Add else _flat(tree)
        parts = sorted(map(_shape, flat), key=repr)
        parts = [part for part in parts if part != ("0" if tree.is_Add else "1")]
        return parts[0] if len(parts) == 1 else (("+" if tree.is_Add else "*"), *parts)
    if tree.is_Pow and tree.exp == 1:
        return _shape(tree.base)
    if tree.is_Pow and tree.base == 10 and tree.exp.is_Integer and 0 < tree.exp < 100:
        return str(10 ** int(tree.exp))
    return (type(tree).__name__, *map(_shape, tree.args)) if tree.args else str(tree)


def _parts(term: Any) -> Iterator[Any]:
    """The factors of a term, and the bases of their powers."""
    if term.is_Mul:
        for part in term.args:
            yield from _parts(part)
    elif term.is_Pow:
        yield from _parts(term.base)
    else:
        yield term


def _terms(tree: Any) -> Iterator[Any]:
    if tree.is_Add:
        for part in tree.args:
            yield from _terms(part)
    else:
        yield tree


def _simplified(gold_text: str, text: str, gold: Any, answer: Any) -> bool:
    if any(
        gcd(int(top), int(bottom)) > 1 for a, b, c, d in _FRACTION.findall(text) for top, bottom in [(a or c, b or d)]
    ):
        return False
    if not _rational(gold_text, text, gold, answer) or _size(answer) > _size(gold) + LONGER:
        return False
    return all(map(_clean, _nodes(answer)))


def _rational(_: str, __: str, gold: Any, answer: Any) -> bool:
    return not _root_below(answer) or (answer is not gold and _root_below(gold))


def _root_below(tree: Any) -> bool:
    return any(
        node.is_Pow and node.exp.is_number and node.exp.is_negative and any(map(_root, _nodes(node)))
        for node in _nodes(tree)
    )


def _root(node: Any) -> bool:
    return bool(node.is_Pow and node.base.is_number and node.exp.is_Rational and node.exp.q > 1)


def _nodes(tree: Any) -> Iterator[Any]:
    from sympy import Basic, preorder_traversal

    return (node for node in preorder_traversal(tree) if isinstance(node, Basic) and hasattr(node, "is_Add"))


def _size(tree: Any) -> int:
    """How many numbers and letters it has, without 1 and -1."""
    return sum(not node.args and node not in (1, -1) for node in _nodes(tree))


def _clean(node: Any) -> bool:
    """Whether nothing at this node is left to work out."""
    from sympy import Add, Pow

    if node.is_Add:
        return len(list(_terms(node))) == len(Add.make_args(node.doit()))
    if node.is_Mul:
        factors = [part for part in _divided(node) if part not in (1, -1)]
        above = [part for part in factors if part.is_Rational and part.p != 1]
        below = [part for part in factors if (part.is_Rational and part.q != 1) or _inverse(part)]
        bases = [part.base if part.is_Pow else part for part in factors if part.free_symbols]
        roots = [part for part in factors if _root(part)]
        if max(len(above), len(below), len(roots)) > 1 or len(bases) != len(set(bases)):
            return False
        return not (above and below) or gcd(int(above[0].p), _bottom(below[0])) == 1
    if node.is_Pow and node.base.is_number and node.exp.is_Rational and not node.base.has(Add):
        if node.exp.is_Integer:
            return node.exp == -1 or node.base.is_Integer is not True or abs(node.exp) > 20 or node.base == 10
        done = Pow(node.base.doit(), node.exp)
        return bool(done.is_Pow and done.exp == node.exp)
    return True


def _bottom(part: Any) -> int:
    return int(part.base if part.is_Pow else part.q)


def _inverse(part: Any) -> bool:
    return bool(part.is_Pow and part.base.is_Integer and part.exp.is_Integer and part.exp.is_negative)


def _flat(tree: Any) -> Iterator[Any]:
    if tree.is_Mul:
        for part in tree.args:
            yield from _flat(part)
    else:
        yield tree


def _divided(node: Any) -> Iterator[Any]:
    """The factors of a product, one by one below the line too: 9ab below it is 1/9, 1/a, 1/b."""
    from sympy import Pow

    for part in _flat(node):
        if part.is_Pow and part.base.is_Mul and part.exp.is_Integer and part.exp.is_negative:
            yield from (Pow(inner, part.exp, evaluate=False) for inner in _flat(part.base))
        else:
            yield part


_KEPT: dict[str, Callable[[str, str, Any, Any], bool]] = {
    "factor": _factored,
    "expand": _expanded,
    "simplify": _simplified,
    "rationalize": _rational,
    "complex": _multiplied,
    "positive": _positive,
    "slope": _slope,
    "isolated": _isolated,
    "square": _square,
    "prime": _prime,
    "single": _single,
}
