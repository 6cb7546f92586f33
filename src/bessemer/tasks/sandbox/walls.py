"""The levels of isolation, strongest first, the command that builds each, and the trial that shows which works here.

bubblewrap   bwrap builds the walls: new namespaces of every kind, a read-only root with the interpreter and the
             system's libraries, an empty /tmp of 16 MB, no network
namespaces   the same walls, built by inside/namespaces.py where bubblewrap is not installed
none         rlimits, the filter of system calls (which also refuses new processes) and the clock, but the program reads
             and writes files as we do
"""

import errno
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEVELS = ("bubblewrap", "namespaces", "none")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}  # all of it; equal hashes make equal verdicts
SCRATCH = 16 << 20  # bytes under /tmp
PROCESSES = 16
NOBODY = "65534"
_INSIDE = Path(__file__).parent / "inside"
_BWRAP_INSIDE = "/inside"


@dataclass(frozen=True)
class Bounds:
    """What a program may use. `output` counts bytes of each of its streams."""

    seconds: float
    memory_mb: int
    output: int


def command(level: str, bounds: Bounds, ask: int, reply: int, info: int) -> list[str]:
    """The command line of a cell. Processor time is bounded a little above wall time, which thus strikes first."""
    numbers = (ask, reply, info, os.getpid(), int(bounds.seconds) + 2, bounds.memory_mb << 20, SCRATCH, PROCESSES)
    script = ["main.py", level, *map(str, numbers)]
    if level == "bubblewrap":
        return [*_bwrap(info), *_python(), f"{_BWRAP_INSIDE}/{script[0]}", *script[1:]]
    shown = [f"+{path}" for path in _shown()] + [f"-{path}" for path in _hidden()]
    return [*_python(), f"{_INSIDE}/{script[0]}", *script[1:], *shown]


def _python() -> list[str]:
    """The interpreter under this one's virtual environment, without site-packages; UTF-8 whatever the locale."""
    return [_executable(), "-S", "-s", "-X", "utf8"]


def _bwrap(info: int) -> list[str]:
    """As root without a user namespace, so that limits.py can become a user whose processes are counted."""
    new = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:
        new += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        new += ["--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"]
    tree = ["--perms", "1777", "--size", str(SCRATCH), "--tmpfs", "/tmp"]
    for path in _shown():
        for folder in reversed(Path(path).parents[:-1]):
            tree += ["--perms", "0111", "--dir", str(folder)]
        tree += ["--ro-bind", path, path]
    for path in _hidden():
        tree += ["--perms", "0111", "--tmpfs", path, "--remount-ro", path]
    for name in ("null", "zero", "urandom"):
        tree += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    tree += ["--ro-bind", str(_INSIDE), _BWRAP_INSIDE, "--remount-ro", "/", "--chdir", "/tmp"]
    ends = ["--die-with-parent", "--new-session", "--as-pid-1"]  # bubblewrap's own process 1 may outlive bubblewrap
    if (program := shutil.which("bwrap")) is None:
        raise FileNotFoundError(errno.ENOENT, "not on the PATH", "bwrap")
    return [program, *ends, "--info-fd", str(info), *new, *tree]


def _executable() -> str:
    return os.path.realpath(sys._base_executable)


@cache
def _shown() -> tuple[str, ...]:
    """What a program can read: the interpreter, its library, and the shared libraries of the system."""
    library = Path(sys.base_prefix, "lib")
    paths = [_executable(), library, sysconfig.get_path("stdlib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"]
    paths = {Path(path) for path in (*paths, "/etc/ld.so.cache") if os.path.exists(path)}
    return tuple(sorted(str(path) for path in paths if not paths & set(path.parents)))


@cache
def _hidden() -> tuple[str, ...]:
    """Installed packages within those: not needed, and one of them may know the tests."""
    library, stdlib = Path(sys.base_prefix, "lib"), Path(sysconfig.get_path("stdlib"))
    folders = [stdlib, library / "python3", Path("/usr/lib/python3"), Path("/lib/python3")]
    found = [folder / name for folder in folders for name in ("site-packages", "dist-packages")]
    return tuple(sorted({str(path) for path in found if path.is_dir()}))
