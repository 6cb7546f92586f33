"""The memory and time of a whole sandbox: the kernel limits each process by itself, so the trusted side counts the sum.

A sandbox of one process is bounded by the kernel. If there are several, their memory is read from /proc, more often the
closer it comes to the bound, and all are ended together when it is exceeded. Between two checks they may take a little
more. Shared memory, such as that of a forked interpreter, counts once if /proc shows it (PSS), else once for each
process. Under a kernel that lists no children (CONFIG_PROC_CHILDREN), each process only has its own limit.

The clock of a program runs while it computes, by its processor time, and while it sleeps, but not while it waits for a
core, which depends on what else runs on the machine. A program sleeps if at two looks in turn it has used no time and
none of its threads is ready to run.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

INTERVAL, SHORTEST = 0.005, 0.001
"""Longest and shortest time between two checks, in seconds."""
SLEEP_LOOK = 0.02
"""The same for its time: once it may have used up its limit."""
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
SPEED = 4e9
"""The most bytes per second that a process can take."""


def processes(first: int) -> list[int]:
    """`first` and every process below it; those that have ended are left out."""
    pids = [first]
    for pid in pids:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    pids += map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())
    return pids


def look(pids: list[int], own_group: int, most: int) -> float | None:
    """Seconds until the next check; None if all but the first `ours` of the processes, which are not the program's,
    together hold more than `most` bytes."""
    programs = pids[own_group:]
    if len(programs) < 2:
        return INTERVAL
    resident = sum(map(_resident, programs))
    if resident > most and (resident := sum(map(_proportional, programs))) > most:
        return None
    return min(INTERVAL, max(SHORTEST, (most - resident) / (len(programs) * SPEED)))


class ProgramClock:
    """Seconds that a program has slept, or computed in seconds of the reference machine (`addons/tasks/clock.py`)."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.before = 0.0
        """Time before the last start."""
        self.began = 0.0
        self._used = self._slept = self._cpu = self._at = 0.0

    def start(self, pids: list[int]) -> None:
        """Start from 0; `found` are the processes of the sandbox."""
        self.before += self.look(pids) if self._at > self.began else 0.0
        self.began = self._at = time.monotonic()
        self._used, self._slept, self._cpu = 0.0, 0.0, processor_seconds(pids)

    def look(self, pids: list[int]) -> float:
        """Time since the last start; to be called every SLEEP_LOOK seconds."""
        now, cpu = time.monotonic(), processor_seconds(pids)
        # An observer that comes late has slept itself; it has not seen the program sleep.
        if cpu == self._cpu and not any(map(_runs, pids)):
            self._slept += min(now - self._at, 2 * SLEEP_LOOK)
        self._used += cpu - self._cpu
        self._at, self._cpu = now, cpu
        return self._used / self.speed + self._slept


def processor_seconds(pids: Iterable[int]) -> float:
    """Processor time of the processes, with that of children that have ended."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / TICKS


def _runs(pid: int) -> bool:
    """Whether a thread of the process computes, or would if it had a core."""
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                if Path(f"/proc/{pid}/task/{task}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"R", b"D"):
                    return True
    return False


def _resident(pid: int) -> int:
    """Bytes of memory that no file backs."""
    return _sum(f"/proc/{pid}/status", (b"RssAnon:", b"RssShmem:")) or 0


def _proportional(pid: int) -> int:
    """The same, where a page that n processes share counts 1 / n for each."""
    shared = _sum(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:"))
    return _resident(pid) if shared is None else shared


def _sum(path: str, names: tuple[bytes, ...]) -> int | None:
    """Bytes in the lines that begin with `names`, which are in KiB; None if the file cannot be read."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))
