"""Every way to combine three numbers, and how one way is written down.

A try is written `(3*7)+6=21+6=27`: the expression first, then one step a time. So what is answered later is a literal
copy of how the try began, and the model need not rewrite steps as an expression (a base trained on `3*7=21,21+6=27`
copied the right answer in 15 % of the cases). Subtraction puts the larger number first, so nothing is ever negative,
and no step passes LARGEST: such a try cannot reach a target of at most 60, and small numbers keep the arithmetic
learnable.
The form is frugal: in V3's pre-split a number of up to three digits is one token, and a space before it would be
another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from bessemer.tasks.countdown.expression import parse_expression

LARGEST = 120
OPS = "+-*"


def apply(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left * right if op == "*" else left - right


@dataclass(frozen=True)
class Try:
    """`(x op y) then z`, or `z-(x op y)` where that is the non-negative order."""

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

    def turned(self) -> "Try":
        """The same try with the first two operands exchanged, where that changes nothing but the looks."""
        return self if self.op == "-" else Try(self.y, self.op, self.x, self.then, self.z)

    def write(self, err: Callable[[int, int], int] = lambda value, largest: value) -> tuple[str, int, str]:
        """(steps, claimed value, expression). `err(value, largest)` is what the author writes for a step's value."""
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
    """What an unsystematic author draws from: up to 27 tries, with the same expression reached in several ways."""
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
