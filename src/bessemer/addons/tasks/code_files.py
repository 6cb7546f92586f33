"""`code:PATH`: functions and contest programs to write, from a JSONL file; all tests must pass (R1 2.2.2).

A line has a statement (any of STATEMENTS), tests (any of TESTS, taken together) and optionally the name of a function.
With a name (`entry_point`, or `fn_name` or `func_name` as data sets have it), the answer is that function, or a class
Solution with that method; without, it is a Python program from standard input to standard output. Tests are a list of
{"input": ..., "output": ...}, or {"inputs": [...], "outputs": [...]}, or either as a string of JSON. So the lines of
APPS, TACO, CodeContests, LiveCodeBench and Codeforces collections can be read unchanged. Optional fields are
`time_limit` (seconds of one test), `memory_limit` (MB), `tolerance` (of decimal numbers in the output), `starter_code`,
`id`, `language` and `difficulty`.

LiveCodeBench hides its private tests in a compressed pickle of one string. The string is extracted without unpickling.
"""

import base64
import json
import math
import pickletools
import re
import zlib
from functools import lru_cache
from keyword import iskeyword
from typing import Any

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.code import SandboxedTask
from bessemer.addons.tasks.files import QUESTIONS, FileTask, LineIndex, Question, language_of
from bessemer.tasks.base import Problem

STATEMENTS = (*QUESTIONS, "description", "question_content")
TESTS = (
    "tests", "input_output", "public_test_cases", "private_test_cases", "official_tests", "public_tests",
    "private_tests", "generated_tests",
)  # fmt: skip
SECONDS, MEMORY_MB = 6.0, 256
"""Limits if a line states none: LiveCodeBench's time, Codeforces' usual memory."""
MAX_UNPACKED = 1 << 28
_SECTIONS = {"input_format": "Input", "output_format": "Output", "note": "Note"}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|milliseconds?|s|seconds?|MB|megabytes?)?\s*")
_ASK = {
    "en": "Write a Python 3 program that reads standard input and writes standard output.",
    "zh": "请写一个Python 3程序，从标准输入读取数据，向标准输出写出结果。",
}


class CodeFile(SandboxedTask, FileTask):
    family = "code"
    form = (
        '{"prompt": "...", "tests": [{"input": "3 4\\n", "output": "7\\n"}]}, or for a function '
        '{"prompt": "...", "entry_point": "f", "tests": [{"input": [3, 4], "output": 7}]}'
    )

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        question = cls.text(record, where, STATEMENTS)
        if record.get("checker") or record.get("generated_checker"):
            raise cls.wrong(where, "this problem needs its own checker, which is not run; leave it out", record)
        try:
            function, tests = tests_of(record)
            seconds, memory_mb, tolerance = limits_of(record)
        except (ValueError, RecursionError) as error:
            raise cls.wrong(where, str(error), record) from error
        difficulty = record.get("difficulty", 1)
        meta = {
            "function": function,
            "tests": len(tests),
            "seconds": seconds,
            "memory_mb": memory_mb,
            "tolerance": tolerance,
            "difficulty": difficulty if isinstance(difficulty, int) else 1,
        }
        return Question(question, meta, _prompt(record, question, function))

    def judge(self, problem: Problem, source: str) -> str:
        file = self.files[problem.meta["split"]]
        return _judged(file, file.row(problem.meta["line"]), source)


@lru_cache(maxsize=4096)  # the samples of a group often give the same answer
def _judged(file: LineIndex, row: int, source: str) -> str:
    return reason_of(source, *_needed(file, row))


def reason_of(source: str, function: str | None, tests: list[tuple[Any, Any]], limits: tuple[float, int, float]) -> str:
    """The reason code of a program, or of a function, after all tests."""
    seconds, memory_mb, tolerance = limits
    common: dict[str, Any] = {"seconds": seconds, "memory_mb": memory_mb, "imports": True}
    if function is None:
        return sandbox.judge_program(source, tests, tolerance=tolerance, **common).reason
    return sandbox.judge(source, function, tests, per_test=True, **common).reason


@lru_cache(maxsize=4)  # a group of samples is judged one after the other; tests may be many megabytes
def _needed(file: LineIndex, row: int) -> tuple[str | None, list[tuple[Any, Any]], tuple[float, int, float]]:
    record = file.record(row)
    return *tests_of(record), limits_of(record)


def tests_of(record: dict[str, Any]) -> tuple[str | None, list[tuple[Any, Any]]]:
    """The name of the function, None for a program, and (arguments or input, expected) of every test.

    ValueError says what is wrong with them.
    """
    metadata = _unpacked(record["metadata"]) if isinstance(record.get("metadata"), str) else record.get("metadata")
    name = record.get("entry_point") or (metadata.get("func_name") if isinstance(metadata, dict) else None)
    pairs: list[tuple[Any, Any]] = []
    for field in TESTS:
        value = _unpacked(record[field]) if isinstance(record.get(field), str) else record.get(field)
        if isinstance(value, dict):
            name = name or value.get("fn_name")
            value = _zipped(value, field)
        if not isinstance(value, list | None):
            raise ValueError(f"{field!r} is a {type(value).__name__}, not a list of tests")
        for number, test in enumerate(value or [], start=1):
            if not isinstance(test, dict) or "input" not in test or "output" not in test:
                raise ValueError(f"test {number} of {field!r} needs 'input' and 'output'")
            pairs.append((test["input"], test["output"]))
    if not pairs:
        raise ValueError(f"no tests under any of {', '.join(map(repr, TESTS))}")
    if not name:
        return None, [_texts(number, *pair) for number, pair in enumerate(pairs, start=1)]
    if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
        raise ValueError(f"{name!r} is not a valid function name")
    return name, _calls(pairs, "entry_point" not in record)


def limits_of(record: dict[str, Any]) -> tuple[float, int, float]:
    """Seconds of one test, MB, and tolerance of decimal numbers. ValueError for a limit that cannot be read."""
    time = record.get("time_limit")
    if isinstance(time, dict):  # CodeContests
        time = _quantity(time.get("seconds", 0), "time_limit") + _quantity(time.get("nanos", 0), "time_limit") / 1e9
    seconds = SECONDS if time is None else _quantity(time, "time_limit")
    memory = record.get("memory_limit")
    if memory is None and record.get("memory_limit_bytes"):
        memory = _quantity(record["memory_limit_bytes"], "memory_limit_bytes") / 2**20
    memory_mb = MEMORY_MB if memory is None else _quantity(memory, "memory_limit")
    tolerance = record.get("tolerance") or 0.0
    if not 0 < seconds <= 60:
        raise ValueError(f"the time limit is {seconds} seconds; it must be above 0 and at most 60")
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance <= 0.1:
        raise ValueError(f"the tolerance is {tolerance!r}; it must be a number of at most 0.1")
    return seconds, min(max(int(memory_mb), 64), 4096), tolerance  # an interpreter does not start in less than 64


def _quantity(value: Any, field: str) -> float:
    match = _QUANTITY.fullmatch(str(value)) if isinstance(value, str | int | float) else None
    if match is None:
        raise ValueError(f"{field!r} is {value!r}, not a number of seconds or MB")
    return float(match[1]) / (1000 if match[2] and match[2].startswith("m") and "b" not in match[2] else 1)


def _zipped(value: dict[str, Any], field: str) -> list[dict[str, Any]]:
    inputs, outputs = (value.get(f"{name}s", value.get(name)) for name in ("input", "output"))
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError(f"{field!r} needs the lists 'inputs' and 'outputs'")
    if len(inputs) != len(outputs):
        raise ValueError(f"{field!r} has {len(inputs)} inputs and {len(outputs)} outputs")
    return [{"input": stdin, "output": expected} for stdin, expected in zip(inputs, outputs, strict=True)]


def _texts(number: int, value: Any, expected: Any) -> tuple[str, str]:
    """The input and output of a program; APPS writes some as lists of lines."""
    texts = ["\n".join(map(str, part)) if isinstance(part, list) else part for part in (value, expected)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"test {number}: input and output of a program are text; a function needs 'entry_point'")
    if not texts[1].strip():
        raise ValueError(f"test {number} expects empty output, which a program that does nothing also gives; remove it")
    if len(texts[0]) > sandbox.INPUT_LIMIT:
        raise ValueError(f"the input of test {number} is longer than {sandbox.INPUT_LIMIT:,} characters; remove it")
    return texts[0], texts[1]


def _calls(pairs: list[tuple[Any, Any]], foreign: bool) -> list[tuple[Any, Any]]:
    """The arguments and value of every call. LiveCodeBench has JSON, an argument per line; APPS lists each output."""
    if foreign and all(isinstance(part, str) for pair in pairs for part in pair):
        pairs = [
            ([json.loads(line) for line in arguments.split("\n") if line.strip()], json.loads(value))
            for arguments, value in pairs
        ]
    elif foreign and all(isinstance(value, list) and len(value) == 1 for _, value in pairs):
        pairs = [(arguments, value[0]) for arguments, value in pairs]
    for number, (arguments, value) in enumerate(pairs, start=1):
        if not isinstance(arguments, list):
            raise ValueError(f"test {number}: the input of a function is the list of its arguments")
        if not _finite([arguments, value]):
            raise ValueError(f"test {number} holds a number that is not finite")
    return pairs


def _finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_finite, value.values() if isinstance(value, dict) else value))
    return math.isfinite(value) if isinstance(value, float) else True


def _unpacked(text: str) -> Any:
    """The value of a string of JSON, or of LiveCodeBench's base64 of zlib of a pickled string of JSON."""
    if text.lstrip()[:1] in ("[", "{"):
        return json.loads(text)
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED)
        strings = [
            part for code, part, _ in pickletools.genops(data) if isinstance(part, str) and "UNICODE" in code.name
        ]
    except (ValueError, zlib.error) as error:
        raise ValueError(f"tests that are neither JSON nor in LiveCodeBench's packing ({error})") from error
    if inflate.unconsumed_tail or len(strings) != 1:
        raise ValueError(f"packed tests of more than {MAX_UNPACKED >> 20} MB, or of more than one string")
    return json.loads(strings[0])


def _prompt(record: dict[str, Any], question: str, function: str | None) -> str:
    """The statement with the sections that a collection keeps separate, and the kind of answer that is asked for."""
    parts = [question]
    parts += [
        f"{title}:\n{record[name].strip()}" for name, title in _SECTIONS.items() if isinstance(record.get(name), str)
    ]
    examples = record["examples"] if isinstance(record.get("examples"), list) else []
    pairs = [(example.get("input"), example.get("output")) for example in examples if isinstance(example, dict)]
    parts += [f"Example:\n{stdin}\nOutput:\n{output}" for stdin, output in pairs]
    if isinstance(record.get("starter_code"), str) and record["starter_code"].strip():
        parts.append(f"```python\n{record['starter_code'].rstrip()}\n```")
    if function is None:
        parts.append(_ASK[language_of(question)])
    return "\n\n".join(part for part in parts if part)
