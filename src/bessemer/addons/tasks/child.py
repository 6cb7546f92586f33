"""A long-lived child process that answers requests, for work that must not run in this process.

Parent and child exchange lines of JSON; nothing is pickled. The child is this interpreter running a module of the
package whose `main` is `serve(answer)`. It ends when its standard input closes, so it does not outlive its parent.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock
from typing import Any

from bessemer import system


class NoReply(Exception):
    """The child ended or stayed silent; the next request starts another."""

    def __init__(self, why: str, status: int | None) -> None:
        super().__init__(why)
        self.out_of_time = status == -signal.SIGPROF
        """The child used up the processor time that `bounded` allowed."""


class Child:
    """The child process, started at the first request and again if it died. Threads may share it."""

    def __init__(self, module: str, max_reply: int = 1 << 24) -> None:
        self.module, self.max_reply = module, max_reply
        self._child: subprocess.Popen | None = None
        self._lock = Lock()

    def exchange(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        """The reply to a request. Raises NoReply if the child ends or stays silent for `patience` seconds."""
        with self._lock:
            child = self._started()
            assert child.stdin is not None
            try:
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                return json.loads(self._line(child, patience))
            except (OSError, EOFError, ValueError) as error:
                status = None
                if isinstance(error, EOFError | BrokenPipeError):
                    with suppress(subprocess.TimeoutExpired):
                        status = child.wait(1.0)  # it ended by itself: find out how
                self._stop(child)
                raise NoReply(str(error) or "no reply", status) from error

    def _started(self) -> subprocess.Popen:
        if self._child is None or self._child.poll() is not None:
            # A fixed hash seed: generators that iterate over sets must sample the same problem in every process.
            environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._child

    def _line(self, child: subprocess.Popen, patience: float) -> bytes:
        """One line of its output; OSError when it takes longer than `patience`, EOFError when it ends."""
        assert child.stdout is not None
        parts: list[bytes] = []
        size, pipe = 0, child.stdout.fileno()
        while not (parts and parts[-1].endswith(b"\n")):
            if not select.select([pipe], [], [], patience)[0]:
                raise TimeoutError(f"no reply in {patience:.0f} s")
            part = os.read(pipe, 1 << 16)
            size += len(part)
            if not part or size > self.max_reply:
                raise EOFError("no reply" if not part else f"a reply of more than {self.max_reply} bytes")
            parts.append(part)
        return b"".join(parts)

    def _stop(self, child: subprocess.Popen) -> None:
        with suppress(OSError):
            child.kill()
            child.wait()
        self._child = None


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The main loop of a child: replies to every request on standard input until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    for line in sys.stdin.buffer:
        replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        replies.flush()


def confine(memory: int) -> None:
    """Limits this process to `memory` bytes more than it has now, forbids it to write files, and lets the kernel kill
    it when it exceeds the processor time of `bounded`. macOS does not enforce the memory limit; there the time limit
    bounds the memory too, because the processor must clear each byte first."""
    if used := _address_space():
        system.limit("AS", used + memory)
    system.limit("FSIZE", 0)
    system.limit("CORE", 0)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Limits the block to `seconds` of processor time, which does not depend on how busy the machine is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _address_space() -> int:
    """Address space in use, in bytes; 0 if the system does not report it."""
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0
