"""Detects hung ranks and reports which rank waits for which.

Wrap every blocking collective in `waiting(what, ranks)`. On every rank a `Watchdog` thread writes the rank's status to
the store that all ranks share, every few seconds, so it keeps reporting while a kernel or a message blocks the process.
When its rank has waited longer than `timeout`, it reads the last status of all other ranks, reports who waits for whom
and which ranks have gone silent, and ends the process. torchrun, or whatever else started the ranks, then ends the rest
and restarts them from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT = 75
"""Exit status of a process that waited too long (EX_TEMPFAIL: try again)."""
LOST = 76
"""Exit status of a process that lost its connection to another."""


class Activity(NamedTuple):
    what: str
    ranks: Sequence[int] | None
    """The ranks it waits for; None: it computes."""
    since: float
    """On this machine's monotonic clock; in a status that ranks exchange, Unix time."""


class RankStatus:
    """What this rank does. Several threads may wait at once (an exchange during computation, a save), so each has an
    entry of its own."""

    step = 0
    working = Activity("working", None, time.monotonic())
    waits: ClassVar[dict[int, Activity]] = {}

    @classmethod
    def current(cls) -> Activity:
        """The longest wait, if any."""
        return min([*cls.waits.values()], key=lambda wait: wait.since, default=cls.working)


def at(step: int) -> None:
    """Called when this rank starts a step."""
    RankStatus.step, RankStatus.working = step, Activity("working", None, time.monotonic())


@contextmanager
def waiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Marks this thread as waiting for `what` from these ranks; may be nested."""
    thread = threading.get_ident()
    outer = RankStatus.waits.get(thread)
    RankStatus.waits[thread] = Activity(what, ranks, time.monotonic())
    try:
        yield
    finally:
        if outer is None:
            del RankStatus.waits[thread]
        else:
            RankStatus.waits[thread] = outer._replace(since=time.monotonic())
        RankStatus.working = Activity("working", None, time.monotonic())


class Watchdog:
    """The watchdog thread of one rank; `store` is torch's, shared by `n` ranks."""

    def __init__(self, store: Store, me: int, n: int, timeout: float):
        self.store, self.me, self.n, self.timeout = store, me, n, timeout
        self.every = min(5.0, timeout / 4)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def silent(self) -> list[int]:
        """The ranks that give no sign of life in the time in which each gives one. DistError without the store."""
        before = self._all()
        time.sleep(self.every + 1.0)
        after = self._all()
        return [rank for rank in range(self.n) if rank != self.me and after[rank] == before[rank]]

    def _run(self) -> None:
        while True:
            doing, now = RankStatus.current(), time.time()
            waited = time.monotonic() - doing.since  # a clock that jumps ends no run
            doing = doing._replace(since=now - waited)
            try:
                ranks = None if doing.ranks is None else list(doing.ranks)
                self.store.set(f"watchdog/{self.me}", json.dumps([now, RankStatus.step, doing.what, ranks, doing.since]))
                if doing.ranks is not None and waited > self.timeout:
                    self._give_up(doing, now)
            except RuntimeError:  # the process with the store is gone: the main thread will notice
                return
            if self._over.wait(self.every):
                return

    def _give_up(self, doing: Activity, now: float) -> None:
        if self.store.add("watchdog/reported", 1) == 1:  # one rank reports for all
            report = hang_report(self.me, doing, RankStatus.step, self._all(), now, self.timeout)
            print(f"error: {report}", file=sys.stderr)
            sys.stderr.flush()
        else:
            time.sleep(self.every)  # let it print first
        os._exit(EXIT)

    def _all(self) -> list[list[Any] | None]:
        keys = [f"watchdog/{rank}" for rank in range(self.n)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]


def hang_report(me: int, doing: Activity, step: int, others: list[list[Any] | None], now: float, timeout: float) -> str:
    """Who waits for whom, from the last status of every rank: [time, step, what, ranks it waits for, since]."""
    silent, busy = [], []
    for rank, status in enumerate(others):
        if rank == me:
            continue
        if status is None:
            silent.append(f"rank {rank} never reported")
        elif now - status[0] > max(timeout / 2, 15.0 if timeout > 60 else 0.0):
            silent.append(f"rank {rank} has not reported for {now - status[0]:.0f} s, last in {_position(status)}")
        elif status[3] is None:
            busy.append(f"rank {rank} has been in {_position(status)} for {now - status[4]:.0f} s")
    report = (
        f"rank {me} has waited {now - doing.since:.0f} s for {doing.what} of {_ranks(doing.ranks or [], me)} in step {step}"
    )
    suspects = silent or busy
    if suspects:
        more = f"; and {len(suspects) - 4} more" if len(suspects) > 4 else ""
        report += "; " + "; ".join(suspects[:4]) + more
    else:
        waits = [
            f"rank {rank} for {status[2]} of {_ranks(status[3], rank)}"
            for rank, status in enumerate(others)
            if status and rank != me
        ]
        report += "; all others wait as well: " + "; ".join(waits[:4]) + (" ..." if len(waits) > 4 else "")
    return report + ". Exiting, so that the run can restart from its last checkpoint ([layout] timeout sets the limit)"


def _position(status: list[Any]) -> str:
    _, step, what, ranks, _ = status
    return f"step {step} ({what if ranks is None else 'waiting for ' + what})"


def _ranks(ranks: Sequence[int], me: int) -> str:
    others = [rank for rank in ranks if rank != me]
    names = ", ".join(map(str, others[:4])) + (" ..." if len(others) > 4 else "")
    return f"rank {names}" if len(others) == 1 else f"ranks {names}"
