"""Who does the jobs: worker processes of this machine. (`recipe/curation_ray` has the same on a Ray cluster.)

An engine's `run(jobs)` gives (job, facts) as jobs end, in any order; what they write does not depend on who did them.
A worker that is killed (by the system, when memory runs out) takes the jobs under way with it: they are tried again one
at a time, so that the one that kills its worker can be named. Workers end with their parent, however that ends.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any, Protocol

from bessemer.curate.work import Job, perform
from bessemer.errors import UserError

Done = tuple[Job, dict[str, Any]]


class Engine(Protocol):
    """Does jobs, some at a time."""

    workers: int

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]: ...

    def close(self) -> None: ...


class Here:
    """All jobs in this process, one after the other."""

    workers = 1

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        for job in jobs:
            yield job, perform(job)

    def close(self) -> None:
        pass


class Processes:
    """`workers` processes, started anew and not forked: this process has threads by now."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[Done]:
        left = list(reversed(jobs))
        suspects: list[Job] = []
        while left or suspects:
            if not suspects:
                yield from self._side_by_side(left, suspects)
                continue
            job = suspects[-1]
            try:
                found = self._submit(job).result()
            except BrokenProcessPool:
                self.close()
                raise UserError(_killed(job)) from None
            suspects.pop()
            yield job, found

    def _side_by_side(self, left: list[Job], suspects: list[Job]) -> Iterator[Done]:
        """Does the jobs of `left`. When a worker dies it ends, with the jobs that were under way in `suspects`."""
        under_way: dict[Future[dict[str, Any]], Job] = {}
        try:
            while left or under_way:
                while left and len(under_way) < self.workers:
                    under_way[self._submit(left[-1])] = left[-1]
                    left.pop()
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    found = future.result()
                    yield under_way.pop(future), found
        except BrokenProcessPool:
            self.close()
            suspects.extend(under_way.values())

    def _submit(self, job: Job) -> Future[dict[str, Any]]:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin)
        return self._pool.submit(perform, job)

    def close(self) -> None:
        """Ends the workers at once: what is half done is done again another time."""
        pool, self._pool = self._pool, None
        if pool is not None:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """The first thing in a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _killed(job: Job) -> str:
    return (
        f"the worker process that did {job.step} of {job.title} was killed, twice. If memory ran out, lower "
        "engine.unit_bytes, engine.memory or engine.workers; the same command goes on from here"
    )
