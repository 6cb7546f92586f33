"""Sandboxes that serve one program after another, since building one takes longer than most programs.

Every program gets a fork of the sandbox's process 1, in which no program has been read, with a pid namespace, pipes and
a scratch folder of its own, and the limits of a sandbox of its own (inside/serve.py, mode `warm`). When it is over, the
kernel has ended all its processes before the next begins; a sandbox that does not say so in time is closed instead, as
is one after LONGEST programs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from bessemer.addons.tasks.sandbox.process import (
    END_SECONDS,
    PROCESSES,
    START_SECONDS,
    Bounds,
    LimitExceeded,
    SandboxError,
    SandboxProcess,
    numbers_of,
)

LONGEST = 500
"""Programs of one sandbox."""
_ANY = Bounds(1.0, 256, 1 << 16, 1.0)
"""Bounds of process 1, which applies none."""


class WarmSandbox:
    """One sandbox; `program` returns a context manager like `SandboxProcess`."""

    def __init__(self, level: str, imports: bool) -> None:
        self.level = level
        self.process = SandboxProcess(level, _ANY, mode="warm", imports=imports)
        self.process.__enter__()
        self.channel = socket.socket(fileno=os.dup(self.process.ask))
        self.served = 0

    def program(self, bounds: Bounds, mode: str) -> WarmProgram:
        return WarmProgram(self, bounds, mode)

    def begin(self, bounds: Bounds, mode: str, fds: list[int]) -> None:
        """Hand over the pipes of a program. OSError if the sandbox is gone."""
        self.served += 1
        numbers = list(numbers_of(bounds, mode))
        if os.geteuid() != 0:
            numbers[-1] = PROCESSES + 1  # process 1 counts as one of the user's
        socket.send_fds(self.channel, [" ".join(map(str, (mode, *numbers))).encode()], fds)

    def end(self, soon: bool) -> int | None:
        """End the program, at once or if it does not end `soon`; its exit status, None if the sandbox is lost."""
        with suppress(OSError, LimitExceeded, ValueError):
            self.channel.send(b"wait" if soon else b"end")
            line = self.process.line_within(END_SECONDS)
            if line is not None and line.startswith(b"ended "):
                return int(line[6:])
        return None

    def close(self) -> None:
        self.channel.close()
        self.process.close()


class WarmProgram(SandboxProcess):
    """One program in a warm sandbox."""

    def __init__(self, sandbox: WarmSandbox, bounds: Bounds, mode: str) -> None:
        self._prepare(sandbox.level, bounds)
        self.sandbox = sandbox
        self._first, self._ours = sandbox.process.first, 2
        self._status: int | None = None
        self.lost = False
        """Whether the sandbox did not end the program, so that it must be closed."""
        (ask, self._ask), (self._reply, reply), (program_stdin, stdin) = os.pipe(), os.pipe(), os.pipe()
        (stdout, out), (stderr, err) = os.pipe(), os.pipe()
        program_ends = [ask, reply, program_stdin, out, err]
        self._attach(os.fdopen(stdin, "wb", 0), os.fdopen(stdout, "rb", 0), os.fdopen(stderr, "rb", 0))
        self._send(self._stdin.fileno(), b"")
        try:
            sandbox.begin(bounds, mode, program_ends)
        except OSError as error:
            self.lost, self._status = True, 1
            self._close_pipes()
            raise SandboxError(f"the sandbox is gone: {error}") from error
        finally:
            for fd in program_ends:
                os.close(fd)

    def __enter__(self) -> WarmProgram:
        ready = None
        with suppress(LimitExceeded):
            ready = self.line_within(START_SECONDS)
        if ready != b"ready":
            self.close()
            raise SandboxError("the sandbox does not begin a program")
        self._begin()
        return self

    def close(self) -> int:
        if self._status is None:
            ended = self.sandbox.end(soon=self._reply not in self._sinks)
            self.lost, self._status = ended is None, 1 if ended is None else ended
            self._close_pipes()
        return self._status

    def _close_pipes(self) -> None:
        self._selector.close()
        for fd in (self._ask, self._reply):
            os.close(fd)
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()


class WarmSandboxes:
    """Sandboxes that wait for the next program, by level and names."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, bool], list[WarmSandbox]] = {}

    @contextmanager
    def program(self, level: str, bounds: Bounds, mode: str, imports: bool) -> Iterator[SandboxProcess]:
        sandbox, program = self._started(level, bounds, mode, imports)
        try:
            with program:
                yield program
        finally:
            if program.lost or sandbox.served >= LONGEST:
                sandbox.close()
            else:
                self._idle.setdefault((level, imports), []).append(sandbox)

    def close(self) -> None:
        for sandboxes in self._idle.values():
            while sandboxes:
                sandboxes.pop().close()

    def _started(self, level: str, bounds: Bounds, mode: str, imports: bool) -> tuple[WarmSandbox, WarmProgram]:
        """An idle sandbox with its program, else a new one: an idle one may have been killed."""
        idle = self._idle.get((level, imports), [])
        while idle:
            sandbox = idle.pop()
            try:
                return sandbox, sandbox.program(bounds, mode)
            except SandboxError:
                sandbox.close()
        sandbox = WarmSandbox(level, imports)
        return sandbox, sandbox.program(bounds, mode)


_kept: ContextVar[WarmSandboxes | None] = ContextVar("_kept", default=None)


@contextmanager
def kept() -> Iterator[None]:
    """In this block sandboxes are kept from one program to the next."""
    sandboxes = WarmSandboxes()
    token = _kept.set(sandboxes)
    try:
        yield
    finally:
        _kept.reset(token)
        sandboxes.close()


@contextmanager
def opened(level: str, bounds: Bounds, mode: str, imports: bool) -> Iterator[SandboxProcess]:
    """A program in a kept sandbox, or in one of its own. Without isolation there is nothing to keep."""
    sandboxes = _kept.get()
    if sandboxes is None or level == "none":
        with SandboxProcess(level, bounds, mode=mode, imports=imports) as process:
            yield process
    else:
        with sandboxes.program(level, bounds, mode, imports) as process:
            yield process
