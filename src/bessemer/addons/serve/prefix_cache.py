"""The latent cache of a server: it has a limit, and keeps full pages for later prompts that begin alike.

A full page is cached under a key that identifies all tokens that it depends on; a later prompt that begins with them
reuses it. Cached pages without users count as free; the least recently used is evicted first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from bessemer.engine.kv_cache import PAGE, LatentCache, PageAllocator, PromptPages, indices, pages_for


class CacheFull(Exception):
    """The pool has reached its limit and every page is in use."""


class PrefixCache(LatentCache):
    """`limit`: maximum number of tokens, rounded up to whole pages. `prefix_cache` False: no page is kept. All
    allocations raise CacheFull at the limit, before anything has changed."""

    def __init__(self, *shape: Any, limit: int | None = None, prefix_cache: bool = True) -> None:
        super().__init__(*shape)
        self.pages: CachedPages = CachedPages()
        self.prefix_cache = prefix_cache
        self.limit = None if limit is None else pages_for(limit)

    @property
    def allocated_bytes(self) -> int:
        return sum(pool.numel() * pool.element_size() for pool in self.layers)

    @property
    def used_tokens(self) -> int:
        """Slots of the pages in use by rows and prompts."""
        return (self.pages.total - self.pages.available) * PAGE

    def free_pages(self) -> int | None:
        """Pages that can still be allocated; None without a limit."""
        return None if self.limit is None else self.limit - self.pages.total + self.pages.available

    def open(self, ids: Sequence[int], keys: list[bytes] | None = None, max_length: int | None = None) -> PromptPages:
        """A prompt, starting from the longest cached prefix. keys: those of its pages that are already known; receives
        the others as they are computed. `asked` as in `PromptPages`."""
        prompt = super().open(ids, keys, max_length)
        if self.prefix_cache:
            prompt.keys = [] if keys is None else keys
            least = 0 if self.drafts else 1  # at least one token is left to compute
            prompt.pages = self.pages.match(prefix_keys(ids, len(ids) - least, self.drafts, prompt.keys))
            self.pages.share(prompt.pages)
            prompt.length = prompt.cached = len(prompt.pages) * PAGE
        return prompt

    def drop(self, prompt: PromptPages) -> None:
        """Releases a prompt that does not become a row; what is computed of it stays available."""
        if prompt.length > prompt.cached:
            self._cache_pages(prompt.ids, prompt.length, prompt.pages, prompt.keys)
        self.pages.release(prompt.pages)
        prompt.pages, prompt.length = [], 0

    def admit(self, prompts: Sequence[tuple[PromptPages, int]]) -> None:
        for prompt, _ in prompts:
            self._cache_pages(prompt.ids, prompt.length, prompt.pages, prompt.keys)
        super().admit(prompts)

    def cache_row(self, row: int, ids: Sequence[int], length: int, keys: list[bytes]) -> None:
        """Makes the full pages of row `row` available to later prompts. All modules have read the first `length` of
        its tokens `ids`; keys: as in `open`."""
        self._cache_pages(ids, length, self.row_pages[row], keys)

    def _cache_pages(self, ids: Sequence[int], length: int, pages: Sequence[int], keys: list[bytes]) -> None:
        if self.prefix_cache:
            self.pages.cache(prefix_keys(ids, length, self.drafts, keys), pages)

    def scrub(self, row: int) -> None:
        """Makes a row's own slots finite again after the network failed on it."""
        own = [page for page in self.row_pages[row] if self.pages.is_exclusive(page)]
        own_N = indices(own, self.table_BP.device)
        for pool in self.layers:
            pool[own_N] = 0.0

    def pages_needed(self, length_B: Sequence[int]) -> int:
        """Pages to allocate before the rows have these lengths."""
        return sum(max(0, pages_for(n) - len(row)) for n, row in zip(length_B, self.row_pages, strict=True))

    def _size(self, needed: int) -> int:
        if self.limit is None:
            return super()._size(needed)
        if needed > self.limit:
            raise CacheFull
        return min(super()._size(needed), self.limit)


class CachedPages(PageAllocator):
    """Invariant: a page is in `_free`, in `_idle`, or has users."""

    def __init__(self) -> None:
        super().__init__()
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}
        self._idle: dict[int, None] = {}  # cached and without users, least recently used first

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    def allocate(self, count: int) -> list[int]:
        while len(self._free) < count:
            self._evict(next(iter(self._idle)))
        return super().allocate(count)

    def share(self, pages: Iterable[int]) -> None:
        pages = list(pages)
        super().share(pages)
        for page in pages:
            self._idle.pop(page, None)

    def _unused(self, page: int) -> None:
        """The last page of a row is evicted first: without those before it, it is of no use."""
        if page in self._key:
            self._idle[page] = None
        else:
            super()._unused(page)

    def is_exclusive(self, page: int) -> bool:
        """The page has one user and is not cached."""
        return self._users[page] == 1 and page not in self._key

    def cache(self, keys: Iterable[bytes], pages: Iterable[int]) -> None:
        """Caches the pages under their keys."""
        for key, page in zip(keys, pages, strict=False):
            if key not in self._page and page not in self._key:
                self._page[key], self._key[page] = page, key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Cached pages of the longest known beginning; not yet shared."""
        return [self._page[key] for key in takewhile(self._page.__contains__, keys)]

    def _evict(self, page: int) -> None:
        del self._page[self._key.pop(page)]
        del self._idle[page]
        self._free.append(page)


def prefix_keys(ids: Sequence[int], length: int, drafts: int, known: list[bytes]) -> Iterator[bytes]:
    """One key per full page of the first `length` ids, each standing for all tokens up to the end of the page and
    `drafts` more. known: keys of the first pages; receives the others as they are computed, so that a text that waits
    or grows is hashed once."""
    for n, end in enumerate(range(PAGE + drafts, length + 1, PAGE)):
        if n == len(known):
            previous, page = known[-1] if known else b"", array("q", ids[end - PAGE - drafts : end])
            known.append(hashlib.blake2b(previous + page.tobytes(), digest_size=16).digest())
        yield known[n]
