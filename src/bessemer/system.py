"""Differences between operating systems: Linux with any C library, macOS, and Windows (help and a clear refusal only);
and the environment variables that CUDA reads at startup on Linux.

Every function here also works where the system call that it prefers is missing. Code elsewhere calls these functions
instead of checking the system's name, and reads /proc and /sys only where a missing file is a valid answer.
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
"""Errors from file systems that cannot sync a folder."""
MOST_FILES = 10_240
"""Open files that macOS allows a process whose limit it reports as infinite (OPEN_MAX)."""
SEGMENTS = "expandable_segments:True"
"""Setting of torch's allocator: freed memory can serve requests of any size, so batches of varying length do not
fragment it."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The allocator's environment variable, and its older name."""


def prepare_cuda() -> None:
    """Sets CUDA's environment variables unless the user has. Call it before importing torch; children inherit them."""
    if is_linux():
        if not any(name in os.environ for name in ALLOCATOR):
            os.environ[ALLOCATOR[0]] = SEGMENTS
        # makes matrix products reproducible bit for bit, in the 32 MB that torch takes on Hopper by default
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def without_segments() -> None:
    """Undoes the allocator setting of `prepare_cuda`: the memory pool of vLLM's sleep mode refuses it."""
    if os.environ.get(ALLOCATOR[0]) == SEGMENTS:
        del os.environ[ALLOCATOR[0]]


def unsupported() -> str | None:
    """Why only help works on this system; None where the package runs."""
    text = "Bessemer runs on Linux and macOS; on Windows, install it inside WSL 2 (wsl --install)"
    return text if sys.platform == "win32" else None


def is_linux() -> bool:
    return sys.platform.startswith("linux")


def granted_cores() -> int:
    """Cores that the system grants this process; if it does not say, all cores of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_cache() -> Path | None:
    """This user's folder for what can be made or downloaded again: $XDG_CACHE_HOME/bessemer, by default
    ~/.cache/bessemer. None without a home directory."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:  # no HOME, and no account for this user ID
        return None
    return home.absolute() / "bessemer"


def can_fork() -> bool:
    """Whether a multithreaded process may fork children that compute. On macOS it may not: Accelerate, which multiplies
    matrices there, and the Objective-C runtime abort such a child."""
    return hasattr(os, "fork") and sys.platform != "darwin"


def claim(file: IO[str], holder: str) -> bool:
    """Locks a file for this process; False if another process holds it. On a system or disk without such locks, the
    process whose number is in the file (`holder`) holds it for as long as that process lives."""
    if fcntl is not None:
        try:
            # lockf, not flock: a child process (a sandbox, a worker) that outlives us must not keep the lock
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # some network disks
            pass
    return not holder.isdigit() or int(holder) == os.getpid() or not alive(int(holder))


def alive(pid: int) -> bool:
    """Whether this machine runs a process with this number."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def peak_memory() -> int:
    """Peak memory of this process in bytes; 0 if the system does not say."""
    peak = 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def memory() -> int:
    """Bytes of memory that this process may have: the machine's, or less in a container; 0 if the system does not
    say."""
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()) else 0
    found = max(0, pages) * (os.sysconf("SC_PAGE_SIZE") if pages > 0 else 0)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max": no limit
            found = min(found or sys.maxsize, int(Path(path).read_text()))
    return found


def raise_open_files() -> None:
    """Raises this process's limit on open files as far as the system allows."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for most in () if soft == hard else (hard, MOST_FILES):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return


def limit(name: str, most: int) -> None:
    """Sets a limit of this process, such as "AS", that it cannot raise again. No effect where the system has none."""
    with suppress(AttributeError, ValueError, OSError):  # AttributeError: the system has no such limit
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def soft_limit(name: str, most: int) -> None:
    """Sets a limit of this process that it, or a child, may raise again. No effect where the system has none."""
    with suppress(AttributeError, ValueError, OSError):
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def sysctl(*names: str) -> str:
    """Values from macOS's `sysctl`, one per line; "" if it cannot be run."""
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["/usr/sbin/sysctl", "-n", *names]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    return ""


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable; does nothing if its file system cannot. Raises OSError if the disk fails."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
