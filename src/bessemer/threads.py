"""CPU threads: independent pieces of work side by side, one core each, instead of many cores inside every operation.

Operations of small models take microseconds to milliseconds. OpenMP splits each of them and waits at its end: measured
on two cores, `tiny` trains 1.2x as fast on two OpenMP threads as on one, and 80x slower than on one as soon as another
process wants a core. Two Python threads with one core each do not wait for each other (torch releases the interpreter
lock inside its operations).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where the user set it, else what the system grants."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


class Workers:
    """`n` threads, one core each; `map` keeps the order of its items, so results do not depend on who was faster."""

    def __init__(self, n: int):
        self.n = max(1, n)
        self._pool = ThreadPoolExecutor(self.n, "bessemer", initializer=_one_core) if self.n > 1 else None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """work(item) of every item, in order; at most `n` results wait to be taken."""
        if self._pool is None:
            yield from map(work, items)
            return
        source = iter(items)
        running: list[Future[Result]] = [self._pool.submit(work, item) for item in islice(source, self.n)]
        while running:
            done = running.pop(0).result()
            running += [self._pool.submit(work, item) for item in islice(source, 1)]
            yield done


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)


def one_core_each() -> Workers:
    """Workers for all cores of this process; from now on torch itself uses one core per operation."""
    workers = Workers(cores())
    if workers.n > 1:
        _one_core()
    return workers
