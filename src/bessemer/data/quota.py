"""Quotas: how many rows each part of a mixture gives in each period of equally many rows (reference I.2, I.3).

Constant weights give every period the same counts. Weights that are functions of consumed tokens, and caps on how often
a part may be read, give a table that is made before the run: what a period cannot give in whole rows is carried over to
the next, so that realised shares follow the weights to a row, whatever happens to the run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bessemer.errors import UserError

SLOTS = 1000
"""Rows of a period where weights are constant."""
PERIODS = 100_000
"""At most about so many in a table."""
SHORTEST = 32
"""Rows of a period in a table, at least: weights change no more finely than that."""

Weight = float | Callable[[float], float]
"""A share of the rows: constant, or a function of the tokens consumed."""


@dataclass(frozen=True)
class Span:
    """The stretch of a run that a mixture is for."""

    rows: int
    """How many will be read, about: beyond them the last period goes on."""
    first_token: int = 0
    """Tokens consumed before it."""
    caps: Mapping[str, float] = field(default_factory=dict)
    """Part = how many times it may be read in the whole run; absent: as often as the weights say."""
    read: Mapping[str, float] = field(default_factory=dict)
    """Part = how many times it was read before this stretch."""


class Quota:
    """`counts_PK[p]` rows of each of K parts in period p of `slots` rows; the last period goes on for ever."""

    def __init__(self, counts_PK: np.ndarray) -> None:
        self.counts_PK = counts_PK
        self.slots = int(counts_PK[0].sum())
        self.constant = len(counts_PK) == 1
        self._before_PK = np.vstack([np.zeros_like(counts_PK[:1]), counts_PK.cumsum(0)])

    def counts(self, period: int) -> np.ndarray:
        return self.counts_PK[min(period, len(self.counts_PK) - 1)]

    def before(self, period: int) -> np.ndarray:
        """Rows of each part in all periods before this one."""
        beyond = max(0, period - len(self.counts_PK))
        return self._before_PK[period - beyond] + beyond * self.counts_PK[-1]


def constant(names: Sequence[str], shares: Mapping[str, float]) -> Quota:
    counts = largest_remainder([shares[name] for name in names], SLOTS)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise UserError(
                f"the weight of {name} is below 1/{SLOTS} of the whole, so no row would come from it; raise it"
            )
    return Quota(np.array([counts]))


def planned(
    names: Sequence[str], weights: Mapping[str, Weight], rows_of: Mapping[str, int], row_length: int, span: Span
) -> tuple[Quota, dict[str, int]]:
    """The table for `span`, and at how many tokens parts came to their cap. UserError where nothing is left to read."""
    slots = max(SHORTEST, -(-span.rows // PERIODS))
    left = np.array([_left(name, rows_of[name], span) for name in names])
    carried, table, ended = np.zeros(len(names)), [], {}
    for period in range(max(1, -(-span.rows // slots))):
        tokens = span.first_token + (period + 0.5) * slots * row_length
        counts, carried = _period(_shares(names, weights, tokens, left), carried, left, slots)
        if counts.sum() < slots:
            raise UserError(
                f"the data ends at {tokens:,.0f} tokens: every part has been read as often as its cap allows "
                f"({', '.join(f'{name} {cap:g}' for name, cap in span.caps.items())} times); raise a cap, add text or "
                "train on fewer tokens"
            )
        left = left - counts
        for name, rest in zip(names, left, strict=True):
            if rest < 1 and name not in ended:
                ended[name] = round(tokens)
        table.append(counts)
    return Quota(np.array(table)), ended


def _left(name: str, n_rows: int, span: Span) -> float:
    """Rows that a part may still give."""
    cap = span.caps.get(name, float("inf"))
    return max(0.0, (cap - span.read.get(name, 0.0)) * n_rows) if cap < float("inf") else cap


def _shares(names: Sequence[str], weights: Mapping[str, Weight], tokens: float, left: np.ndarray) -> np.ndarray:
    """Shares of this moment among the parts that may still be read; they sum to 1, or to 0 if there is none."""
    found = np.array([w(tokens) if callable(w) else w for w in (weights[name] for name in names)], dtype=float)
    for name, weight in zip(names, found, strict=True):
        if not 0 <= weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight:g} at {tokens:,.0f} tokens; it must not be negative")
    if not found.sum():
        raise UserError(f"all weights are 0 at {tokens:,.0f} tokens; give one part a share there")
    if abs(found.sum() - 1) > 1e-6:
        warnings.warn(
            f"the mixture weights sum to {found.sum():.4g} at {tokens:,.0f} tokens, not 1; used as shares", stacklevel=2
        )
    found[left < 1] = 0
    return found / found.sum() if found.sum() else found


def _period(
    shares: np.ndarray, carried: np.ndarray, left: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(counts, what is carried over) of one period."""
    wanted = np.where(shares > 0, np.maximum(0.0, shares * slots + carried), 0.0)
    most = np.floor(np.minimum(left, slots)).astype(np.int64)
    counts = np.zeros(len(shares), dtype=np.int64)
    while (missing := slots - counts.sum()) and (open_ := (counts < most) & (shares > 0)).any():
        rest = np.where(
            open_, np.maximum(wanted - counts, shares * 1e-9), 0.0
        )  # who comes to a cap leaves to the others
        counts = np.minimum(counts + largest_remainder(list(rest / rest.sum()), int(missing)), most)
    return counts, np.where(counts < most, shares * slots + carried - counts, 0.0)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that sum to `total`."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
