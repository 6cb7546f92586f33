"""One program in the sandbox: the levels of isolation, the command that builds each, and the trusted end of the pipes.

bubblewrap   bwrap builds the sandbox: new namespaces of every kind, a read-only root with the interpreter and the
             system's libraries, an empty /tmp of 16 MB, no network
namespaces   the same, built by inside/confine.py if bubblewrap is not installed
none         rlimits, the filter of system calls (which also refuses new processes) and the clock, but the program reads
             and writes files with the user's rights

There are three pipes in addition to standard input, output and error: `ask` carries what we send, `reply` the answers
line by line (first `ready`), `info` the number of the process whose death ends everything inside. Time is counted from
`ready`, on this side (see watch.py); output is counted while it is read, and the memory of all processes together is
checked while they run. When a sandbox is closed, all its processes are gone and reaped, however it was left.

Both levels run the program in a user namespace of its own, even for root, because the kernel counts processes by user
and namespace: no sandbox runs into the limit of another. A user other than root maps only itself there; for root, this
side maps root and nobody, which `maps` tells bubblewrap.

bubblewrap's own `--die-with-parent` can leave a process behind: killed between creating its child and releasing it,
bubblewrap leaves the child waiting. So process 1 inside watches our process (`alive`, a pidfd) and ends with it.
"""

import errno
import json
import math
import os
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from bessemer.addons.tasks.clock import speed
from bessemer.addons.tasks.sandbox.watch import INTERVAL, SLEEP_LOOK, ProgramClock, look, processes
from bessemer.errors import UserError

LEVELS = ("bubblewrap", "namespaces", "none")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}  # complete; equal hashes make equal verdicts
SCRATCH = 16 << 20  # bytes under /tmp
PROCESSES = 16
NOBODY = "65534"
_INSIDE = Path(__file__).parent / "inside"
_BWRAP_INSIDE = "/inside"
START_SECONDS = 20.0  # to build the sandbox, on a busy machine
GRACE_SECONDS = 0.5
PATIENCE = 10.0
"""How many times its limits a program may take by the clock on the wall: beside others that take its cores, or if it
hides its processor time in children that nobody waits for."""
END_SECONDS = 10.0  # for the kernel to clean up after a kill
CHUNK = 1 << 16


@dataclass(frozen=True)
class Bounds:
    """What a program may use: `seconds` of the reference machine until its clock restarts, `total` of them in all, and
    `output` bytes of each of its streams."""

    seconds: float
    memory_mb: int
    output: int
    total: float


class SandboxError(UserError):
    """The sandbox could not be built; nothing of the program has run."""


class LimitExceeded(Exception):
    """The program exceeded a bound: "timeout", "output" or "memory"."""


class SandboxProcess:
    """A context manager. Raises SandboxError on entry; `line` and `finish` raise LimitExceeded. In mode "warm" it is a
    sandbox for one program after another (see warm.py)."""

    def __init__(self, level: str, bounds: Bounds, stdin: bytes = b"", mode: str = "once", imports: bool = False):
        self._prepare(level, bounds)
        (ask, self._ask), (self._reply, reply), (self._info, info) = _channel(mode), os.pipe(), os.pipe()
        (maps, self._maps), alive = os.pipe(), os.pidfd_open(os.getpid()) if level == "bubblewrap" else -1
        inner = [ask, reply, info] + ([maps, alive] if level == "bubblewrap" else [])
        try:
            self._process = subprocess.Popen(
                _command(mode, imports, level, bounds, ask, reply, info, maps, alive),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[*inner, self._info],  # open inside too: else SIGPIPE ends bubblewrap if we die
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            for fd in (self._ask, self._reply, self._info, self._maps):
                os.close(fd)
            raise SandboxError(f"the sandbox cannot be started: {error}") from error
        finally:
            for fd in {*inner, maps}:
                os.close(fd)
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self._attach(*(pipe for pipe in pipes if pipe is not None))
        self._send(self._stdin.fileno(), stdin)
        self._mapped = level == "bubblewrap" and os.geteuid() == 0

    def _prepare(self, level: str, bounds: Bounds) -> None:
        self.stdout, self.stderr, self._lines = bytearray(), bytearray(), bytearray()
        self._limit, self._seconds, self._total = bounds.output, bounds.seconds, bounds.total
        self._memory = bounds.memory_mb << 20 if level != "none" else None
        self._first: int | None = None
        self._ours = 1
        """How many processes, the first ones, are not the program's."""
        self._clock = ProgramClock(speed())
        self._next_look = self._next_time = math.inf
        self._selector = selectors.DefaultSelector()
        self._outgoing: dict[int, bytearray] = {}

    def _attach(self, stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]) -> None:
        """Watch our ends of the program's pipes, and those of `_ask` and `_reply`."""
        self._stdin, self._stdout, self._stderr = stdin, stdout, stderr
        self._sinks = {stdout.fileno(): self.stdout, stderr.fileno(): self.stderr, self._reply: self._lines}
        for fd in self._sinks:
            self._selector.register(fd, selectors.EVENT_READ)
        for fd in (self._ask, stdin.fileno()):
            os.set_blocking(fd, False)
            self._outgoing[fd] = bytearray()

    def __enter__(self) -> "SandboxProcess":
        try:
            self._deadline = time.monotonic() + START_SECONDS
            if self._mapped:
                self._map_ids()
            ready = self.line_within(START_SECONDS) == b"ready"
        except LimitExceeded:
            ready = False
        if not ready:
            self.close()
            lines = self.stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
            raise SandboxError(f"the sandbox cannot be started: {lines[-1]}")
        self._first = self._first or self._read_info()
        self._begin()
        return self

    def _begin(self) -> None:
        """The program's time begins."""
        self._started = time.monotonic()
        self._next_look = self._started + INTERVAL
        self.restart_clock()

    def _map_ids(self) -> None:
        """Map root and nobody into bubblewrap's new user namespace, and let it continue; if that fails, it says why."""
        self._first = self._read_info()
        with suppress(OSError):
            for kind in ("uid", "gid"):
                Path(f"/proc/{self._first}/{kind}_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1")
        with suppress(BrokenPipeError):
            os.write(self._maps, b"g")

    def _read_info(self) -> int | None:
        """The process whose death ends everything inside; None if the launcher ended before it reported one."""
        text = b""
        while b"}" not in text and select.select([self._info], [], [], max(0, self._deadline - time.monotonic()))[0]:
            if not (part := os.read(self._info, CHUNK)):
                return None
            text += part
        return json.loads(text)["child-pid"] if b"}" in text else None

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def ask(self) -> int:
        """Our end of what the sandbox is asked through."""
        return self._ask

    @property
    def first(self) -> int | None:
        """The process whose death ends everything inside."""
        return self._first

    def line_within(self, seconds: float) -> bytes | None:
        """`line`, while no program runs."""
        self._deadline, self._next_look = time.monotonic() + seconds, math.inf
        return self._next_line()

    @property
    def seconds(self) -> float:
        """Time since the program could start."""
        return time.monotonic() - self._started

    def send(self, data: bytes) -> None:
        self._send(self._ask, data)

    def line(self) -> bytes | None:
        """The next line of the reply without its end; None after the last."""
        line = self._next_line()
        if time.monotonic() > self._clock.began + self._seconds * min(1.0, self._clock.speed):
            self._look_at_clock()  # it may have been over before we heard of it
        return line

    def _next_line(self) -> bytes | None:
        self._pump(lambda: b"\n" in self._lines or self._reply not in self._sinks)
        line, end, rest = bytes(self._lines).partition(b"\n")
        self._lines[:] = rest
        return line if end else None

    def restart_clock(self) -> None:
        """Give the program the time of a test again, as far as the total allows."""
        self._clock.start(self._processes())
        self._next_time = self._clock.began + SLEEP_LOOK
        self._deadline = min(
            self._clock.began + PATIENCE * (1.0 + self._seconds * self._clock.speed),
            self._started + PATIENCE * (1.0 + self._total * self._clock.speed),
        )

    def take_output(self) -> tuple[bytes, bytes]:
        """What has arrived on standard output and error, or waits in the pipes, since the last time."""
        sinks = (self._stdout.fileno(), self._stderr.fileno())
        while waiting := [fd for fd in select.select(sinks, (), (), 0)[0] if fd in self._sinks]:
            for fd in waiting:
                self._read(fd)
        output = bytes(self.stdout), bytes(self.stderr)
        self.stdout.clear()
        self.stderr.clear()
        return output

    def finish(self) -> int:
        """Wait for the end; return the exit status, 128 + n after signal n."""
        self._pump(lambda: not self._sinks)
        return self.close()

    def close(self) -> int:
        """End what still runs, wait until it is gone, and return the exit status. Closing twice does nothing."""
        if self._process.returncode is None:
            self._end()
            self._selector.close()
            for fd in (self._ask, self._reply, self._info, self._maps):
                os.close(fd)
            for pipe in (self._stdin, self._stdout, self._stderr):
                pipe.close()
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def _end(self) -> None:
        """Kill the process that the launcher reported, and let the launcher clean up. Its death does the same."""
        if self._reply not in self._sinks:  # the program has ended or is about to: wait for its exit status
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        if self._process.poll() is None:
            try:
                os.kill(self._first or self._read_info() or self._process.pid, signal.SIGKILL)
            except (OSError, ValueError):  # just ended
                self._process.kill()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, fd: int, data: bytes) -> None:
        self._outgoing[fd] += data
        if fd not in self._selector.get_map():
            self._selector.register(fd, selectors.EVENT_WRITE)

    def _pump(self, done: Callable[[], bool]) -> None:
        """Move bytes both ways until `done`."""
        while not done():
            seconds_left = self._deadline - time.monotonic()
            if seconds_left <= 0:
                raise LimitExceeded("timeout")
            for key, _ in self._selector.select(max(0, min(seconds_left, self._next_look - time.monotonic()))):
                (self._write if key.fd in self._outgoing else self._read)(key.fd)
            if time.monotonic() >= self._next_look and not done():
                self._look()

    def _processes(self) -> list[int]:
        return processes(self._first) if self._first else []

    def _look(self) -> None:
        pause: float | None = INTERVAL
        if self._memory and self._first:
            pause = look(self._processes(), self._ours, self._memory)
        if pause is None:
            raise LimitExceeded("memory")
        if time.monotonic() >= self._next_time:
            self._look_at_clock()
        self._next_look = time.monotonic() + pause

    def _look_at_clock(self) -> None:
        spent = self._clock.look(self._processes())
        if spent > self._seconds or self._clock.before + spent > self._total:
            raise LimitExceeded("timeout")
        self._next_time = time.monotonic() + SLEEP_LOOK

    def _read(self, fd: int) -> None:
        data, sink = os.read(fd, CHUNK), self._sinks[fd]
        if not data:
            self._selector.unregister(fd)
            del self._sinks[fd]
        sink += data[: self._limit - len(sink) + 1]
        if len(sink) > self._limit:
            del sink[self._limit :]
            raise LimitExceeded("output")

    def _write(self, fd: int) -> None:
        try:
            del self._outgoing[fd][: os.write(fd, self._outgoing[fd][:CHUNK])]
        except BrokenPipeError:
            self._outgoing[fd].clear()
        if not self._outgoing[fd]:
            self._selector.unregister(fd)
            if fd != self._ask:
                self._stdin.close()
                del self._outgoing[fd]


def _channel(mode: str) -> tuple[int, int]:
    """The sandbox's end and ours of what it is asked through: a pipe, or a socket, which carries pipes."""
    if mode != "warm":
        return os.pipe()
    far_end, near_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return far_end.detach(), near_end.detach()


def numbers_of(bounds: Bounds, mode: str) -> tuple[int, int, int, int]:
    """Limits of one process: seconds of processor time, slightly above the clock's, which thus strikes first; bytes of
    memory and of files; processes."""
    # in mode each, every test has a process of its own
    scratch, seconds = (SCRATCH, bounds.total) if mode == "once" else (0, bounds.seconds)
    return int(seconds * speed()) + 2, bounds.memory_mb << 20, scratch, PROCESSES


def _command(
    mode: str, imports: bool, level: str, bounds: Bounds, ask: int, reply: int, info: int, maps: int, alive: int
) -> list[str]:
    """The command line of a sandbox."""
    numbers = (ask, reply, info, alive, os.getpid(), *numbers_of(bounds, mode))
    script = ["main.py", mode + "+" * imports, level, *map(str, numbers)]
    if level == "bubblewrap":
        return [*_bwrap(info, maps), *_python(), f"{_BWRAP_INSIDE}/{script[0]}", *script[1:]]
    paths = [f"+{path}" for path in _readable()] + [f"-{path}" for path in _hidden()]
    return [*_python(), f"{_INSIDE}/{script[0]}", *script[1:], *paths]


def _python() -> list[str]:
    """The interpreter under this one's virtual environment, without site-packages; UTF-8 whatever the locale."""
    return [_executable(), "-S", "-s", "-X", "utf8"]


def _bwrap(info: int, maps: int) -> list[str]:
    """Process 1 may mount /tmp, and as root become a user whose processes are counted; confine.py gives that up."""
    new = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    new += ["--unshare-cgroup-try", "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    if os.geteuid() == 0:
        new += ["--userns-block-fd", str(maps), "--uid", "0", "--gid", "0"]
        new += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    else:
        new += ["--uid", NOBODY, "--gid", NOBODY]
    tree = ["--dir", "/tmp"]
    for path in _readable():
        for folder in reversed(Path(path).parents[:-1]):
            tree += ["--perms", "0111", "--dir", str(folder)]
        tree += ["--ro-bind", path, path]
    for path in _hidden():
        tree += ["--perms", "0111", "--tmpfs", path, "--remount-ro", path]
    for name in ("null", "zero", "urandom"):
        tree += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    tree += ["--ro-bind", str(_INSIDE), _BWRAP_INSIDE, "--remount-ro", "/", "--chdir", "/tmp"]
    ends = ["--new-session", "--as-pid-1"]
    if (program := shutil.which("bwrap")) is None:
        raise FileNotFoundError(errno.ENOENT, "not on the PATH", "bwrap")
    return [program, *ends, "--info-fd", str(info), *new, *tree]


def _executable() -> str:
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # CPython's own


@cache
def _readable() -> tuple[str, ...]:
    """Paths a program can read: the interpreter, its library, and the shared libraries of the system."""
    interpreter = (_executable(), f"{sys.base_prefix}/lib", sysconfig.get_path("stdlib"))
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
    paths = {Path(path) for path in (*interpreter, *system) if os.path.exists(path)}
    return tuple(sorted(str(path) for path in paths if not paths & set(path.parents)))


@cache
def _hidden() -> tuple[str, ...]:
    """Installed packages below those paths: not needed, and one of them may contain the tests."""
    library, stdlib = Path(sys.base_prefix, "lib"), Path(sysconfig.get_path("stdlib"))
    folders = [stdlib, library / "python3", Path("/usr/lib/python3"), Path("/lib/python3")]
    packages = [folder / name for folder in folders for name in ("site-packages", "dist-packages")]
    return tuple(sorted({str(path) for path in packages if path.is_dir()}))
