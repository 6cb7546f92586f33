"""Whether Triton may tune a product now: run all its configurations and keep the fastest.

Tuning waits for all that the device has been given. While messages of a pipeline are under way that is never right, for
their receiver may wait in the same way. So a step tunes in its warm-up (`Executor.warm`) and runs `without`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_without = 0


def allowed() -> bool:
    return _without == 0


@contextmanager
def without() -> Iterator[None]:
    """No tuning inside, in no thread: autograd has one of its own for a GPU."""
    global _without
    _without += 1
    try:
        yield
    finally:
        _without -= 1
