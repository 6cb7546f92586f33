"""Where the phases of a micro-batch run: computation, and beside it communication (V3 3.2.1, Fig. 4).

    Serial   everything at once where it is asked for
    Beside   communication in a thread of its own; on a GPU on a stream of its own, too

`run(exchange, phase, after)` starts a phase that comes after another one and returns what the next is to come after.
Computation is done when it returns (on a GPU: queued); communication goes on meanwhile. The phases of one micro-batch
follow one another, those of two may overlap; so nothing is shared but weights, and of those communication has none.
On CPUs the thread is tested to the bit. The streams are written down and have not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Serial:
    """One after the other."""

    def run(self, exchange: bool, phase: Callable[[], None], after: Any) -> Any:
        phase()

    def on(self, exchange: bool) -> AbstractContextManager:
        """Where a backward is to run of what is made in here."""
        return nullcontext()

    def share(self, x: Tensor) -> None:
        """`x` is read by the other kind of phase than made it."""


class Beside(Serial):
    """Communication beside computation. The thread is there on a GPU as well: an exchange has to know how much it is
    going to receive, and only its own thread waits for that number."""

    def __init__(self, device: torch.device):
        self._thread = ThreadPoolExecutor(1, "exchange")
        cuda = device.type == "cuda"
        self._streams = (torch.cuda.current_stream(device), torch.cuda.Stream(device)) if cuda else ()

    def run(self, exchange: bool, phase: Callable[[], None], after: Any) -> Any:
        if exchange:
            return self._thread.submit(self._run, exchange, phase, after)
        return self._run(exchange, phase, after.result() if isinstance(after, Future) else after)

    def _run(self, exchange: bool, phase: Callable[[], None], after: Any) -> Any:
        with self.on(exchange):
            if after is not None:
                self._streams[exchange].wait_event(after)
            phase()
            return self._streams[exchange].record_event() if self._streams else None

    def on(self, exchange: bool) -> AbstractContextManager:
        return torch.cuda.stream(self._streams[exchange]) if self._streams else nullcontext()

    def share(self, x: Tensor) -> None:
        for stream in self._streams if x.is_cuda else ():
            x.record_stream(stream)
