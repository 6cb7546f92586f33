"""A separate process for judges that are not safe in the main one: math-verify, sympy, the scorers of reasoning-gym.

Those libraries evaluate the text they are given, some without any bound, and math-verify's own timeout is an alarm
signal, which works only in the main thread. So they never see a completion in the main process. The referee is one
long-lived child that has imported them. Every verdict is computed in a fork of it, which has limits on processor time
(`CPU_SECONDS`), memory and wall-clock time, cannot write files, and ends after the verdict, together with any damage
that the text did. A bomb costs its fork half a second; the referee and the next verdict are unaffected.

This protects against text that is expensive or crashes a parser. Code is judged in the code sandbox. Parent and
child (`python -m bessemer.addons.tasks.referee`) exchange lines of JSON; nothing is pickled.
"""

import gc
import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from bessemer.addons.tasks.child import Child, NoReply, bounded, confine, serve
from bessemer.addons.tasks.clock import speed
from bessemer.errors import UserError

TIMEOUT = "timeout"
CPU_SECONDS = 0.5
"""Processor time of one verdict in seconds of the reference machine (`clock.speed`), so that verdicts depend neither on
load nor on the machine. A typical verdict takes 0.04 s there."""
WALL_SECONDS = 60.0
"""Wall-clock time of one verdict, for text that blocks without using the processor."""
PATIENCE = 180.0
"""Seconds to wait for a reply from the referee: it may be importing, or sampling a problem."""
OPERATIONS = {
    "gym-names": ("bessemer.addons.tasks.gym", "library_names", None),
    "gym-options": ("bessemer.addons.tasks.gym", "library_options", None),
    "gym-problem": ("bessemer.addons.tasks.gym", "library_problem", None),
    "gym-score": ("bessemer.addons.tasks.gym", "prepare_scorer", "judge_score"),
    "maths-near": ("bessemer.addons.tasks.equality", "prepare", "judge_near"),
    "maths-read": ("bessemer.addons.tasks.equality", "prepare", "judge_gold"),
    "maths-same": ("bessemer.addons.tasks.equality", "prepare", "judge_same"),
}
"""(module, prepare, judge). `prepare(request)` runs in the referee, may import and cache anything, sees no completion.
`judge(prepared, request)` sees the completion and runs in a fork with limits. Both return JSON; an operation without
`judge` replies with what it prepared. A UserError becomes {"error": ...}, a fork that does not return {"fault":
"timeout"} or {"fault": "crash"}."""
MEMORY = 1 << 30
"""Bytes a verdict may use beyond the referee's own."""
FUNCTIONS = (
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "erf", "Si", "Ci", "Ei", "li",
)  # fmt: skip
_PLAIN = re.compile(
    r"(?:[0-9.+\-*/^()\s]|(?<![A-Za-z])(?:[A-Za-z](?![A-Za-z])|pi(?![A-Za-z])|(?:" + "|".join(FUNCTIONS) + r")(?=\()))*"
)
MAX_ALGEBRA = 2000


class RefereeFault(Exception):
    """No verdict: "timeout" (a limit was exceeded) or "crash" (the parser died)."""


def ask(operation: str, **request: Any) -> dict[str, Any]:
    """The reply to one of OPERATIONS. RefereeFault if a text cannot be judged within the limits."""
    reply = _referee(os.getpid()).ask({"operation": operation, **request})
    if "fault" in reply:
        raise RefereeFault(reply["fault"])
    if "error" in reply:
        raise UserError(reply["error"])
    return reply


@cache
def _referee(pid: int) -> "Referee":
    """One per process: a forked worker must not write to its parent's pipe."""
    return Referee()


class Referee(Child):
    """The child process, started at the first request and again if it died."""

    def __init__(self) -> None:
        super().__init__("bessemer.addons.tasks.referee")
        speed()  # which it inherits

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.exchange(request, PATIENCE)
        except NoReply as error:
            raise UserError(
                f"the referee process ended or did not reply to {request['operation']!r} ({error}); check the memory "
                "of this machine and that math-verify and reasoning-gym are installed"
            ) from error


def main() -> None:
    sys.setrecursionlimit(2000)
    serve(answer)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    name, prepare, judge = OPERATIONS[request["operation"]]
    try:
        module = import_module(name)
        prepared = getattr(module, prepare)(request)
    except UserError as error:
        return {"error": str(error)}
    if judge is None:
        return prepared
    return confined(lambda: getattr(module, judge)(prepared, request))


def confined(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """work() in a fork with limits. An exception of `work` counts as a crash."""
    if not hasattr(os, "fork"):
        return {"error": "this system cannot fork processes, without which a model's text cannot be judged safely"}
    read, write = os.pipe()
    seconds = CPU_SECONDS * speed()
    gc.freeze()  # collections of the fork then touch, and so copy, nothing of this process
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(read)
            confine(MEMORY)
            with bounded(seconds):
                os.write(write, json.dumps(work()).encode())  # fits into a pipe
        os._exit(0)
    os.close(write)
    reply, deadline = b"", time.monotonic() + WALL_SECONDS
    while seconds_left := max(0.0, deadline - time.monotonic()):
        if select.select([read], [], [], seconds_left)[0]:
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
    timed_out = not seconds_left or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return {"fault": TIMEOUT if timed_out else "crash"}


def plain(text: str) -> bool:
    """Whether a text has only numbers, one-letter names, pi, + - * / ^ and calls of FUNCTIONS; no other name."""
    return len(text) <= MAX_ALGEBRA and _PLAIN.fullmatch(text) is not None and not re.search(r"\.\s*[A-Za-z]", text)


def guard_sympy() -> None:
    """Make sympy in this process parse plain algebra only.

    Its parser evaluates text as Python: `2*x`, but also `__import__("os").system(...)`. Every parse of a string ends in
    `stringify_expr`, where anything but plain algebra is refused. What passes can still be expensive (`9**9**9`);
    the limits of the fork bound that.
    """
    import sympy.physics.units  # noqa: F401  `simplify` imports it late, and it parses the names of its units
    from sympy.parsing import sympy_parser

    unguarded = sympy_parser.stringify_expr

    def stringify_expr(s, local_dict, global_dict, transformations):
        if not plain(s):
            raise ValueError("not plain algebra")
        return unguarded(s, local_dict, global_dict, transformations)

    sympy_parser.stringify_expr = stringify_expr


if __name__ == "__main__":
    main()
