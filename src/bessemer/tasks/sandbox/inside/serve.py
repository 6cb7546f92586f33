"""Running the program, in a process without any rights left.

The trusted side sends `run LENGTH` or `call NAME LENGTH` on a line, then that many bytes of source. `run` executes a
script: its exit status and output are the result. `call` answers every line of arguments (a Python literal, from the
trusted side) with one line of JSON: {"value": ...} or {"error": name, "text": ...}. Whatever the program does to this
process, it can only send lines; the trusted side, which knows the expected values, judges them.
"""

import os
import sys
from _json import encode_basestring_ascii  # not `json`: importing it takes half as long as starting the interpreter

TEXT_LIMIT = 300


def serve(ask: int, reply: int) -> None:
    questions = os.fdopen(ask, "rb")
    os.write(reply, b"ready\n")
    mode, *name, length = questions.readline().decode().split()
    source = questions.read(int(length)).decode()
    sys.argv = ["program"]
    if mode == "run":
        _run(source, reply)
    else:
        _call(source, name[0], questions, reply)


def _run(source: str, reply: int) -> None:
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except Exception as error:
        _send(reply, _error(error))
        trace = error.__traceback__  # begins with this frame, which the program's own report leaves out
        sys.excepthook(type(error), error.with_traceback(trace and trace.tb_next), None)
        sys.exit(1)


def _call(source: str, name: str, questions, reply: int) -> None:
    space = {"__name__": "program", "__builtins__": __builtins__}
    try:
        exec(compile(source, "<program>", "exec"), space)
    except BaseException as error:
        _send(reply, _error(error))
        os._exit(1)
    _send(reply, '{"value": true}' if callable(space.get(name)) else '{"error": "no-function", "text": ""}')
    for line in questions:
        try:
            # Looked up for every call, as the program may bind it again; what cannot be called is an error like others.
            answer = '{"value": ' + encode(space[name](*eval(line)), 0) + "}"  # type: ignore[operator]
        except BaseException as error:
            answer = _error(error)
        _send(reply, answer)
    os._exit(0)


def _send(reply: int, text: str) -> None:
    data = memoryview(text.encode() + b"\n")
    while data:
        data = data[os.write(reply, data) :]


def _error(error: BaseException) -> str:
    name = "SyntaxError" if isinstance(error, SyntaxError) else type(error).__name__
    try:
        text = str(error)[:TEXT_LIMIT]
    except BaseException:  # a __str__ of the program's own
        text = ""
    return f'{{"error": {encode_basestring_ascii(name)}, "text": {encode_basestring_ascii(text)}}}'


def encode(value: object, depth: int) -> str:
    """JSON of comparable values: None, bool, int, float, str, lists and tuples alike, dicts with str keys."""
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
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return "{" + ", ".join([f"{encode(key, 0)}: {encode(one, depth + 1)}" for key, one in value.items()]) + "}"
    raise TypeError(f"an answer of type {type(value).__name__} cannot be compared")
