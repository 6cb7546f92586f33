"""Whether Triton may tune a product now: run all its configurations and keep the fastest.

Tuning waits for everything the device has queued. That can deadlock while pipeline messages are in flight, because
their receiver may be waiting in the same way. So a step tunes in its warm-up (`Executor.warm`) and runs `without`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_without = 0


def allowed() -> bool:
    return _without == 0


@contextmanager
def without() -> Iterator[None]:
    """No tuning inside the block, in any thread: autograd has its own thread for a GPU."""
    global _without
    _without += 1
    try:
        yield
    finally:
        _without -= 1
