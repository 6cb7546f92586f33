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
from typing import Any, ClassVar, NamedTuple

EXIT = 75
"""Status of a process that waited in vain (EX_TEMPFAIL: try again)."""
LOST = 76
"""Status of a process whose connection to another was cut."""


class Activity(NamedTuple):
    what: str
    ranks: Sequence[int] | None
    """Whom it waits for; None: it works."""
    since: float


class RankStatus:
    """What this rank does. Several threads may wait at once (an exchange beside the computation, a save), so each has a
    place of its own."""

    step = 0
    working = Activity("working", None, time.time())
    waits: ClassVar[dict[int, Activity]] = {}

    @classmethod
    def doing(cls) -> Activity:
        """The longest wait, if there is one."""
        return min([*cls.waits.values()], key=lambda wait: wait.since, default=cls.working)


def at(step: int) -> None:
    """This rank begins with this step."""
    RankStatus.step, RankStatus.working = step, Activity("working", None, time.time())


@contextmanager
def waiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Within it this thread waits for `what` from these ranks; may be nested."""
    thread = threading.get_ident()
    outer = RankStatus.waits.get(thread)
    RankStatus.waits[thread] = Activity(what, ranks, time.time())
    try:
        yield
    finally:
        if outer is None:
            del RankStatus.waits[thread]
        else:
            RankStatus.waits[thread] = outer._replace(since=time.time())
        RankStatus.working = Activity("working", None, time.time())


class Watchdog:
    """The thread of one rank; `store` is torch's, shared by `n` ranks."""

    def __init__(self, store: Any, me: int, n: int, timeout: float):
        self.store, self.me, self.n, self.timeout = store, me, n, timeout
        self.every = min(5.0, timeout / 4)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            doing, now = RankStatus.doing(), time.time()
            try:
                ranks = None if doing.ranks is None else list(doing.ranks)
                self.store.set(f"signs/{self.me}", json.dumps([now, RankStatus.step, doing.what, ranks, doing.since]))
                if doing.ranks is not None and now - doing.since > self.timeout:
                    self._give_up(doing, now)
            except RuntimeError:  # the store has gone, and with it whoever held it: the main thread will meet that
                return
            if self._over.wait(self.every):
                return

    def _give_up(self, doing: Activity, now: float) -> None:
        if self.store.add("signs/told", 1) == 1:  # one rank speaks for all
            report = hang_report(self.me, doing, RankStatus.step, self._all(), now, self.timeout)
            print(f"error: {report}", file=sys.stderr)
            sys.stderr.flush()
        else:
            time.sleep(self.every)  # its words first
        os._exit(EXIT)

    def _all(self) -> list[list[Any] | None]:
        keys = [f"signs/{rank}" for rank in range(self.n)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]


def hang_report(me: int, doing: Activity, step: int, others: list[list[Any] | None], now: float, timeout: float) -> str:
    """In words, from what every rank last said (when, step, doing, waiting for, since when)."""
    silent, busy = [], []
    for rank, said in enumerate(others):
        if rank == me:
            continue
        if said is None:
            silent.append(f"rank {rank} never gave a sign of life")
        elif now - said[0] > max(timeout / 2, 15.0 if timeout > 60 else 0.0):
            silent.append(f"rank {rank} has given no sign of life for {now - said[0]:.0f} s, last in {_place(said)}")
        elif said[3] is None:
            busy.append(f"rank {rank} has been in {_place(said)} for {now - said[4]:.0f} s")
    whom = _ranks(doing.ranks or [], me)
    words = f"rank {me} has waited {now - doing.since:.0f} s for {doing.what} of {whom} in step {step}"
    found = silent or busy
    if found:
        words += "; " + "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    else:
        waits = [f"rank {r} for {said[2]} of {_ranks(said[3], r)}" for r, said in enumerate(others) if said and r != me]
        words += "; all others wait, too: " + "; ".join(waits[:4]) + (" ..." if len(waits) > 4 else "")
    return words + ". Ending, so that the run can start again from its last checkpoint ([layout] timeout says how long)"


def _place(said: list[Any]) -> str:
    _, step, what, ranks, _ = said
    return f"step {step} ({what if ranks is None else 'waiting for ' + what})"


def _ranks(ranks: Sequence[int], me: int) -> str:
    others = [rank for rank in ranks if rank != me]
    shown = ", ".join(map(str, others[:4])) + (" ..." if len(others) > 4 else "")
    return f"rank {shown}" if len(others) == 1 else f"ranks {shown}"
