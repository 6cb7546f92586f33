"""Mixture: several parts read as one endless list of rows, where row n is found by arithmetic.

The cursor of a run is one integer, the number of rows consumed. It means the same on any number of workers and at any
batch size, so resuming, or going on with another world size, reads exactly the rows that were not read yet.

Row n lies in slot n mod S of period n div S. How many slots of a period each part has is its quota (`quota`), their
order a permutation (`order`). The k-th row a part gives is number `k mod n_rows` of a permutation that belongs to
epoch `k // n_rows` of that part: no row comes twice before all have come once.
"""

import difflib
import warnings
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from bessemer.data import quota
from bessemer.data.batch import Batch
from bessemer.data.order import permutation_key, permute
from bessemer.data.quota import Span, Weight
from bessemer.data.rows import Rows, to_batch
from bessemer.errors import UserError


class Mixture:
    """`parts` by name, mixed by `weights` (shares of rows, hence of tokens up to the parts' different waste). Weights
    that change, and caps, need to know the `span` of the run they are for."""

    def __init__(
        self, parts: Mapping[str, Rows], weights: Mapping[str, Weight], seed: int = 0, span: Span | None = None
    ) -> None:
        self.parts = dict(sorted(parts.items()))
        self.names = list(self.parts)
        self.seed = seed
        self.ended: dict[str, int] = {}
        """Parts that come to their cap, and at how many tokens."""
        _check_named(self.names, weights)
        _check_alike(self.parts)
        rows_of = {name: part.n_rows for name, part in self.parts.items()}
        if span is not None and (span.caps or any(map(callable, weights.values()))):
            _check_caps(self.names, span)
            self.quota, self.ended = quota.planned(self.names, weights, rows_of, self.row_length, span)
        else:
            self.quota = quota.constant(self.names, _normalised(self.names, weights))
        self._known = lru_cache(4)(self._ordered)
        read = {} if span is None else span.read
        self._first = np.array([round(read.get(name, 0.0) * rows_of[name]) for name in self.names])

    @property
    def row_length(self) -> int:
        return next(iter(self.parts.values())).row_length

    def locate(self, n: int) -> tuple[str, int]:
        """Part and row number within it of row `n`."""
        names, rows = self._locate(np.array([n]))
        return self.names[names[0]], int(rows[0])

    def batch(self, first_row: int, n_rows: int) -> Batch:
        """Rows `first_row` to `first_row + n_rows`, not included."""
        which, rows = self._locate(np.arange(first_row, first_row + n_rows))
        tokens_BT = np.empty((n_rows, self.row_length), dtype=np.int64)
        for number, part in enumerate(self.parts.values()):
            mine = which == number
            tokens_BT[mine] = part.take(rows[mine])
        return to_batch(tokens_BT, next(iter(self.parts.values())).pad_id)

    def realised(self, first_row: int, n_rows: int) -> dict[str, float]:
        """The share of each part in these rows."""
        shares = (self._given(first_row + n_rows) - self._given(first_row)) / max(1, n_rows)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often each part has been read through after `n_rows` rows, earlier stretches included."""
        taken = self._first + self._given(n_rows)
        return {name: float(taken[i] / part.n_rows) for i, (name, part) in enumerate(self.parts.items())}

    def _given(self, n_rows: int) -> np.ndarray:
        """Rows of each part among the first `n_rows`."""
        period, rest = divmod(n_rows, self.quota.slots)
        return self.quota.before(period) + np.bincount(self._pattern(period)[0][:rest], minlength=len(self.names))

    def _ordered(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """Of every slot of a period: its part, and how many slots of that part lie before it."""
        counts = self.quota.counts(period)
        key = permutation_key(self.seed, "pattern", period)
        pattern = np.repeat(np.arange(len(counts)), counts)[permute(np.arange(counts.sum()), int(counts.sum()), key)]
        rank = np.empty(len(pattern), dtype=np.int64)
        for part, count in enumerate(counts):
            rank[pattern == part] = np.arange(count)
        return pattern, rank

    def _pattern(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """`_ordered`; with constant weights every period is like the first."""
        return self._known(0 if self.quota.constant else period)

    def _locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period, slot = np.divmod(n, self.quota.slots)
        which, kth = np.empty(len(n), dtype=np.int64), np.empty(len(n), dtype=np.int64)
        for one in np.unique(period):
            here = period == one
            which[here], kth[here] = self._slots(int(one), slot[here])
        rows = np.empty(len(n), dtype=np.int64)
        for number, (name, part) in enumerate(self.parts.items()):
            mine = which == number
            epochs, places = np.divmod(kth[mine], part.n_rows)
            found = np.empty(len(places), dtype=np.int64)
            for epoch in np.unique(epochs):
                now = epochs == epoch
                found[now] = permute(places[now], part.n_rows, permutation_key(self.seed, name, int(epoch)))
            rows[mine] = found
        return which, rows

    def _slots(self, period: int, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(part, how many rows of that part come before) of some slots of a period."""
        pattern, rank = self._pattern(period)
        which = pattern[slot]
        return which, (self._first + self.quota.before(period))[which] + rank[slot]


def by_size(parts: Mapping[str, Rows], temperature: float) -> dict[str, float]:
    """Shares in proportion to n^temperature of the parts' tokens n: 1 takes them as they are, 0 all alike (I.3)."""
    sizes = {name: rows.facts["tokens"] ** temperature for name, rows in parts.items()}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def _check_named(names: list[str], weights: Mapping[str, Weight]) -> None:
    if not names:
        raise UserError("a mixture needs at least one part")
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            raise UserError(
                f"weight for {name!r}, but there is no such part; {f'did you mean {near[0]!r}?' if near else names}"
            )
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"no weight for {', '.join(missing)}; give one, or leave the part out")


def _check_caps(names: list[str], span: Span) -> None:
    for name, cap in span.caps.items():
        if name not in names:
            raise UserError(f"a cap for {name!r}, but the mixture has {', '.join(names)}")
        if not cap > 0:
            raise UserError(f"the cap of {name} is {cap:g}; it must be positive (leave the part out to use none of it)")


def _normalised(names: list[str], weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(
                f"the weight of {name} is {weight}; it must be positive (leave the part out to use none of it)"
            )
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        shares = ", ".join(f"{name} {weights[name] / total:.4f}" for name in names)
        warnings.warn(f"the mixture weights sum to {total:g}, not 1; used as shares: {shares}", stacklevel=3)
    return {name: weights[name] / total for name in names}


def _check_alike(parts: dict[str, Rows]) -> None:
    first_name, first = next(iter(parts.items()))
    for name, part in parts.items():
        if part.n_rows == 0:
            raise UserError(f"the part {name} has no rows ({part.path})")
        if part.row_length != first.row_length:
            raise UserError(
                f"rows of {name} have length {part.row_length}, of {first_name} {first.row_length}; build them alike"
            )
        if part.tokenizer != first.tokenizer:
            raise UserError(f"{name} and {first_name} were made with different tokenizers; build them with one")
