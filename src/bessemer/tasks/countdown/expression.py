"""A safe reader of arithmetic: + - * / and parentheses over ASCII natural numbers, exact, bounded, without eval.

The result carries a canonical form, so that votes are cast for expressions and not for values (voting by value would
tell the voter what the verifier wants). Two expressions share it when commutativity, associativity and the opening of
-( ) and /( ) turn one into the other: 6+7*3, (3*7)+6 -> 6+3*7; 9-(5-2), 2+9-5 -> 2+9-5. Nothing is multiplied out.
"""

from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 200
MAX_DEPTH = 20
MAX_DIGITS = 6
MAX_MAGNITUDE = 10**12  # of numerator and denominator, at every step

_DIGITS = frozenset("0123456789")
_SYMBOLS = frozenset("+-*/()")


class Unparsable(ValueError):
    """The text is not an expression of this grammar, breaks a bound, or divides by zero."""


@dataclass(frozen=True)
class Expression:
    """`numbers` in the order written, repeats kept."""

    value: Fraction
    numbers: tuple[int, ...]
    canonical: str


@dataclass(frozen=True)
class _Node:
    """A sum `up - down`, a product `up / down`, or a single number (`op` empty); parts are canonical strings."""

    value: Fraction
    op: str
    up: tuple[str, ...]
    down: tuple[str, ...] = ()

    def __str__(self) -> str:
        join, split = ("+", "-") if self.op == "+" else ("*", "/")
        return join.join(self.up) + "".join(split + part for part in self.down)

    def parts(self, op: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """This node as terms (op "+") or factors (op "*"): opened if it is of that kind, else one part."""
        if self.op == op:
            return self.up, self.down
        return ((f"({self})" if op == "*" and self.op == "+" else str(self)),), ()


def parse_expression(text: str) -> Expression:
    """Raises Unparsable; never anything else, whatever the text."""
    if len(text) > MAX_CHARS:
        raise Unparsable(f"longer than {MAX_CHARS} characters")
    tokens = _tokens(text)
    node, at = _sum(tokens, 0, 0)
    if at != len(tokens):
        raise Unparsable("something follows the expression")
    return Expression(node.value, tuple(int(t) for t in tokens if t[0] in _DIGITS), str(node))


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    while at < len(text):
        char = text[at]
        if char in _DIGITS:  # not str.isdigit: that accepts other scripts' digits and superscripts
            end = at
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if end - at > MAX_DIGITS or (char == "0" and end - at > 1):
                raise Unparsable("number too long or with a leading zero")
            tokens.append(text[at:end])
            at = end
        elif char in _SYMBOLS:
            tokens.append(char)
            at += 1
        elif char in " \n\t":
            at += 1
        else:
            raise Unparsable("a character that is no digit, operator or parenthesis")
    return tokens


def _sum(tokens: list[str], at: int, depth: int) -> tuple[_Node, int]:
    node, at = _product(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "+-":
        right, after = _product(tokens, at + 1, depth)
        node, at = _combine(node, tokens[at], right), after
    return node, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[_Node, int]:
    node, at = _atom(tokens, at, depth)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _atom(tokens, at + 1, depth)
        node, at = _combine(node, tokens[at], right), after
    return node, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[_Node, int]:
    if at >= len(tokens):
        raise Unparsable("ends where a number is due")
    if tokens[at][0] in _DIGITS:
        return _Node(Fraction(int(tokens[at])), "", (tokens[at],)), at + 1
    if tokens[at] != "(":
        raise Unparsable("an operator where a number is due")
    if depth == MAX_DEPTH:
        raise Unparsable(f"more than {MAX_DEPTH} parentheses deep")
    node, at = _sum(tokens, at + 1, depth + 1)
    if at >= len(tokens) or tokens[at] != ")":
        raise Unparsable("a parenthesis is not closed")
    return node, at + 1


def _combine(left: _Node, op: str, right: _Node) -> _Node:
    if op == "+":
        value = left.value + right.value
    elif op == "-":
        value = left.value - right.value
    elif op == "*":
        value = left.value * right.value
    elif right.value == 0:
        raise Unparsable("division by zero")
    else:
        value = left.value / right.value
    if max(abs(value.numerator), value.denominator) > MAX_MAGNITUDE:
        raise Unparsable("a value beyond the bound")
    kind = "+" if op in "+-" else "*"
    up, down = left.parts(kind)
    right_up, right_down = right.parts(kind)
    if op in "-/":  # the right side changes sides: a-(b-c) is a+c-b
        right_up, right_down = right_down, right_up
    return _Node(value, kind, _ordered(up + right_up), _ordered(down + right_down))


def _ordered(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(parts, key=lambda part: (len(part), part)))
