"""Arithmetic expressions of countdown: a safe parser, and every way to combine three numbers.

The parser takes + - * / and parentheses over ASCII natural numbers; it is exact, bounded, and uses no eval. The result
carries a canonical form, so that votes are for expressions and not for values (voting by value would reveal what
the verifier expects). Two expressions share it when commutativity, associativity and the expansion of -( ) and /( )
turn one into the other: 6+7*3, (3*7)+6 -> 6+3*7; 9-(5-2), 2+9-5 -> 2+9-5. Nothing is multiplied out.

A try is written `(3*7)+6=21+6=27`: the expression first, then one step at a time. So the answer is a literal copy of
the start of the try, and the model need not rewrite steps as an expression (a base model trained on `3*7=21,21+6=27`
copied the right answer in 15 % of the cases). Subtraction puts the larger number first, so nothing is ever negative,
and no step passes LARGEST: such a try cannot reach a target of at most 60, and small numbers keep the arithmetic
learnable. The form is short: in V3's pre-split a number of up to three digits is one token, and a space before it would
be another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

MAX_CHARS = 200
MAX_DEPTH = 20
MAX_DIGITS = 15
MAX_MAGNITUDE = 10**40  # of numerator and denominator, at every step

_DIGITS = frozenset("0123456789")
_SYMBOLS = frozenset("+-*/()")

LARGEST = 120
OPS = "+-*"


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
    """Parses an expression. Raises Unparsable, and nothing else, for any other text."""
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
        elif char in " \r\n\t":
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


def apply(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left * right if op == "*" else left - right


@dataclass(frozen=True)
class Try:
    """`(x op y) then z`, or `z-(x op y)` if that is the non-negative order."""

    x: int
    op: str
    y: int
    then: str
    z: int

    @property
    def middle(self) -> int:
        return apply(self.x, self.op, self.y)

    @property
    def value(self) -> int:
        middle = self.middle
        return abs(middle - self.z) if self.then == "-" else apply(middle, self.then, self.z)

    def swapped(self) -> "Try":
        """The same try with its first two operands exchanged, unless they are subtracted."""
        return self if self.op == "-" else Try(self.y, self.op, self.x, self.then, self.z)

    def write(self, err: Callable[[int, int], int] = lambda value, largest: value) -> tuple[str, int, str]:
        """(steps, claimed value, expression). `err(value, largest)` is the value the author writes down for a step."""
        # a slip must not push the second step past LARGEST either
        room = LARGEST // self.z if self.then == "*" else LARGEST - self.z
        middle = err(self.middle, room)
        first = f"{self.x}{self.op}{self.y}"
        if self.then == "-" and self.z > middle:
            claimed = err(self.z - middle, LARGEST)
            return f"{self.z}-({first})={self.z}-{middle}={claimed}", claimed, f"{self.z}-({first})"
        claimed = err(apply(middle, self.then, self.z), LARGEST)
        expression = f"({first}){self.then}{self.z}"
        return f"{expression}={middle}{self.then}{self.z}={claimed}", claimed, expression

    @property
    def expression(self) -> str:
        return self.write()[2]

    @property
    def canonical(self) -> str:
        return parse_expression(self.expression).canonical


@cache  # at most the 680 multisets of the task
def all_tries(numbers: tuple[int, int, int]) -> tuple[Try, ...]:
    """What an unsystematic author samples from: up to 27 tries, some of which are the same expression."""
    a, b, c = sorted(numbers, reverse=True)
    pairs = ((a, b, c), (a, c, b), (b, c, a))
    return _within(Try(x, op, y, then, z) for x, y, z in pairs for op in OPS for then in OPS)


@cache
def ordered_tries(numbers: tuple[int, int, int]) -> tuple[Try, ...]:
    """A fixed walk through all different expressions, at most 17, for the author who never repeats.

    With a >= b >= c the pair (a, b) covers every sum of the three with signs and the product of all; the other two
    pairs add only the four shapes that are new. So the walk needs no memory beyond the last try.
    """
    a, b, c = sorted(numbers, reverse=True)
    new_shapes = (("+", "*"), ("-", "*"), ("*", "+"), ("*", "-"))
    walk = [Try(a, op, b, then, c) for op in OPS for then in OPS]
    walk += [Try(x, op, y, then, z) for x, y, z in ((a, c, b), (b, c, a)) for op, then in new_shapes]
    different = {t.canonical: t for t in reversed(_within(walk))}  # equal numbers make equal tries: keep the first
    return tuple(reversed(different.values()))


def _within(tries: Iterable[Try]) -> tuple[Try, ...]:
    return tuple(t for t in tries if t.middle <= LARGEST and t.value <= LARGEST)


@cache
def canonicals(numbers: tuple[int, int, int]) -> tuple[str, ...]:
    """Canonical form of each of `all_tries(numbers)`."""
    return tuple(t.canonical for t in all_tries(numbers))
