"""Elementary functions rounded once, so that the files come out the same on every machine.

The libraries behind numpy and math differ in the last bit of exp, log, sin and sums. Here a function is computed with
40 decimal digits and rounded to the nearest float64, and sums are exact before they are rounded. Slow and small, like
the references that use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Context, Decimal
from fractions import Fraction

DIGITS = Context(prec=40, Emin=-999999, Emax=999999)
PI = Decimal("3.1415926535897932384626433832795028841971693993751")


def exp(x: float) -> float:
    return 0.0 if x == -math.inf else float(DIGITS.exp(Decimal(x)))


def log(x: float) -> float:
    return -math.inf if x == 0 else float(DIGITS.ln(Decimal(x)))


def power(x: float, y: float) -> float:
    """x^y, x > 0."""
    return float(DIGITS.exp(DIGITS.multiply(Decimal(y), DIGITS.ln(Decimal(x)))))


def sigmoid(x: float) -> float:
    return float(DIGITS.divide(Decimal(1), DIGITS.add(1, DIGITS.exp(Decimal(-x)))))


def sine_cosine(x: float) -> tuple[float, float]:
    """By Taylor's series, after whole turns are taken away."""
    angle = DIGITS.subtract(Decimal(x), DIGITS.multiply(round(x / (2 * math.pi)), DIGITS.multiply(2, PI)))
    term, sums = Decimal(1), [Decimal(0), Decimal(0)]
    for n in range(1, 60):
        sums[n % 2 ^ 1] = DIGITS.add(sums[n % 2 ^ 1], term if (n - 1) % 4 < 2 else -term)
        term = DIGITS.divide(DIGITS.multiply(term, angle), n)
    return float(sums[1]), float(sums[0])


def total(values: Iterable[float]) -> float:
    """The sum, rounded once."""
    return math.fsum(values)


def mean(values: Iterable[float]) -> float:
    entries = list(values)
    return float(sum(map(Fraction, entries), Fraction(0)) / len(entries))


def dot(a: Iterable[float], b: Iterable[float]) -> float:
    """The product of two vectors, rounded once."""
    return float(sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0)))


def softmax(values: Iterable[float]) -> list[float]:
    entries = list(values)
    top = max(entries)
    raised = [exp(value - top) for value in entries]
    return [value / total(raised) for value in raised]


def log_softmax(values: Iterable[float]) -> list[float]:
    """-inf stays -inf."""
    entries = list(values)
    top = max(entries)
    norm = log(total(exp(value - top) for value in entries))
    return [value - top - norm for value in entries]
