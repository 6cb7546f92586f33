"""The memory of a whole sandbox: the kernel limits each process by itself, so the trusted side counts their sum.

A sandbox of one process is bounded by the kernel. If there are several, their memory is read from /proc, more often the
closer it comes to the bound, and all are ended together when it is exceeded. Between two checks they may take a little
more. Shared memory, such as that of a forked interpreter, counts once if /proc shows it (PSS), else once for each
process. Under a kernel that lists no children (CONFIG_PROC_CHILDREN), each process only has its own limit.
"""

import os
from contextlib import suppress
from pathlib import Path

INTERVAL, SHORTEST = 0.005, 0.001
"""Longest and shortest time between two checks, in seconds."""
SPEED = 4e9
"""The most bytes per second that a process can take."""


def processes(first: int) -> list[int]:
    """`first` and every process below it; those that have ended are left out."""
    found = [first]
    for pid in found:
        with suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_bytes().split())
    return found


def look(first: int, most: int) -> float | None:
    """Seconds until the next check; None if the processes below `first`, which is ours, together hold more than `most`
    bytes."""
    programs = processes(first)[1:]
    if len(programs) < 2:
        return INTERVAL
    held = sum(map(_resident, programs))
    if held > most and (held := sum(map(_proportional, programs))) > most:
        return None
    return min(INTERVAL, max(SHORTEST, (most - held) / (len(programs) * SPEED)))


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
