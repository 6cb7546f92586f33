"""The memory of a whole sandbox: the kernel's limit is one of each process, so the trusted side counts their sum.

A sandbox of one process is bounded by the kernel. Where there are several, their memory is read from /proc, the more
often the nearer it comes to the bound, and all end together when it is exceeded. Between two looks they may take a
little more. Memory that processes share, such as that of a forked interpreter, counts once where /proc lets us see it
(PSS), else once for each. Under a kernel that lists no children (CONFIG_PROC_CHILDREN) each process has its own limit
alone.
"""

import os
from contextlib import suppress
from pathlib import Path

INTERVAL, SHORTEST = 0.005, 0.001
"""Seconds between two looks."""
SPEED = 4e9
"""Bytes a second that a process may take at most."""


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
    """Seconds until the next look; None where the processes below `first`, which is ours, hold more than `most` bytes
    together."""
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
    """The same, of which each of n processes that share a page has one n-th."""
    shared = _sum(f"/proc/{pid}/smaps_rollup", (b"Pss_Anon:", b"Pss_Shmem:"))
    return _resident(pid) if shared is None else shared


def _sum(path: str, names: tuple[bytes, ...]) -> int | None:
    """Of the lines that begin so, which are in KiB; None where the file cannot be read."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError:
        return None
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(names))
