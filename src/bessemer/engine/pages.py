"""Pages of the latent cache: which are free, who uses them, and what is remembered in them.

A page holds PAGE consecutive tokens of a sequence. Sequences that begin alike share their full pages; a page that is
still being filled belongs to one sequence. A full page may be remembered under a key that stands for all tokens up to
its end: a later prompt that begins with the same tokens finds it and need not be computed again. Remembered pages
nobody uses count as free, and the one unused for longest is forgotten first.

Plain Python: this is bookkeeping per page, not per token.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

PAGE = 64
"""Tokens per page. Reading page by page costs least with long pages; on average half of one stays empty per row."""


class Pages:
    """Numbers of pages, from 0. Invariant: a page is in `_free`, in `_idle`, or has users."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._users: list[int] = []
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # remembered and unused, longest unused first

    @property
    def total(self) -> int:
        return len(self._users)

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def add(self, count: int) -> None:
        """The pool has grown by so many pages."""
        first = self.total
        self._users += [0] * count
        self._free += range(first + count - 1, first - 1, -1)

    def take(self, count: int) -> list[int]:
        """`count` pages with one user each; the caller has looked at `available`."""
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._users[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more user each."""
        for page in pages:
            self._users[page] += 1
            self._idle.pop(page, None)

    def release(self, pages: Iterable[int]) -> None:
        """One user less each."""
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def alone(self, page: int) -> bool:
        """The page has one user and nobody can find it."""
        return self._users[page] == 1 and page not in self._key

    def remember(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """The full pages among `pages` hold the beginning of `ids`."""
        for key, page in zip(keys(ids), pages, strict=False):
            if key not in self._page and page not in self._key:
                self._page[key], self._key[page] = page, key

    def find(self, ids: Sequence[int]) -> list[int]:
        """Remembered pages of the longest beginning of `ids` that leaves at least one token; not yet shared."""
        found = []
        for key in keys(ids[: len(ids) - 1]):
            if key not in self._page:
                break
            found.append(self._page[key])
        return found

    def forget_all(self) -> None:
        """What is remembered was made with other weights."""
        for page in list(self._key):
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._page[self._key.pop(page)]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)


def keys(ids: Sequence[int]) -> Iterable[bytes]:
    """One key per full page, each standing for everything up to the page's end."""
    key = b""
    for end in range(PAGE, len(ids) + 1, PAGE):
        key = hashlib.blake2b(key + array("q", ids[end - PAGE : end]).tobytes(), digest_size=16).digest()
        yield key


def pages_for(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE)
