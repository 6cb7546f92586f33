"""A process apart that judges what our own code cannot judge safely: math-verify, sympy, the scorers of reasoning-gym.

Those libraries evaluate the text they are given, some of them without any bound, and math-verify's own timeout is an
alarm signal, which works in no thread but the main one. So they never see a completion in this process. The referee is
one long-lived child that has imported them; every verdict falls in a fork of it, which has a limit of processor time
(`CPU_SECONDS`), of memory and of wall-clock time, may write no file, and is gone afterwards with whatever the text
did to it. A bomb costs its fork a third of a second; the referee and the next verdict do not notice.

This is protection against text that is expensive or crashes a parser. Code is judged in the code sandbox. The messages
are lines of JSON; nothing is pickled.
"""

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from functools import cache
from threading import Lock
from typing import Any

from bessemer.errors import UserError

CPU_SECONDS = 0.35
"""Of processor time for one verdict, so that a busy machine judges like an idle one. A usual verdict takes 0.03."""
WALL_SECONDS = 20.0
"""For what spends no processor time."""
PATIENCE = 120.0
"""Seconds to wait for an answer of the referee: it may be importing, or drawing a problem."""
MAX_REPLY = 1 << 24


class RefereeFault(Exception):
    """No verdict: "timeout" (a limit was passed) or "crash" (the parser died)."""


def ask(operation: str, **request: Any) -> dict[str, Any]:
    """The reply to a request, as in `referee_process`. RefereeFault where a text cannot be judged within the limits."""
    reply = _referee(os.getpid()).ask({"operation": operation, **request})
    if "fault" in reply:
        raise RefereeFault(reply["fault"])
    if "error" in reply:
        raise UserError(reply["error"])
    return reply


@cache
def _referee(pid: int) -> "Referee":
    """One for each process: a forked worker must not write into its parent's pipe."""
    return Referee()


class Referee:
    """The child, started when first asked and again after it died. It ends when its standard input closes."""

    def __init__(self) -> None:
        self._child: subprocess.Popen | None = None
        self._lock = Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            child = self._started()
            try:
                child.stdin.write(json.dumps(request).encode() + b"\n")
                child.stdin.flush()
                return json.loads(self._line(child))
            except (OSError, EOFError, ValueError) as error:
                self._stop(child)
                raise UserError(
                    f"the referee process ended or fell silent at {request['operation']!r} ({error or 'no reply'}); "
                    "check the memory of this machine and that math-verify and reasoning-gym are installed"
                ) from error

    def _started(self) -> subprocess.Popen:
        if self._child is None or self._child.poll() is not None:
            # a fixed hash seed: generators that walk over sets must draw the same problem in every process
            environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "bessemer.tasks.referee_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._child

    def _line(self, child: subprocess.Popen) -> bytes:
        """One line of its output; OSError when it takes longer than PATIENCE, EOFError when it ends."""
        parts, size, pipe = [], 0, child.stdout.fileno()
        while not (parts and parts[-1].endswith(b"\n")):
            if not select.select([pipe], [], [], PATIENCE)[0]:
                raise TimeoutError(f"no reply in {PATIENCE:.0f} s")
            part = os.read(pipe, 1 << 16)
            size += len(part)
            if not part or size > MAX_REPLY:
                raise EOFError("no reply" if not part else "a reply beyond all bounds")
            parts.append(part)
        return b"".join(parts)

    def _stop(self, child: subprocess.Popen) -> None:
        with suppress(OSError):
            child.kill()
            child.wait()
        self._child = None
