"""The shape of a schedule in the papers' words: constant, warm-up, step, cosine, linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from bessemer.config.units import Points


def levels(points: Points) -> list[float]:
    """The values of a step function, in order."""
    return [value for n, value in enumerate(points.values) if not n or value != points.values[n - 1]]


Point = tuple[float, float]


def _pieces(points: Points) -> list[tuple[str, Point, Point]]:
    """A schedule as (word, first point, last point). Consecutive falling pieces are one curve."""
    pieces: list[tuple[str, Point, Point]] = []
    ends: list[Point] = list(zip(points.tokens, points.values, strict=True))
    for left, right in pairwise(ends):
        level = "constant" if left[1] == right[1] else "warm-up" if left[1] < right[1] else "falling"
        word = "step" if left[0] == right[0] else level
        if word == "falling" and pieces and pieces[-1][0] == word:
            left = pieces.pop()[1]
        pieces.append((word, left, right))
    return [(_curve(points, left, right) if word == "falling" else word, left, right) for word, left, right in pieces]


def _curve(points: Points, left: Point, right: Point) -> str:
    """The name of a falling curve, judged at its quarter points."""

    def near(course: Callable[[float], float]) -> bool:
        tokens, fall = right[0] - left[0], left[1] - right[1]
        quarters = (0.25, 0.5, 0.75)
        return all(abs(points(left[0] + x * tokens) - right[1] - course(x) * fall) < 0.02 * fall for x in quarters)

    if near(lambda x: (1 + math.cos(math.pi * x)) / 2):
        return "cosine"
    return "linear" if near(lambda x: 1 - x) else "falling"


def shape(points: Points) -> list[str]:
    return [word for word, *_ in _pieces(points)] or ["constant"]


def corners(points: Points) -> Points:
    """The points between pieces."""
    ends = [list(end) for _, *both in _pieces(points) for end in both]
    return Points([end for n, end in enumerate(ends) if not n or end != ends[n - 1]] or points)
