"""Runs the program, in a process without any rights left.

The trusted side sends `run LENGTH` or `call NAME LENGTH` on a line, then that many bytes of source. `run`
executes a script: its exit status and output are the result. `call` answers every line of arguments (a Python literal,
or "json " and a list, from the trusted side) with one line of JSON: {"value": ...} or {"error": name, "text": ...}.
Whatever the program does to this process, it can only send lines; the trusted side, which knows the expected values,
judges them.

In mode `each` the trusted side sends the length of the source, the source, and then for every test the length of its
input and the input. Process 1 runs each test in a fork of itself that has given up its rights, and passes on what it
writes. The fork sees an interpreter in which no program has run, the input as a file, pipes of its own, and no file
system that it could write to. When it ends, every process that it left behind is ended too, and only then is {"status":
...} sent. So a test finds no memory, file, pipe or process of the one before, and the output is that of one test.

In mode `warm` process 1 serves one program after another and reads nothing of any: a message over its socket says the
mode, once or each, and the bounds, and carries five pipes of the program's own. A fork of process 1, in which no
program has been read, is process 1 of a pid namespace of its own and does the rest. At the trusted side's word, or when
that fork has ended, process 1 ends that namespace, unmounts the scratch folder, and answers `ended STATUS`. So a
program finds nothing of the one before.
"""

import atexit
import builtins
import gc
import io
import os
import select
import struct
import sys
from _json import encode_basestring_ascii  # not `json`: importing it takes half as long as starting the interpreter
from contextlib import suppress

import confine

TEXT_LIMIT = 300
CHUNK = 1 << 16
IMPORTED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
"""Modules that LiveCodeBench's grader, like those of APPS and TACO, imports before a solution, with all their names. Of
two equal names the later one counts, then those of `builtins` and `typing`, then the modules themselves."""
RECURSION = 50_000
"""The limit that LiveCodeBench's grader sets."""
GRACE = 500
"""Milliseconds in which a program that has closed its pipe may end by itself."""
LOST_OUTPUT = 120
"""The interpreter's exit status if it cannot flush a standard stream."""

vars(builtins).update(exit=sys.exit, quit=sys.exit)  # defined by `site`, which the sandbox leaves out


def serve(ask: int, reply: int, names: dict[str, object]) -> None:
    questions = os.fdopen(ask, "rb")
    os.write(reply, b"ready\n")
    mode, *name, length = questions.readline().decode().split()
    source = questions.read(int(length)).decode()
    sys.argv = ["program"]
    if mode == "run":
        _run(source, reply, _space(names))
    else:
        _call(source, name[0], names, questions, reply)


def serve_each(ask: int, reply: int, bounds: list[int], isolated: bool, names: dict[str, object]) -> None:
    """Never returns."""
    gc.collect()
    gc.freeze()  # a test's own collections then pass over what it did not make
    # A fork closes it by number; Python 3.13 would complain about that on the program's own error output.
    questions = os.fdopen(ask, "rb", closefd=False)
    os.write(reply, b"ready\n")
    source = questions.read(int(questions.readline())).decode()
    for length in questions:
        given = os.memfd_create("input", 0)
        _write(given, questions.read(int(length)))
        os.lseek(given, 0, os.SEEK_SET)
        (out, stdout), (err, stderr), parent = os.pipe(), os.pipe(), os.getpid()
        pid = os.fork()
        if not pid:
            for fd, standard in ((given, 0), (stdout, 1), (stderr, 2)):
                os.dup2(fd, standard)
            os.closerange(3, 1024)
            confine.limit(*bounds, parent=parent, isolated=isolated)
            sys.argv = ["program"]
            _run_to_the_end(source, names)
        for fd in (given, stdout, stderr):
            os.close(fd)
        status = _relay(pid, {out: 1, err: 2}, isolated)
        _send(reply, f'{{"status": {status}}}')
    os._exit(0)


def serve_warm(control: int, reply: int, names: dict[str, object]) -> None:
    """Never returns, in any process."""
    import _socket  # only here: each import makes the start longer

    gc.collect()
    gc.freeze()
    channel = _socket.socket(fileno=control)
    os.write(reply, b"ready\n")
    while True:
        message, extra, _, _ = channel.recvmsg(1024, 1024)
        if not message:
            os._exit(0)
        mode, *numbers = message.decode().split()
        bounds = [int(number) for number in numbers]
        fds = struct.unpack("=5i", extra[0][2])
        if bounds[2]:
            confine.mount_scratch(bounds[2])
        pid = confine.fork_namespace()
        if not pid:
            _serve_one(mode, fds, bounds, names)
        for fd in fds:
            os.close(fd)
        status = _until_end(channel, pid)
        if bounds[2]:
            confine.unmount_scratch()
        os.write(reply, b"ended %d\n" % status)


def _serve_one(mode: str, fds: tuple[int, ...], bounds: list[int], names: dict[str, object]) -> None:
    """The fork for one program."""
    os.setsid()  # a signal to the program's process group would reach process 1 and the launcher, if the user is theirs
    ask, reply, *standard = fds
    for target, fd in enumerate(standard):
        os.dup2(fd, target)
    low, high = sorted((ask, reply))
    for first, end in ((3, low), (low + 1, high), (high + 1, 1024)):
        os.closerange(first, end)
    os.chdir("/tmp")
    if mode == "each":
        serve_each(ask, reply, bounds, True, names)
    confine.fork_program((ask, reply))
    confine.limit(*bounds, parent=1, isolated=True)
    serve(ask, reply, names)
    os._exit(0)


def _until_end(channel, pid: int) -> int:
    """Wait for the program to end or for the trusted side to say so; return its exit status."""
    ended, poll = os.pidfd_open(pid), select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(channel.fileno(), select.POLLIN)
    ready = {fd for fd, _ in poll.poll()}
    heard = channel.fileno() in ready and channel.recv(16)
    if heard == b"wait":  # it has closed its pipe and is about to end
        poll.unregister(channel.fileno())
        poll.poll(GRACE)
    status = confine.end_namespace(pid)
    os.close(ended)
    if not heard and not channel.recv(16):
        os._exit(0)
    return status


def _relay(pid: int, pipes: dict[int, int], isolated: bool) -> int:
    """Pass on what the program writes to its pipes until it ends, then end what it left; return its exit status."""
    ended, poll = os.pidfd_open(pid), select.poll()
    for fd in (ended, *pipes):
        poll.register(fd, select.POLLIN)
    ready = {-1}
    while ended not in ready:
        ready = {fd for fd, _ in poll.poll()}
        for fd in ready & pipes.keys():
            data = os.read(fd, CHUNK)
            if not data:
                poll.unregister(fd)
            _write(pipes[fd], data)
    status = confine.end_program(pid, isolated)
    for fd, target in pipes.items():
        while data := os.read(fd, CHUNK):  # nobody is left who could write more
            _write(target, data)
        os.close(fd)
    os.close(ended)
    return status


def names_of(imports: bool) -> dict[str, object]:
    """What a program may name without importing it: the builtins, and with `imports` what IMPORTED has."""
    if not imports:
        return vars(builtins)
    sys.setrecursionlimit(RECURSION)
    names: dict[str, object] = {}
    for module in (*IMPORTED.split(), "builtins", "typing"):
        exec(f"from {module} import *", names)
    modules = {module: sys.modules[module] for module in IMPORTED.split()}
    return vars(builtins) | names | modules


def _space(names: dict[str, object]) -> dict[str, object]:
    return {"__name__": "__main__", "__builtins__": names}


def _run(source: str, reply: int, space: dict[str, object]) -> None:
    try:
        exec(compile(source, "<program>", "exec"), space)
    except Exception as error:
        if reply >= 0:
            _send(reply, _error(error))
        trace = error.__traceback__  # begins with this frame, which the program's own report leaves out
        sys.excepthook(type(error), error.with_traceback(trace and trace.tb_next), None)
        sys.exit(1)


def _run_to_the_end(source: str, names: dict[str, object]) -> None:
    """Run the program and exit as the interpreter does: wait for its threads, call its exit functions, flush its
    streams, let go of its variables and collect its objects. Only modules are not torn down, which takes longer than
    most tests."""
    status, space = 0, _space(names)
    try:
        _run(source, -1, space)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = 0 if end.code is None else end.code & 0xFF if isinstance(end.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    if "threading" in sys.modules:
        with suppress(BaseException):
            sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    flushed = _flush()
    for private in (True, False):  # the interpreter's order
        for name in list(space):
            if name != "__builtins__" and (not private or (name[:1] == "_" and name[1:2] != "_")):
                space[name] = None
    for one in gc.get_objects():  # in a cycle the file may be closed before the text above it is written
        if type(one) is io.TextIOWrapper:
            with suppress(BaseException):
                one.flush()
    del one  # it would keep its cycle
    gc.collect()
    os._exit(status if _flush() and flushed else LOST_OUTPUT)


def _flush() -> bool:
    """Flush the standard streams, whatever they are by now; False if that fails."""
    flushed = True
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException:
            flushed = False
    return flushed


def _call(source: str, name: str, names: dict[str, object], questions, reply: int) -> None:
    module = sys.modules["program"] = type(sys)("program")  # where dataclasses look up what a string annotation names
    space = module.__dict__
    space["__builtins__"] = names
    try:
        exec(compile(source, "<program>", "exec"), space)
    except BaseException as error:
        _send(reply, _error(error))
        os._exit(1)
    solution = space.get("Solution")
    if name not in space and isinstance(solution, type):  # the form that LeetCode asks for
        space[name] = getattr(solution(), name, None)
    _send(reply, '{"value": true}' if callable(space.get(name)) else '{"error": "no-function", "text": ""}')
    for line in questions:
        try:
            # Looked up for every call, as the program may rebind it; what cannot be called is an error like any other.
            answer = '{"value": ' + encode(space[name](*_arguments(line)), 0) + "}"
        except BaseException as error:
            answer = _error(error)
        _send(reply, answer)
    os._exit(0)


def _arguments(line: bytes) -> tuple[object, ...]:
    if not line.startswith(b"json "):
        return tuple(eval(line))
    import json  # late, and only for a long line

    return tuple(json.loads(line[5:]))


def _send(reply: int, text: str) -> None:
    _write(reply, text.encode() + b"\n")


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _error(error: BaseException) -> str:
    name = "SyntaxError" if isinstance(error, SyntaxError) else type(error).__name__
    try:
        text = str(error)[:TEXT_LIMIT]
    except BaseException:  # a __str__ of the program's own
        text = ""
    return f'{{"error": {encode_basestring_ascii(name)}, "text": {encode_basestring_ascii(text)}}}'


def encode(value: object, depth: int) -> str:
    """JSON of comparable values: None, bool, int, float, str, lists and tuples alike, dicts whose keys are str, or int,
    which become str as in JSON."""
    if depth > 50:
        raise ValueError("the answer is nested too deeply")
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join([encode(one, depth + 1) for one in value]) + "]"
    if isinstance(value, dict) and all(isinstance(key, str) or type(key) is int for key in value):
        return "{" + ", ".join([f"{encode(str(key), 0)}: {encode(one, depth + 1)}" for key, one in value.items()]) + "}"
    raise TypeError(f"an answer of type {type(value).__name__} cannot be compared")
