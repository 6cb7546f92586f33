"""Runs untrusted code: `run` a program, `judge` a function by its answers, or `judge_program` by its output.

The output of a program may be a lie, so printing a pass must not help: `judge` sends the arguments of one test at a
time and compares the answer on this side; expected values never enter the sandbox. Printing a marker, exiting early or
redefining anything does not help: only correct answers pass. Without isolation nothing runs, unless the user forces it
with an environment variable (FORCE).
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from bessemer.addons.tasks.sandbox.process import LEVELS, Bounds, LimitExceeded, SandboxError, SandboxProcess
from bessemer.addons.tasks.sandbox.warm import opened
from bessemer.errors import UserError
from bessemer.system import is_linux

FORCE = "BESSEMER_RUN_UNTRUSTED_CODE_WITHOUT_ISOLATION"
"""Environment variable; "1" lets hostile code run with the user's own rights if no isolation works."""
ELSEWHERE = (
    "the sandbox is built from Linux namespaces: rewards and scores of code need Linux (a container or a virtual "
    "machine will do); everything else runs here"
)
SOURCE_LIMIT = 100_000
INPUT_LIMIT = 1 << 25
"""Maximum characters of a test's input."""
LONG_LINE = 4096
"""Characters of arguments above which they are sent as JSON."""
TOTAL_SECONDS = 60.0
"""Time limit of a program over all its tests, if that is more than ten times the limit of one test."""
OK, ERROR, TIMEOUT, MEMORY, OUTPUT = "ok", "error", "timeout", "memory", "output"
CORRECT, WRONG_OUTPUT, NO_FUNCTION, SYNTAX_ERROR = "correct", "wrong-output", "no-function", "syntax-error"
_ERRORS = {"no-function": NO_FUNCTION, "MemoryError": MEMORY} | dict.fromkeys(
    ("SyntaxError", "IndentationError", "TabError"), SYNTAX_ERROR
)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,300}(?:\.[0-9]{0,300})?|\.[0-9]{1,300})(?:[eE][+-]?[0-9]{1,3})?")

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
    per_test: bool = False,
    memory_mb: int = 256,
    imports: bool = False,
    isolation: str | None = None,
) -> Judgement:
    """Call `function` of `source` with the arguments of every test; `seconds` for all of them together.

    With `per_test`, `seconds` limits one test, and all have the total of `judge_program`. A test is (arguments,
    expected), both made of None, bool, int, float, str, list and dict; see `same`. With `imports`, the source may name
    what the graders of contest collections import before it (inside/serve.py, IMPORTED).
    """
    if not tests or not function.isidentifier():
        raise ValueError("judging takes the name of a function and at least one test")
    start = time.monotonic()
    bounds = _bounds(seconds, memory_mb, 64, per_test)
    bounds = replace(bounds, output=bounds.output + 2 * max(len(repr(expected)) for _, expected in tests))
    with opened(resolve_level(isolation), bounds, "once", imports) as process:
        data, passed = _bytes(source), 0
        process.send(b"call %s %d\n" % (function.encode(), len(data)) + data)
        try:
            reason, detail = _read_verdict(process, True)
            for arguments, expected in tests:
                if reason != CORRECT:
                    break
                process.restart_clock()
                process.send(_literal(arguments) + b"\n")
                reason, detail = _read_verdict(process, expected)
                if reason == CORRECT:
                    process.take_output()  # what it prints is bounded test by test
                    passed += 1
        except LimitExceeded as exceeded:
            reason, detail = str(exceeded), ""
    return Judgement(reason, passed, detail, time.monotonic() - start)


def judge_program(
    source: str,
    tests: Sequence[tuple[str, str]],
    *,
    seconds: float = 2.0,
    memory_mb: int = 256,
    tolerance: float = 0.0,
    imports: bool = False,
    isolation: str | None = None,
) -> Judgement:
    """Run a program on the input of every test and compare its output (see `same_output`), until the first failure.

    A test is (input, expected output). `seconds` limits one test; all have TOTAL_SECONDS, or 10 * `seconds` if more.
    `imports` as in `judge`.
    """
    if not tests:
        raise ValueError("judging takes at least one test")
    start = time.monotonic()
    bounds = _bounds(seconds, memory_mb, 64, per_test=True)
    bounds = replace(bounds, output=bounds.output + 2 * max(len(expected.encode()) for _, expected in tests))
    reason, detail, passed = CORRECT, "", 0
    with opened(resolve_level(isolation), bounds, "each", imports) as process:
        data = _bytes(source)
        process.send(b"%d\n" % len(data) + data)
        try:
            for stdin, expected in tests:
                reason, detail = _run_test(process, stdin.encode(errors="replace"), expected, tolerance)
                if reason != CORRECT:
                    break
                passed += 1
        except LimitExceeded as exceeded:
            reason, detail = str(exceeded), ""
    return Judgement(reason, passed, detail, time.monotonic() - start)


def _literal(arguments: Sequence[Any]) -> bytes:
    """A line of arguments: a Python literal, or JSON if it is long and says the same, since Python's parser takes a
    hundred times the memory."""
    text = repr(tuple(arguments))
    if len(text) > LONG_LINE:
        with suppress(TypeError, ValueError):
            line = json.dumps(arguments := list(arguments))
            if repr(json.loads(line)) == repr(arguments):
                return b"json " + line.encode()
    return text.encode()


def _run_test(process: SandboxProcess, stdin: bytes, expected: str, tolerance: float) -> tuple[str, str]:
    process.restart_clock()
    process.send(b"%d\n" % len(stdin) + stdin)
    line = process.line()
    if line is None:
        return ERROR, "the sandbox ended"
    out, err = process.take_output()
    if _reply(line).get("status") != 0:
        last = err.decode(errors="replace").strip().rpartition("\n")[2][:300]
        return _ERRORS.get(last.partition(":")[0], ERROR), last
    output = out.decode(errors="replace")
    return (CORRECT, "") if same_output(expected, output, tolerance) else (WRONG_OUTPUT, output[:300])


def same_output(expected: str, actual: str, tolerance: float = 0.0) -> bool:
    """Equal line by line, except for the amount of white space in a line, and blank lines at the end.

    With a tolerance, a decimal number may have that absolute or relative error, and an integer that absolute error.
    """
    expected_words, actual_words = ([line.split() for line in text.rstrip().split("\n")] for text in (expected, actual))
    if expected_words == actual_words:
        return True
    if not tolerance or [len(line) for line in expected_words] != [len(line) for line in actual_words]:
        return False
    return all(
        _close(a, b, tolerance)
        for expected_line, actual_line in zip(expected_words, actual_words, strict=True)
        for a, b in zip(expected_line, actual_line, strict=True)
    )


def _close(expected: str, actual: str, tolerance: float) -> bool:
    if expected == actual:
        return True
    if not _DECIMAL.fullmatch(expected) or not _DECIMAL.fullmatch(actual):
        return False
    relative = tolerance if "." in expected or "e" in expected.lower() else 0.0
    return math.isclose(float(expected), float(actual), rel_tol=relative, abs_tol=tolerance)


def same(expected: Any, actual: Any) -> bool:
    """Equal in value and shape. A bool is not a number; if a float is expected, a relative error of 10^-9 is fine."""
    if isinstance(expected, bool) or isinstance(actual, bool) or expected is None or actual is None:
        return expected is actual
    if isinstance(expected, float):
        try:
            return isinstance(actual, int | float) and math.isclose(expected, actual, rel_tol=1e-9, abs_tol=1e-12)
        except OverflowError:  # an integer beyond the largest float
            return False
    if isinstance(expected, list | tuple):
        return isinstance(actual, list) and len(expected) == len(actual) and all(map(same, expected, actual))
    if isinstance(expected, dict):
        return (
            isinstance(actual, dict)
            and expected.keys() == actual.keys()
            and all(same(expected[k], actual[k]) for k in actual)
        )
    return isinstance(actual, str) == isinstance(expected, str) and expected == actual


def level() -> str:
    """The strongest level that works on this machine, found by a trial of each; "none" always works."""
    return next(name for name in LEVELS if not trial(name))


def resolve_level(isolation: str | None = None) -> str:
    """The named level, else `level()`. UserError if that is "none" and FORCE is not set."""
    if isolation is not None:
        if isolation not in LEVELS:
            raise UserError(f"the sandbox has no level {isolation!r}; known: {', '.join(LEVELS)}")
        return isolation
    if not _possible():
        raise UserError(f"code is not run here, because {ELSEWHERE}")
    if level() == "none" and os.environ.get(FORCE) != "1":
        raise UserError(
            f"code is not run here, because nothing would stop it from reading and deleting your files: {advice()}; or "
            f"set {FORCE}=1 to run it with your own rights"
        )
    return level()


def _possible() -> bool:
    """Whether a level may work at all. Every level watches processes by pidfd."""
    return is_linux() and hasattr(os, "pidfd_open")


@cache
def trial(name: str) -> str:
    """Why a level does not work here, found by running a program at that level; "" if it does."""
    if name == "none":
        return ""
    if not _possible():
        return "needs Linux from 5.3 on, and a Python that was built there"
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "not installed"
    try:
        # a module that is not loaded yet: if Python itself is under /tmp, a program finds none
        program = f"import colorsys, os\nprint(os.path.exists({__file__!r}), os.getuid())"
        result = run(program, isolation=name, seconds=10)
    except SandboxError as error:
        return str(error)
    works = (result.status, result.stdout) == (OK, "False 65534\n")
    return "" if works else f"a trial gave {result.status}: {(result.stderr or result.stdout)[-200:]}"


def advice() -> str:
    """How to get a better level, in words."""
    if not _possible():
        return ELSEWHERE
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
    return _ERRORS.get(error, ERROR) if isinstance(error, str) else ERROR, _excerpt(line)


def _reply(line: bytes) -> dict[str, Any]:
    """A line of JSON that may be anything at all; {} if it is not an object."""
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


def _bounds(seconds: float, memory_mb: int, output_kb: int, per_test: bool = False) -> Bounds:
    if not 0 < seconds <= 60 or not 64 <= memory_mb <= 4096 or not 1 <= output_kb <= 4096:
        raise UserError(
            f"the sandbox takes up to 60 seconds, 64 to 4096 MB of memory and 1 to 4096 KB of output, not "
            f"{seconds} s, {memory_mb} MB and {output_kb} KB"
        )
    return Bounds(seconds, memory_mb, output_kb << 10, max(TOTAL_SECONDS, 10 * seconds) if per_test else seconds)
