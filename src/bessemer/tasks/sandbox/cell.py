"""One program behind the wall, and the trusted end of its pipes.

Three pipes beside standard input, output and error: `ask` carries what we send, `reply` what comes back line by line
(first `ready`), `info` the number of the process whose death ends everything inside. Time is counted from `ready` and
by us; what the program writes is counted while it is read. When a cell is closed, every process of it is gone and
reaped, however it was left.
"""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress

from bessemer.errors import UserError
from bessemer.tasks.sandbox.walls import ENVIRONMENT, Bounds, command

START_SECONDS = 20.0  # for the walls to stand, on a machine that is busy with other things
GRACE_SECONDS = 0.5
END_SECONDS = 10.0  # for the kernel to clear up after a kill
CHUNK = 1 << 16


class SandboxError(UserError):
    """The walls could not be built; nothing of the program has run."""


class Stopped(Exception):
    """The program went over a bound: "timeout" or "output"."""


class Cell:
    """A context manager. Raises SandboxError on entry; `line` and `finish` raise Stopped."""

    def __init__(self, level: str, bounds: Bounds, stdin: bytes = b""):
        self.stdout, self.stderr, self._lines = bytearray(), bytearray(), bytearray()
        self._limit, self._seconds = bounds.output, bounds.seconds
        self._selector = selectors.DefaultSelector()
        self._outgoing: dict[int, bytearray] = {}
        (ask, self._ask), (self._reply, reply), (self._info, info) = os.pipe(), os.pipe(), os.pipe()
        inner = (ask, reply, info)
        try:
            self._process = subprocess.Popen(
                command(level, bounds, *inner),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=inner,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            for fd in (self._ask, self._reply, self._info):
                os.close(fd)
            raise SandboxError(f"the sandbox cannot be started: {error}") from error
        finally:
            for fd in inner:
                os.close(fd)
        self._sinks = {self._process.stdout.fileno(): self.stdout, self._process.stderr.fileno(): self.stderr}
        self._sinks[self._reply] = self._lines
        for fd in self._sinks:
            self._selector.register(fd, selectors.EVENT_READ)
        for fd in (self._ask, self._process.stdin.fileno()):
            os.set_blocking(fd, False)
            self._outgoing[fd] = bytearray()
        self._send(self._process.stdin.fileno(), stdin)

    def __enter__(self) -> "Cell":
        self._deadline = time.monotonic() + START_SECONDS
        try:
            ready = self.line() == b"ready"
        except Stopped:
            ready = False
        if not ready:
            self.close()
            said = self.stderr.decode(errors="replace").strip().splitlines() or ["it did not say why"]
            raise SandboxError(f"the sandbox cannot be started: {said[-1]}")
        self._started = time.monotonic()
        self._deadline = self._started + self._seconds
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Since the program could begin."""
        return time.monotonic() - self._started

    def send(self, data: bytes) -> None:
        self._send(self._ask, data)

    def line(self) -> bytes | None:
        """The next line of the reply without its end; None when no more will come."""
        self._pump(lambda: b"\n" in self._lines or self._reply not in self._sinks)
        line, end, rest = bytes(self._lines).partition(b"\n")
        self._lines[:] = rest
        return line if end else None

    def finish(self) -> int:
        """Wait for the end; the exit status, 128 + n after signal n."""
        self._pump(lambda: not self._sinks)
        return self.close()

    def close(self) -> int:
        """End what still runs, wait until it is gone, and give the exit status. Closing twice does nothing."""
        if self._process.returncode is None:
            self._end()
            self._selector.close()
            for fd in (self._ask, self._reply, self._info):
                os.close(fd)
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                pipe.close()
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def _end(self) -> None:
        """The launcher clears up once the process it told us of is dead; its own death takes that one along."""
        if self._reply not in self._sinks:  # the program has ended or is about to; its exit status is worth a moment
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        if self._process.poll() is None:
            try:
                os.set_blocking(self._info, False)
                os.kill(json.loads(os.read(self._info, CHUNK))["child-pid"], signal.SIGKILL)
            except (OSError, ValueError):  # it has not come so far, or has just ended
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
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise Stopped("timeout")
            for key, _ in self._selector.select(left):
                (self._write if key.fd in self._outgoing else self._read)(key.fd)

    def _read(self, fd: int) -> None:
        data, sink = os.read(fd, CHUNK), self._sinks[fd]
        if not data:
            self._selector.unregister(fd)
            del self._sinks[fd]
        sink += data[: self._limit - len(sink) + 1]
        if len(sink) > self._limit:
            del sink[self._limit :]
            raise Stopped("output")

    def _write(self, fd: int) -> None:
        try:
            del self._outgoing[fd][: os.write(fd, self._outgoing[fd][:CHUNK])]
        except BrokenPipeError:
            self._outgoing[fd].clear()
        if not self._outgoing[fd]:
            self._selector.unregister(fd)
            if fd != self._ask:
                self._process.stdin.close()
                del self._outgoing[fd]
