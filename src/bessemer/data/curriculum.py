"""Curriculum: mixtures one after another, each with rows of its own length (reference I.2, I.4).

A step has the same number of tokens whatever the length of its rows, so a schedule of lengths changes nothing else in
a run. What each stretch reads of a part begins where the stretch before it ended, as a share of that part; rows of
another length are cut differently, so near a change of length some documents come again and some a little later.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bessemer.data.batch import Batch
from bessemer.data.mixture import Mixture
from bessemer.data.quota import Span, Weight
from bessemer.data.rows import Rows


@dataclass(frozen=True)
class Stretch:
    """Part of a run with rows of one length."""

    length: int
    first_token: int
    first_row: int
    rows: int


def stretches(tokens: int, length: Callable[[int], float], rows: Callable[[int], int]) -> list[Stretch]:
    """Those of a run over so many tokens, when `rows(tokens)` rows of `length(tokens)` tokens make a step."""
    done = row = 0
    found: list[Stretch] = []
    while done < tokens:
        now, n_rows = int(length(done)), rows(done)
        if not found or found[-1].length != now:
            found.append(Stretch(now, done, row, 0))
        row, done = row + n_rows, done + n_rows * now
        found[-1] = replace(found[-1], rows=row - found[-1].first_row)
    return found


class Curriculum:
    """`parts_of(length)` opens the parts with rows of that length; `weights` and `caps` as in `Mixture` and `Span`."""

    def __init__(
        self, plan: Sequence[Stretch], parts_of: Callable[[int], Mapping[str, Rows]], weights: Mapping[str, Weight],
        seed: int = 0, caps: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.plan = list(plan)
        self.mixtures: list[Mixture] = []
        read: dict[str, float] = {}
        for stretch in plan:
            span = Span(stretch.rows, stretch.first_token, caps or {}, read)
            mixture = Mixture(parts_of(stretch.length), weights, seed, span)
            read = mixture.epochs(stretch.rows)
            self.mixtures.append(mixture)

    @property
    def ended(self) -> dict[str, int]:
        """Parts that come to their cap, and at how many tokens."""
        found: dict[str, int] = {}
        for mixture in self.mixtures:
            found = mixture.ended | found
        return found

    def batch(self, tokens: int, first_row: int, n_rows: int) -> Batch:
        """The rows of a step that begins after so many tokens; `first_row` counts those of the whole run."""
        number = self._at(tokens)
        return self.mixtures[number].batch(first_row - self.plan[number].first_row, n_rows)

    def epochs(self, tokens: int, rows: int) -> dict[str, float]:
        """How often each part has been read after so many tokens and rows."""
        number = self._at(tokens - 1)
        return self.mixtures[number].epochs(rows - self.plan[number].first_row)

    def realised(self, tokens: int, rows: int) -> dict[str, float]:
        """Each part's share of the tokens read so far."""
        total: dict[str, float] = {}
        for number in range(self._at(tokens - 1) + 1):
            stretch, mixture = self.plan[number], self.mixtures[number]
            n_rows = rows - stretch.first_row if number == self._at(tokens - 1) else stretch.rows
            for name, share in mixture.realised(0, n_rows).items():
                total[name] = total.get(name, 0.0) + share * n_rows * stretch.length
        return {name: part / (sum(total.values()) or 1) for name, part in total.items()}

    def _at(self, tokens: int) -> int:
        return max(0, bisect_right(self.plan, tokens, key=lambda stretch: stretch.first_token) - 1)
