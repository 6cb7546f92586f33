"""Schedules: every dial of a run as a function of consumed tokens (V3 4.2; progress is counted in tokens).

A schedule is any callable `(tokens, step) -> float`, evaluated with what was consumed *before* the step. `Points` is
the one a recipe writes; the `v3_*` functions are DeepSeek-V3's own run. `step` is there for the one published rule that
is counted in steps, the learning-rate warm-up.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from bessemer.errors import UserError

Schedule = Callable[[int, int], float]

T = 10**12
V3_TOKENS = 14_800_000_000_000
V3_ALPHA = 0.0001
"""Weight of the sequence-wise balance loss, constant in V3 4.2."""


class Points:
    """Straight lines between (tokens, value) points; constant before the first and after the last.

    Two points at the same token count make a jump: the later value holds from that token on.
    """

    def __init__(self, points: Sequence[Sequence[float]]):
        if not points:
            raise UserError("a schedule needs at least one [tokens, value] point")
        for point in points:
            if len(point) != 2 or not all(math.isfinite(x) for x in point) or point[0] < 0:
                raise UserError(f"schedule point {list(point)} is not [tokens >= 0, finite value]")
        for (before, _), (after, _) in pairwise(points):
            if after < before:
                raise UserError(f"schedule points must be sorted by tokens: {after:g} comes after {before:g}")
        self.points = [(float(tokens), float(value)) for tokens, value in points]
        self._at = [tokens for tokens, _ in self.points]

    @classmethod
    def constant(cls, value: float) -> Points:
        return cls([(0, value)])

    def __call__(self, tokens: int, step: int = 0) -> float:
        after = bisect_right(self._at, tokens)
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[after]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def __repr__(self) -> str:
        return f"Points({[list(point) for point in self.points]})"


def v3_lr(tokens: int, step: int) -> float:
    """Warm-up 2,000 steps, constant to 10T, cosine over 4.3T, two constant tails (V3 4.2)."""
    if step < 2000:
        return 2.2e-4 * step / 2000
    if tokens < 10 * T:
        return 2.2e-4
    if tokens < 14.3 * T:
        return 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (tokens - 10 * T) / (4.3 * T)))
    return 2.2e-5 if tokens < 14.633 * T else 7.3e-6


def v3_batch_rows(tokens: int, step: int = 0, multiple: int = 1) -> int:
    """Sequences per step: 3072 -> 15360 over the first 469B tokens, then 15360 (V3 4.2).

    The shape of the ramp is undocumented; linear in tokens here. `multiple` keeps every size divisible by the
    data-parallel degree.
    """
    rows = 3072 + (15360 - 3072) * min(1.0, tokens / 469e9)
    return int(rows) // multiple * multiple


def v3_mtp_lambda(tokens: int, step: int = 0) -> float:
    """Weight of the MTP loss (V3 4.2)."""
    return 0.3 if tokens < 10 * T else 0.1


def v3_gamma(tokens: int, step: int = 0) -> float:
    """Speed of the routing bias (V3 4.2)."""
    return 0.001 if tokens < 14.3 * T else 0.0
