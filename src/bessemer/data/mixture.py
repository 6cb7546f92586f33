"""Mixture: several sources read as one endless list of rows; row n is computed, without a table of rows.

The cursor of a run is one integer, the number of rows consumed. It does not depend on the number of
workers or the batch size, so a resumed run, even with another world size, reads exactly the rows not read yet.

Row n is in slot n mod S of period n div S. The number of slots of each source in a period is its quota; a permutation
(`rows.permute`) orders the slots. The k-th row of a source is element `k mod n_rows` of the permutation of epoch
`k // n_rows` of that source: no row repeats before every row has been read.

Constant weights give every period the same counts. Weights that are functions of consumed tokens, and caps on how often
a source may be read, use a table of counts computed before the run: fractions of rows carry over to the next period, so
that realised shares match the weights to within a row, even if the run is interrupted.

A `Curriculum` is a sequence of mixtures, each with its own row length. A step has the same number of tokens at
every row length, so a schedule of lengths changes nothing else in a run. Each section continues a source at the share
of it that earlier sections have read. Rows of another length are cut differently, so near a change of length some
documents repeat and some come a little later.
"""

from __future__ import annotations

import difflib
import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from bessemer.data.batch import Batch
from bessemer.data.rows import Rows, permutation_key, permute, to_batch
from bessemer.errors import UserError

SLOTS = 1000
"""Rows of a period where weights are constant."""
PERIODS = 100_000
"""Approximate maximum number of periods in a table."""
SHORTEST = 32
"""Minimum rows of a period in a table: weights cannot change more often than that."""

Weight = float | Callable[[float], float]
"""A share of the rows: constant, or a function of the tokens consumed."""


@dataclass(frozen=True)
class Span:
    """The section of a run that a mixture covers."""

    rows: int
    """Approximate number of rows to read; beyond them the last period repeats."""
    first_token: int = 0
    """Tokens consumed before it."""
    caps: Mapping[str, float] = field(default_factory=dict)
    """How many times each source may be read in the whole run; no limit for a source not named."""
    read: Mapping[str, float] = field(default_factory=dict)
    """How many times each source was read before this section."""


class Quota:
    """`counts_PK[p]` rows of each of K sources in period p of `slots` rows; the last period repeats, and may be shorter
    if it ends with the run."""

    def __init__(self, counts_PK: np.ndarray) -> None:
        self.counts_PK = counts_PK
        self.slots = int(counts_PK[0].sum())
        self.constant = len(counts_PK) == 1
        self._before_PK = np.vstack([np.zeros_like(counts_PK[:1]), counts_PK.cumsum(0)])

    def counts(self, period: int) -> np.ndarray:
        return self.counts_PK[min(period, len(self.counts_PK) - 1)]

    def before(self, period: int) -> np.ndarray:
        """Rows of each source in all periods before this one."""
        beyond = max(0, period - len(self.counts_PK))
        return self._before_PK[period - beyond] + beyond * self.counts_PK[-1]


def constant_quota(names: Sequence[str], shares: Mapping[str, float]) -> Quota:
    counts = largest_remainder([shares[name] for name in names], SLOTS)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            raise UserError(
                f"the weight of {name} is below 1/{SLOTS} of the whole, so no row would come from it; raise it"
            )
    return Quota(np.array([counts]))


def planned_quota(
    names: Sequence[str], weights: Mapping[str, Weight], rows_of: Mapping[str, int], row_length: int, span: Span
) -> tuple[Quota, dict[str, int]]:
    """The table for `span`, and the tokens at which sources reach their cap. Raises UserError if no data is left."""
    slots = max(SHORTEST, -(-span.rows // PERIODS))
    rows_left = np.array([_left(name, rows_of[name], span) for name in names])
    carried, table = np.zeros(len(names)), []
    ended: dict[str, int] = {}
    for period in range(max(1, -(-span.rows // slots))):
        tokens = span.first_token + (period + 0.5) * slots * row_length
        # Without caps the last period is whole, so those runs keep their rows.
        n_rows = min(slots, span.rows - period * slots) if span.caps else slots
        shares = _shares(names, weights, tokens, rows_left)
        due = shares * n_rows + carried
        counts, carried = _period(shares, carried, rows_left, n_rows)
        if counts.sum() < n_rows:
            raise UserError(
                f"the data runs out at {tokens:,.0f} tokens: every source has been read as often as its cap allows "
                f"({', '.join(f'{name} {cap:g}' for name, cap in span.caps.items())} times); raise a cap, add text or "
                "train on fewer tokens"
            )
        # A source that just lasts to the end of the run has not ended: no row of it is missing.
        needed = (rows_left < 1) | (due - counts >= 1) | ((period + 1) * slots < span.rows)
        rows_left = rows_left - counts
        for slot in np.flatnonzero((rows_left < 1) & needed).tolist():
            ended.setdefault(names[slot], round(tokens))
        table.append(counts)
    return Quota(np.array(table)), ended


def _left(name: str, n_rows: int, span: Span) -> float:
    """Rows that a source can still supply."""
    cap = span.caps.get(name, float("inf"))
    return max(0.0, (cap - span.read.get(name, 0.0)) * n_rows) if cap < float("inf") else cap


def _shares(names: Sequence[str], weights: Mapping[str, Weight], tokens: float, rows_left: np.ndarray) -> np.ndarray:
    """Current shares of the sources that may still be read; they sum to 1, or to 0 if there is none."""
    shares = np.array([w(tokens) if callable(w) else w for w in (weights[name] for name in names)], dtype=float)
    for name, weight in zip(names, shares, strict=True):
        if not 0 <= weight < float("inf"):
            raise UserError(f"the weight of {name} is {weight:g} at {tokens:,.0f} tokens; it must not be negative")
    if not shares.sum():
        raise UserError(f"all weights are 0 at {tokens:,.0f} tokens; give one source a share there")
    if abs(shares.sum() - 1) > 1e-6:
        warnings.warn(
            f"the mixture weights sum to {shares.sum():.4g} at {tokens:,.0f} tokens, not 1; used as shares",
            stacklevel=2,
        )
    shares[rows_left < 1] = 0
    return shares / shares.sum() if shares.sum() else shares


def _period(
    shares: np.ndarray, carried: np.ndarray, rows_left: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """(counts, rows carried over) of one period."""
    due = np.where(shares > 0, np.maximum(0.0, shares * slots + carried), 0.0)
    most = np.floor(np.minimum(rows_left, slots)).astype(np.int64)
    counts = np.zeros(len(shares), dtype=np.int64)
    while (missing := slots - counts.sum()) and (available := (counts < most) & (shares > 0)).any():
        remainder = np.where(
            available, np.maximum(due - counts, shares * 1e-9), 0.0
        )  # the others make up for a capped source
        counts = np.minimum(counts + largest_remainder(list(remainder / remainder.sum()), int(missing)), most)
    return counts, np.where(counts < most, shares * slots + carried - counts, 0.0)


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `shares` that sum to `total`."""
    exact = [share * total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


class Mixture:
    """`sources` by name, mixed by `weights` (shares of rows; shares of tokens differ by the
    padding of each source). Weights that change, and caps, need the `span` of the run."""

    def __init__(
        self, sources: Mapping[str, Rows], weights: Mapping[str, Weight], seed: int = 0, span: Span | None = None
    ) -> None:
        self.sources = dict(sorted(sources.items()))
        self.names = list(self.sources)
        self.seed = seed
        self.ended: dict[str, int] = {}
        """Sources that reach their cap, and at how many tokens."""
        _check_named(self.names, weights)
        _check_alike(self.sources)
        rows_of = {name: rows.n_rows for name, rows in self.sources.items()}
        if span is not None and (span.caps or any(map(callable, weights.values()))):
            _check_caps(self.names, span)
            self.quota, self.ended = planned_quota(self.names, weights, rows_of, self.row_length, span)
        else:
            constant = {name: weight for name, weight in weights.items() if not callable(weight)}
            self.quota = constant_quota(self.names, _normalised(self.names, constant))
            if span is None or not span.first_token:  # once in a run, for its first section
                _report_sum(constant)
        self._known = lru_cache(4)(self._ordered)
        read = {} if span is None else span.read
        self._first = np.array([round(read.get(name, 0.0) * rows_of[name]) for name in self.names])

    @property
    def row_length(self) -> int:
        return next(iter(self.sources.values())).row_length

    def locate(self, n: int) -> tuple[str, int]:
        """Source and row number within it of row `n`."""
        names, rows = self._locate(np.array([n]))
        return self.names[names[0]], int(rows[0])

    def batch(self, first_row: int, n_rows: int, masked: bool = False) -> Batch:
        """Rows `first_row` to `first_row + n_rows`, excluding the latter; `masked`: with the documents as segments."""
        which, rows = self._locate(np.arange(first_row, first_row + n_rows))
        tokens_BT, length_B = np.empty((n_rows, self.row_length), dtype=np.int64), np.empty(n_rows, dtype=np.int64)
        documents_BT = np.empty_like(tokens_BT) if masked else None
        for number, source in enumerate(self.sources.values()):
            of_part = which == number
            tokens_BT[of_part], length_B[of_part] = source.take(rows[of_part]), source.lengths(rows[of_part])
            if documents_BT is not None:
                documents_BT[of_part] = source.documents_of(rows[of_part])
        return to_batch(tokens_BT, length_B, documents_BT)

    def realised(self, first_row: int, n_rows: int) -> dict[str, float]:
        """The share of each source in these rows."""
        shares = (self._given(first_row + n_rows) - self._given(first_row)) / max(1, n_rows)
        return dict(zip(self.names, shares.tolist(), strict=True))

    def epochs(self, n_rows: int) -> dict[str, float]:
        """How often each source has been read through after `n_rows` rows, earlier sections included."""
        used = self._first + self._given(n_rows)
        return {name: float(used[i] / source.n_rows) for i, (name, source) in enumerate(self.sources.items())}

    def _given(self, n_rows: int) -> np.ndarray:
        """Rows of each source among the first `n_rows`."""
        period, rest = divmod(n_rows, self.quota.slots)
        return self.quota.before(period) + np.bincount(self._pattern(period)[0][:rest], minlength=len(self.names))

    def _ordered(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """For every slot of a period: its source, and how many slots of that source precede it."""
        counts = self.quota.counts(period)
        key = permutation_key(self.seed, "pattern", period)
        pattern = np.repeat(np.arange(len(counts)), counts)[permute(np.arange(counts.sum()), int(counts.sum()), key)]
        pattern = np.resize(pattern, self.quota.slots)  # rows after the end of the run repeat its last period
        rank = np.empty(len(pattern), dtype=np.int64)
        for source in range(len(counts)):
            rank[pattern == source] = np.arange((pattern == source).sum())
        return pattern, rank

    def _pattern(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        """`_ordered`; with constant weights every period is like the first."""
        return self._known(0 if self.quota.constant else period)

    def _locate(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period, slot = np.divmod(n, self.quota.slots)
        which, kth = np.empty(len(n), dtype=np.int64), np.empty(len(n), dtype=np.int64)
        for number_of_period in np.unique(period):
            in_period = period == number_of_period
            which[in_period], kth[in_period] = self._slots(int(number_of_period), slot[in_period])
        rows = np.empty(len(n), dtype=np.int64)
        for number, (name, source) in enumerate(self.sources.items()):
            of_part = which == number
            epochs, places = np.divmod(kth[of_part], source.n_rows)
            images = np.empty(len(places), dtype=np.int64)
            for epoch in np.unique(epochs):
                in_period = epochs == epoch
                images[in_period] = permute(
                    places[in_period], source.n_rows, permutation_key(self.seed, name, int(epoch))
                )
            rows[of_part] = images
        return which, rows

    def _slots(self, period: int, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of earlier rows of that source) of some slots of a period."""
        pattern, rank = self._pattern(period)
        which = pattern[slot]
        return which, (self._first + self.quota.before(period))[which] + rank[slot]


def by_size(sources: Mapping[str, Rows], temperature: float) -> dict[str, float]:
    """Shares in proportion to n^temperature of the sources' tokens n: 1 keeps their sizes, 0 makes all equal."""
    sizes = {name: rows.facts["tokens"] ** temperature for name, rows in sources.items()}
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}


def _check_named(names: list[str], weights: Mapping[str, Weight]) -> None:
    if not names:
        raise UserError("a mixture needs at least one source")
    for name in weights:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            raise UserError(
                f"weight for {name!r}, but there is no such source; {f'did you mean {near[0]!r}?' if near else names}"
            )
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"no weight for {', '.join(missing)}; give one, or leave the source out")


def _check_caps(names: list[str], span: Span) -> None:
    for name, cap in span.caps.items():
        if name not in names:
            raise UserError(f"a cap for {name!r}, but the mixture has {', '.join(names)}")
        if not cap > 0:
            raise UserError(f"the cap of {name} is {cap:g}; it must be positive (leave the source out to skip it)")


def _normalised(names: list[str], weights: Mapping[str, float]) -> dict[str, float]:
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(
                f"the weight of {name} is {weight}; it must be positive (leave the source out to use none of it)"
            )
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}


def _report_sum(weights: Mapping[str, float]) -> None:
    total = sum(weights.values())
    if abs(total - 1) > 1e-6:
        shares = ", ".join(f"{name} {weights[name] / total:.4f}" for name in sorted(weights))
        warnings.warn(f"the mixture weights sum to {total:g}, not 1; used as shares: {shares}", stacklevel=3)


def _check_alike(sources: dict[str, Rows]) -> None:
    first_name, first = next(iter(sources.items()))
    for name, rows in sources.items():
        if rows.n_rows == 0:
            raise UserError(f"the source {name} has no rows ({rows.path})")
        if rows.row_length != first.row_length:
            raise UserError(
                f"rows of {name} have length {rows.row_length}, of {first_name} {first.row_length}; build both alike"
            )
        if rows.tokenizer != first.tokenizer:
            raise UserError(f"{name} and {first_name} were made with different tokenizers; build both with one")


@dataclass(frozen=True)
class CurriculumSection:
    """A section of a run with rows of one length."""

    length: int
    first_token: int
    first_row: int
    rows: int


def sections(tokens: int, length: Callable[[int], float], rows: Callable[[int], int]) -> list[CurriculumSection]:
    """The sections of a run over `tokens` tokens, where a step has `rows(tokens)` rows of `length(tokens)` tokens."""
    done = row = 0
    plan: list[CurriculumSection] = []
    while done < tokens:
        row_length, n_rows = int(length(done)), rows(done)
        if n_rows < 1:  # the run would never end
            raise UserError(f"a step at {done:,} tokens has less than one row of {row_length} tokens; raise batch_rows")
        if not plan or plan[-1].length != row_length:
            plan.append(CurriculumSection(row_length, done, row, 0))
        row, done = row + n_rows, done + n_rows * row_length
        plan[-1] = replace(plan[-1], rows=row - plan[-1].first_row)
    return plan


class Curriculum:
    """`sources_of(length)` opens the sources with rows of that length; `weights`, `caps` as in `Mixture` and `Span`."""

    def __init__(
        self,
        plan: Sequence[CurriculumSection],
        sources_of: Callable[[int], Mapping[str, Rows]],
        weights: Mapping[str, Weight],
        seed: int = 0,
        caps: Mapping[str, float] | None = None,
    ) -> None:
        self.plan = list(plan)
        self.mixtures: list[Mixture] = []
        """One for each section."""
        read: dict[str, float] = {}
        for section in self.plan:
            span = Span(section.rows, section.first_token, caps or {}, read)
            self.mixtures.append(Mixture(sources_of(section.length), weights, seed, span))
            read = self.mixtures[-1].epochs(section.rows)

    @property
    def ended(self) -> dict[str, int]:
        """Sources that reach their cap, and at how many tokens."""
        ended: dict[str, int] = {}
        for mixture in self.mixtures:
            ended = mixture.ended | ended
        return ended

    def batch(self, tokens: int, first_row: int, n_rows: int, masked: bool = False) -> Batch:
        """The rows of a step that begins after `tokens` tokens; `first_row` counts the rows of the whole run;
        `masked`: with the documents as segments."""
        number = self._at(tokens)
        return self.mixtures[number].batch(first_row - self.plan[number].first_row, n_rows, masked)

    def epochs(self, tokens: int, rows: int) -> dict[str, float]:
        """How often each source has been read after these tokens and rows."""
        number = self._at(tokens - 1)
        return self.mixtures[number].epochs(rows - self.plan[number].first_row)

    def realised(self, tokens: int, rows: int) -> dict[str, float]:
        """Each source's share of the tokens read so far."""
        total: dict[str, float] = {}
        for number in range(self._at(tokens - 1) + 1):
            section, mixture = self.plan[number], self.mixtures[number]
            n_rows = rows - section.first_row if number == self._at(tokens - 1) else section.rows
            for name, share in mixture.realised(0, n_rows).items():
                total[name] = total.get(name, 0.0) + share * n_rows * section.length
        return {name: tokens / (sum(total.values()) or 1) for name, tokens in total.items()}

    def _at(self, tokens: int) -> int:
        return max(0, bisect_right(self.plan, tokens, key=lambda section: section.first_token) - 1)
