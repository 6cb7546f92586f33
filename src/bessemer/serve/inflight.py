"""What is under way: the samples of one HTTP request, and their tokens on the way to whoever reads them.

A stream that has just been read is not woken again at once: with S samples open it waits S * PAUSE seconds, so that the
tokens of several steps make one chunk and writing chunks stays a small, bounded share of the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from bessemer.engine.sequence import Finished, Request, Token

PAUSE = 0.001
"""Seconds between two chunks of one stream, per open sample."""
LONGEST_PAUSE = 0.25

Event = Token | Finished


@dataclass(eq=False)
class Sample:
    """One request to the scheduler, and the stream it belongs to."""

    request: Request
    stream: Stream
    index: int
    number: int = 0
    """What the service calls it."""
    began: float = field(default_factory=monotonic)


class Stream:
    """An iterator over lists of (sample's index, event), which ends when all samples have or when it is closed.

    None is yielded instead of a list when nothing came for `patience` seconds.
    """

    def __init__(self, requests: Sequence[Request], patience: float, release: Callable[[Stream], None]):
        self.samples = [Sample(request, self, index) for index, request in enumerate(requests)]
        self.patience = patience
        self.left = len(self.samples)
        self.closed = False
        self.pause = 0.0
        """Seconds that a reader is left alone after it was served."""
        self.first: float | None = None
        """When the first token came, on the clock of `monotonic`."""
        self._release = release
        self._pending: list[tuple[int, Event]] = []
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._due = 0.0

    def take(self, index: int, event: Event, now: float, open_samples: int) -> None:
        """An event has come."""
        self.pause = min(PAUSE * open_samples, LONGEST_PAUSE)
        self._pending.append((index, event))
        if type(event) is Finished:
            self.left -= 1
            self._wake.set()
        else:
            self.first = self.first or monotonic()
            if now >= self._due:
                self._wake.set()

    def close(self) -> None:
        """Ends it; what still runs is cancelled. May be called at any time, and twice."""
        if not self.closed:
            self.closed = True
            self._release(self)
            self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Event]] | None]:
        while not self.closed:
            if self._pending:
                events, self._pending = self._pending, []
                self._wake.clear()
                yield events
                if self.left == 0 and not self._pending:
                    return
                self._due = self._loop.time() + self.pause
            try:
                async with asyncio.timeout(self.patience):
                    await self._wake.wait()
            except TimeoutError:
                if not self._pending:
                    yield None
