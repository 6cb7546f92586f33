"""Detects hung ranks and reports which rank waits for which.

Wrap every blocking collective in `waiting(what, ranks)`. On every rank a `Watchdog` thread writes the rank's status to
the store that all ranks share, every few seconds, so it keeps reporting while a kernel or a message blocks the process.
When its rank has waited longer than `timeout`, it reads the last status of all other ranks, reports who waits for whom
and which ranks have gone silent, and ends the process. torchrun, or whatever else started the ranks, then ends the rest
and restarts them from the last checkpoint.

On a GPU a wait returns at once: the device waits, and the host runs on until it reads a result. So every `waiting`
ends by recording an event in the stream (`follow_device`), and the thread polls these events. An operation counts as
waiting from the time it was queued, or from the end of the operation before it, whichever is later.

For work of unknown length, such as sampling, `timeout` limits only the time without a sign of progress: `Ranks.meet`
renews its wait as long as the other ranks' watchdogs pass on heartbeats (`heartbeat`).

A hang leaves the stacks of all threads and every rank's torch flight recorder (read by `torchfrtrace`) in a folder of
the run.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from bessemer import heartbeat

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT = 75
"""Exit status of a process that waited too long (EX_TEMPFAIL: try again)."""
LOST = 76
"""Exit status of a process that lost its connection to another."""
OVER, HUNG = "watchdog/over", "watchdog/hung"
"""Store keys. OVER: a rank is ending with an error. HUNG: the error is a wait that took too long."""
BEATS = "watchdog/beats"
"""Store key of a counter that grows while any rank makes progress (`heartbeat`)."""
DUMP_SECONDS = 20.0
"""Time limit for writing traces."""


class Activity(NamedTuple):
    what: str
    ranks: Sequence[int] | None
    """The ranks it waits for; None if it computes."""
    since: float
    """On this machine's monotonic clock; in a status that ranks exchange, Unix time."""


class RankStatus:
    """What this rank is doing. Several threads may wait at once (an exchange during computation, a save), so each has
    its own entry."""

    step = 0
    working = Activity("working", None, time.monotonic())
    waits: ClassVar[dict[int, Activity]] = {}
    queued: ClassVar[deque[tuple[Activity, Callable[[], bool]]]] = deque()
    """Waits queued on the device, each with a function that says whether the device is past it."""
    mark: ClassVar[Callable[[], Callable[[], bool]] | None] = None
    """Marks a place in the device's work and returns a test for having reached it. None: waits block the host."""
    reached = 0.0
    """When the device was last seen to have finished a queued wait."""

    @classmethod
    def current(cls) -> Activity:
        """The longest wait, or `working` if there is none."""
        waits = [*cls.waits.values()]
        while cls.queued and cls.queued[0][1]():
            cls.queued.popleft()
            cls.reached = time.monotonic()
        if cls.queued:
            first = cls.queued[0][0]
            waits.append(first._replace(since=max(first.since, cls.reached)))
        return min(waits, key=lambda wait: wait.since, default=cls.working)


def follow_device() -> None:
    """Makes every later `waiting` on this rank follow its GPU as well."""
    import torch

    def mark() -> Callable[[], bool]:
        event = torch.cuda.Event()
        event.record()

        def reached() -> bool:
            try:
                return event.query()
            except RuntimeError:  # the device has failed; the main thread raises it
                return True

        return reached

    RankStatus.mark = mark


def at(step: int) -> None:
    """Records that this rank starts a step."""
    RankStatus.step, RankStatus.working = step, Activity("working", None, time.monotonic())


@contextmanager
def waiting(what: str, ranks: Sequence[int]) -> Iterator[None]:
    """Marks this thread as waiting for `what` from these ranks. Calls may be nested."""
    thread = threading.get_ident()
    outer = RankStatus.waits.get(thread)
    RankStatus.waits[thread] = Activity(what, ranks, time.monotonic())
    try:
        yield
        if RankStatus.mark is not None:
            RankStatus.queued.append((Activity(what, ranks, time.monotonic()), RankStatus.mark()))
    finally:
        if outer is None:
            del RankStatus.waits[thread]
        else:
            RankStatus.waits[thread] = outer._replace(since=time.monotonic())
        RankStatus.working = Activity("working", None, time.monotonic())


def renew() -> None:
    """Restarts the clock of this thread's wait, because the ranks it waits for are making progress."""
    thread = threading.get_ident()
    RankStatus.waits[thread] = RankStatus.waits[thread]._replace(since=time.monotonic())


class Watchdog:
    """One rank's watchdog thread. `store`: torch's, shared by `n` ranks; `timeout`: seconds; `folder`: for traces."""

    def __init__(self, store: Store, me: int, n: int, timeout: float, folder: Path | None = None):
        self.store, self.me, self.n, self.timeout, self.folder = store, me, n, timeout, folder
        self.every = min(5.0, timeout / 4)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def silent(self) -> list[int]:
        """The ranks that report nothing within one reporting interval. Raises DistError if the store is gone."""
        first = self._all()
        time.sleep(self.every + 1.0)
        second = self._all()
        return [rank for rank in range(self.n) if rank != self.me and second[rank] == first[rank]]

    def _run(self) -> None:
        beats = heartbeat.count
        while True:
            got_on, beats = heartbeat.count != beats, heartbeat.count
            if got_on:
                RankStatus.working = RankStatus.working._replace(since=time.monotonic())
            doing, now = RankStatus.current(), time.time()
            waited = time.monotonic() - doing.since  # a jump of the clock must not end a run
            doing = doing._replace(since=now - waited)
            try:
                if got_on:
                    self.store.add(BEATS, 1)
                ranks = None if doing.ranks is None else list(doing.ranks)
                self.store.set(
                    f"watchdog/{self.me}", json.dumps([now, RankStatus.step, doing.what, ranks, doing.since])
                )
                if doing.ranks is not None and waited > self.timeout:
                    self._give_up(doing, now)
                if self.store.check([OVER]) and doing.ranks is not None and waited > self.every:
                    self._end(EXIT if self.store.check([HUNG]) else LOST)
            except RuntimeError:  # the process with the store is gone: the main thread will notice, if it can
                alone = RankStatus.mark is not None and not self._over.wait(self.every)
                if alone and RankStatus.current().ranks is not None:
                    os._exit(LOST)
                return
            if self._over.wait(self.every):
                return

    def _give_up(self, doing: Activity, now: float) -> None:
        if self.store.add("watchdog/reported", 1) == 1:  # one rank reports for all
            report = hang_report(self.me, doing, RankStatus.step, self._all(), now, self.timeout)
            where = "" if self.folder is None else f"; stacks and flight recorders of the ranks are in {self.folder}"
            print(f"error: {report}{where}", file=sys.stderr)
            sys.stderr.flush()
            for key in (HUNG, OVER):
                self.store.set(key, str(self.me))
            time.sleep(self.every if self.n > 1 else 0.0)  # the store may be in this process, and the others read it
        self._end(EXIT)

    def _end(self, status: int) -> None:
        """Ends this rank, whose main thread is waiting, perhaps in a kernel on the device."""
        if status == EXIT and self.folder is not None:
            leaving = threading.Thread(target=leave_traces, args=(self.folder, self.me), daemon=True)
            leaving.start()
            leaving.join(DUMP_SECONDS)  # the recorder asks the device, which may not answer
        os._exit(status)

    def _all(self) -> list[list[Any] | None]:
        keys = [f"watchdog/{rank}" for rank in range(self.n)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]


def leave_traces(folder: Path, me: int) -> None:
    """Writes rank-N.txt, the stacks of all threads, and recorder_N, torch's record of the last operations."""
    from torch._C import _distributed_c10d as c10d

    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"rank-{me}.txt", "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        # A build with NCCL has a separate recorder for NCCL, which stays empty when gloo does the work.
        recorders = [name for name in ("_dump_nccl_trace", "_dump_fr_trace") if hasattr(c10d, name)]
        if recorders:
            trace = max((getattr(c10d, name)() for name in recorders), key=len)
            (folder / f"recorder_{me}").write_bytes(trace)


def hang_report(me: int, doing: Activity, step: int, others: list[list[Any] | None], now: float, timeout: float) -> str:
    """Says who waits for whom, from every rank's last status: [time, step, what, ranks it waits for, since]."""
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
    whom = _ranks(doing.ranks or [], me)
    report = f"rank {me} has waited {now - doing.since:.0f} s for {doing.what} from {whom} in step {step}"
    suspects = silent or busy
    if suspects:
        more = f"; and {len(suspects) - 4} more" if len(suspects) > 4 else ""
        report += "; " + "; ".join(suspects[:4]) + more
    else:
        waits = [
            f"rank {rank} for {status[2]} from {_ranks(status[3], rank)}"
            for rank, status in enumerate(others)
            if status and rank != me
        ]
        report += "; all others are also waiting: " + "; ".join(waits[:4]) + (" ..." if len(waits) > 4 else "")
    return report + ". Exiting, so that the run can restart from its last checkpoint ([layout] timeout sets the limit)"


def _position(status: list[Any]) -> str:
    _, step, waits_for, ranks, _ = status
    return f"step {step} ({waits_for if ranks is None else 'waiting for ' + waits_for})"


def _ranks(ranks: Sequence[int], me: int) -> str:
    waited = [rank for rank in ranks if rank != me]
    names = ", ".join(map(str, waited[:4])) + (" ..." if len(waited) > 4 else "")
    return f"rank {names}" if len(waited) == 1 else f"ranks {names}"
