"""What operating systems differ in: Linux with any C library, macOS, and Windows as far as help and a clear refusal go;
and what CUDA, which is Linux's, reads from the environment as it starts.

Every function here works without the call that it prefers. Code elsewhere asks these functions and not for the name of
the system; /proc and /sys are read where a missing file is an answer.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None  # type: ignore[assignment]

_UNSYNCED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
"""Answers of file systems that cannot sync a folder."""
MOST_FILES = 10_240
"""Open files that macOS grants a process whose limit it calls infinite (OPEN_MAX)."""
SEGMENTS = "expandable_segments:True"
"""For torch's allocator: freed memory serves requests of any size, so batches of changing length do not split it into
pieces that fit nothing."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name of its variable, and the one it had before."""


def prepare_cuda() -> None:
    """Sets what CUDA reads, before torch is imported, unless a user did. Child processes inherit it."""
    if is_linux():
        if not any(name in os.environ for name in ALLOCATOR):
            os.environ[ALLOCATOR[0]] = SEGMENTS
        # products repeat bit for bit, in the 32 MB that torch takes on Hopper by itself
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def without_segments() -> None:
    """Takes back what `prepare_cuda` set for the allocator, for a vLLM that sleeps: its memory pool refuses it."""
    if os.environ.get(ALLOCATOR[0]) == SEGMENTS:
        del os.environ[ALLOCATOR[0]]


def unsupported() -> str | None:
    """Why nothing but help works on this system; None where the package runs."""
    text = "Bessemer runs on Linux and macOS; on Windows, install it inside WSL 2 (wsl --install)"
    return text if sys.platform == "win32" else None


def is_linux() -> bool:
    return sys.platform.startswith("linux")


def granted_cores() -> int:
    """Cores that the system grants this process; where it does not say, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def can_fork() -> bool:
    """Whether a process with threads may fork children that compute. On macOS it may not: Accelerate, which multiplies
    matrices there, and the Objective-C runtime end such a child."""
    return hasattr(os, "fork") and sys.platform != "darwin"


def claim(file: IO[str], holder: str) -> bool:
    """Locks a file for this process; False where another process holds it. Where the system has no such locks, the
    process `holder` whose number stands in it holds it as long as it lives."""
    if fcntl is None:
        return not holder.isdigit() or int(holder) == os.getpid() or not _alive(int(holder))
    try:
        # lockf, not flock: a child process (a sandbox, a worker) that outlives us must not keep the lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def peak_memory() -> int:
    """The most bytes of memory that this process has had; 0 where the system does not say."""
    peak = 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def raise_open_files() -> None:
    """As many open files as the system allows this process."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in () if soft == hard else (hard, MOST_FILES):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return


def limit(name: str, most: int) -> None:
    """A limit of this process, such as "AS", which it cannot raise again. No effect where the system has none."""
    with suppress(AttributeError, ValueError, OSError):  # the first where there is no `resource` at all
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def sysctl(*names: str) -> str:
    """Values of macOS's `sysctl`, a line each; "" where there is none."""
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["/usr/sbin/sysctl", "-n", *names]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    return ""


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable; where its file system cannot, the rename alone must do. OSError where the disk
    fails."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
