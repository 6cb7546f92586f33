"""Running untrusted code: `run` a program, or `judge` a function by its answers.

The output of a program may be a lie, so printing a pass must not help: `judge` sends the arguments of one test at a
time and compares the answer on this side; expected values never enter the sandbox. Printing a marker, exiting early or
redefining anything does not help: only right answers pass. Without isolation nothing runs, unless the user forces it
with an environment variable (FORCE).
"""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bessemer.errors import UserError
from bessemer.tasks.sandbox.process import LEVELS, Bounds, LimitExceeded, SandboxError, SandboxProcess

FORCE = "BESSEMER_RUN_UNTRUSTED_CODE_WITHOUT_ISOLATION"
"""Environment variable; "1" lets hostile code run with the user's own rights where no isolation works."""
SOURCE_LIMIT = 100_000
OK, ERROR, TIMEOUT, MEMORY, OUTPUT = "ok", "error", "timeout", "memory", "output"
CORRECT, WRONG_OUTPUT, NO_FUNCTION, SYNTAX_ERROR = "correct", "wrong-output", "no-function", "syntax-error"

Tests = Sequence[tuple[Sequence[Any], Any]]


@dataclass(frozen=True)
class Result:
    """`status` is ok, error (exit status not 0, or an exception), timeout, memory or output (it wrote too much)."""

    status: str
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Judgement:
    """`reason` is correct, wrong-output, error, timeout, memory, output, no-function or syntax-error."""

    reason: str
    passed: int
    """Tests passed before the first failure."""
    detail: str
    seconds: float

    @property
    def correct(self) -> bool:
        return self.reason == CORRECT


def run(
    program: str,
    *,
    stdin: str = "",
    seconds: float = 2.0,
    memory_mb: int = 256,
    output_kb: int = 64,
    isolation: str | None = None,
) -> Result:
    """Run a script. `isolation` names a level; None takes the best that works here."""
    bounds = _bounds(seconds, memory_mb, output_kb)
    with SandboxProcess(resolve_level(isolation), bounds, _bytes(stdin)) as process:
        source = _bytes(program)
        process.send(b"run %d\n" % len(source) + source)
        try:
            line = process.line()
            status = ERROR if process.finish() or line else OK
            if line and _reply(line).get("error") == "MemoryError":
                status = MEMORY
        except LimitExceeded as exceeded:
            status = str(exceeded)
        elapsed = process.seconds
    return Result(status, process.stdout.decode(errors="replace"), process.stderr.decode(errors="replace"), elapsed)


def judge(
    source: str,
    function: str,
    tests: Tests,
    *,
    seconds: float = 2.0,
    memory_mb: int = 256,
    isolation: str | None = None,
) -> Judgement:
    """Call `function` of `source` with the arguments of every test; `seconds` for all of them together.

    A test is (arguments, expected), both made of None, bool, int, float, str, list and dict; see `same`.
    """
    if not tests or not function.isidentifier():
        raise ValueError("judging takes the name of a function and at least one test")
    start = time.monotonic()
    bounds = _bounds(seconds, memory_mb, 64)
    with SandboxProcess(resolve_level(isolation), bounds) as process:
        data, passed = _bytes(source), 0
        process.send(b"call %s %d\n" % (function.encode(), len(data)) + data)
        try:
            reason, detail = _read_verdict(process, True)
            for arguments, expected in tests:
                if reason != CORRECT:
                    break
                process.send(repr(tuple(arguments)).encode() + b"\n")
                reason, detail = _read_verdict(process, expected)
                passed += reason == CORRECT
        except LimitExceeded as exceeded:
            reason, detail = str(exceeded), ""
    return Judgement(reason, passed, detail, time.monotonic() - start)


def same(expected: Any, got: Any) -> bool:
    """Equal in value and shape. A bool is no number; where a float is expected, a relative error of 10^-9 is fine."""
    if isinstance(expected, bool) or isinstance(got, bool) or expected is None or got is None:
        return expected is got
    if isinstance(expected, float):
        return isinstance(got, int | float) and math.isclose(expected, got, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, list | tuple):
        return isinstance(got, list) and len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict):
        return isinstance(got, dict) and expected.keys() == got.keys() and all(same(expected[k], got[k]) for k in got)
    return isinstance(got, str) == isinstance(expected, str) and expected == got


def level() -> str:
    """The strongest level that works on this machine, found by a trial of each; "none" always works."""
    return next(name for name in LEVELS if not trial(name))


def resolve_level(isolation: str | None = None) -> str:
    """The named level, else `level()`. UserError where that is "none" and FORCE is not set."""
    if isolation is not None:
        if isolation not in LEVELS:
            raise UserError(f"the sandbox has no level {isolation!r}; known: {', '.join(LEVELS)}")
        return isolation
    if level() == "none" and os.environ.get(FORCE) != "1":
        raise UserError(
            f"code is not run here, because nothing would stop it from reading and deleting your files: {advice()}; or "
            f"set {FORCE}=1 to run it with your own rights"
        )
    return level()


@cache
def trial(name: str) -> str:
    """Why a level does not work here, found by running a program at that level; "" where it does."""
    if name == "none":
        return ""
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    try:
        result = run(f"import os\nprint(os.path.exists({__file__!r}), os.getuid())", isolation=name, seconds=10)
    except SandboxError as error:
        return str(error)
    works = (result.status, result.stdout) == (OK, "False 65534\n")
    return "" if works else f"a trial gave {result.status}: {(result.stderr or result.stdout)[-200:]}"


def advice() -> str:
    """How to get a better level, in words."""
    return (
        "install bubblewrap (apt install bubblewrap), or allow user namespaces (sysctl user.max_user_namespaces=10000, "
        "kernel.apparmor_restrict_unprivileged_userns=0; in Docker --security-opt seccomp=unconfined)"
    )


def _read_verdict(process: SandboxProcess, expected: Any) -> tuple[str, str]:
    """The verdict on one reply, and what was wrong in words."""
    line = process.line()
    if line is None:
        return ERROR, f"it ended early, with exit status {process.close()}"
    reply = _reply(line)
    if "value" in reply:
        return (CORRECT, "") if same(expected, reply["value"]) else (WRONG_OUTPUT, _excerpt(line))
    error = reply.get("error")
    known = {"no-function": NO_FUNCTION, "SyntaxError": SYNTAX_ERROR, "MemoryError": MEMORY}
    return known.get(error, ERROR) if isinstance(error, str) else ERROR, _excerpt(line)


def _reply(line: bytes) -> dict[str, Any]:
    """A line of JSON that may be anything at all; {} where it is not an object."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return reply if isinstance(reply, dict) else {}


def _excerpt(line: bytes) -> str:
    return line[:300].decode(errors="replace")


def _bytes(text: str) -> bytes:
    if len(text) > SOURCE_LIMIT:
        raise UserError(f"{len(text)} characters are too many for the sandbox; it takes {SOURCE_LIMIT}")
    return text.encode(errors="replace")


def _bounds(seconds: float, memory_mb: int, output_kb: int) -> Bounds:
    if not 0 < seconds <= 60 or not 64 <= memory_mb <= 4096 or not 1 <= output_kb <= 4096:
        raise UserError(
            f"the sandbox takes up to 60 seconds, 64 to 4096 MB of memory and 1 to 4096 KB of output, not "
            f"{seconds} s, {memory_mb} MB and {output_kb} KB"
        )
    return Bounds(seconds, memory_mb, output_kb << 10)
