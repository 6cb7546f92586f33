"""Whether a prompt may start: not only whether its pages are free now, but whether everything that runs will find the
pages that it is going to need.

A sequence that is preempted is prefilled again with all its tokens, so a scheduler that starts whatever fits now spends
several times the work of its prompts. Here the need is foreseen from the lengths of recent answers, as in LightLLM's
past-future scheduler: sequences end one after another, and the peak lies just before one of the ends. An estimate that
was too low costs a preemption, never a wrong answer, and one that was too high costs rows that stand empty, so only
most of what is expected is kept free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from bessemer.addons.serve.requests import ServedSequence
from bessemer.engine.kv_cache import PAGE, pages_for

FIRST = 4096
"""Expected tokens of an answer that may be longer, until answers have ended; as SGLang's bound."""
REMEMBERED = 128
"""Recent answers whose lengths count."""
SHARE = 0.75
"""Of the expected tokens, how many find room when a prompt starts. With answers of random lengths in small caches, 0.75
prefills 1.0 to 1.5 times the tokens of the prompts, 0.5 up to 1.6 in 5 to 10 % fewer steps, and starting what fits 1.2
to 3.3 times."""


class Need(NamedTuple):
    """What one sequence takes of the cache besides pages that others share with it."""

    tokens: int
    """Slots now, its next step's included, after the shared pages."""
    more: int
    """Tokens that it needs room for after that."""
    pages: int
    """The most pages that it can ever take."""


class AnswerLengths:
    """How long answers are, by those that have ended."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=REMEMBERED)
        self._sorted: list[int] = []
        self._sums: list[int] = []
        """Of the lengths from each place of `_sorted` on."""

    def ended(self, tokens: int) -> None:
        """An answer has ended with this many tokens."""
        self._recent.append(tokens)
        self._sorted = sorted(self._recent)
        self._sums = list(accumulate(reversed(self._sorted)))[::-1]

    def more(self, sequence: ServedSequence) -> int:
        """Tokens that a sequence needs room for: SHARE of what it is still expected to generate. Its expected length is
        the mean of the recent answers that were longer; if none was, a quarter more than it has."""
        n, most = len(sequence.tokens), sequence.request.max_new_tokens
        rank = bisect_right(self._sorted, n)
        if rank < len(self._sorted):
            length = -(-self._sums[rank] // (len(self._sorted) - rank))
        else:
            length = n + n // 4 + PAGE if self._sorted else FIRST
        return max(1, int(SHARE * (min(most, max(length, n + 1)) - n)))


def peak_pages(needs: Iterable[Need]) -> int:
    """The most pages that the sequences hold together until the last of them ends."""
    ordered = sorted(needs, key=lambda need: -need.more)
    most = 0
    for n, (tokens, need) in enumerate(zip(accumulate(need.tokens for need in ordered), ordered, strict=True), 1):
        # just before the n-th from the end does, with half an empty page each
        most = max(most, pages_for(tokens + n * need.more) + n // 2)
    return min(most, sum(need.pages for need in ordered))
