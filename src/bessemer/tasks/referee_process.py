"""The other end of `referee`: `python -m bessemer.tasks.referee_process`, JSON lines in, JSON lines out.

An operation has two halves. `prepare(request)` runs here, may import and keep what it likes, and sees no completion.
`judge(prepared, request)` sees the completion and runs in a fork with limits. Both return what JSON can carry; an
operation without a second half replies with what it prepared. A UserError becomes {"error": ...}, a fork that does not
come back {"fault": "timeout"} or {"fault": "crash"}.
"""

import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.referee import CPU_SECONDS, WALL_SECONDS

OPERATIONS = {
    "gym-names": ("bessemer.tasks.gym.process", "names", None),
    "gym-problem": ("bessemer.tasks.gym.process", "problem", None),
    "gym-score": ("bessemer.tasks.gym.process", "entry", "score"),
    "maths-read": ("bessemer.tasks.maths.process", "warm", "read"),
    "maths-same": ("bessemer.tasks.maths.process", "warm", "same"),
}
MEMORY = 1 << 30
"""Bytes a verdict may take beyond what the referee has."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    sys.setrecursionlimit(2000)
    for line in sys.stdin.buffer:
        replies.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        replies.flush()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    module, first, second = OPERATIONS[request["operation"]]
    try:
        room = import_module(module)
        prepared = getattr(room, first)(request)
    except UserError as error:
        return {"error": str(error)}
    if second is None:
        return prepared
    return confined(lambda: getattr(room, second)(prepared, request))


def confined(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """work() in a fork with limits. An exception of `work` is a crash: the parser's answer to that text is none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(read)
            _limit()
            os.write(write, json.dumps(work()).encode())  # shorter than a pipe holds
        os._exit(0)
    os.close(write)
    reply, deadline = b"", time.monotonic() + WALL_SECONDS
    while left := max(0.0, deadline - time.monotonic()):
        if select.select([read], [], [], left)[0]:
            part = os.read(read, 1 << 16)
            reply += part
            if not part:
                break
    os.close(read)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with suppress(ValueError):
        return json.loads(reply)
    timed_out = not left or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return {"fault": "timeout" if timed_out else "crash"}


def _limit() -> None:
    """The kernel ends a process at SIGPROF, whatever it is doing; no handler of ours has to get its turn."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    for kind, most in ((resource.RLIMIT_AS, _memory() + MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (most, most))


def _memory() -> int:
    """Bytes of address space now; 0 where the system does not tell, and the limit is then MEMORY alone."""
    with suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0


if __name__ == "__main__":
    main()
