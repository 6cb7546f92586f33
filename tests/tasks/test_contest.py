"""Contest programs: judged by their output, tests isolated from each other, read from files of five collections."""
# ruff: noqa: E501

import base64
import json
import os
import pickle
import subprocess
import sys
import time
import zlib

import pytest

from bessemer.addons.tasks import code_files, sandbox
from bessemer.addons.tasks.sandbox import judge_program, run, same_output
from bessemer.errors import UserError
from bessemer.tasks import get

from .hostile_contestants import CHANNELS, HOSTILE, RIGHT, passing
from .test_sandbox import alive, below, every, isolated

TESTS = [("3 4\n", "7\n"), ("10 20\n", "30\n"), ("1 1\n", "2\n")]


@every
@pytest.mark.parametrize(
    ("source", "reason", "passed"),
    [
        (RIGHT, "correct", 3),
        ("import os\na, b = os.read(0, os.fstat(0).st_size).split()\nprint(int(a) + int(b))", "correct", 3),
        ("import sys\nfor line in sys.stdin: sys.stdout.write(str(eval(line.replace(' ', '+'))) + '  \\n\\n')", "correct", 3),
        ("if __name__ == '__main__':\n    import threading\n    threading.Thread(target=lambda: " + RIGHT + ").start()", "correct", 3),
        ("print(7)", "wrong-output", 1),
        ("a, b = map(int, input().split())\nprint(a + b if a < 9 else 1 // 0)", "error", 1),
        ("a, b = map(int, input().split())\nwhile a > 9: pass\nprint(a + b)", "timeout", 1),
        ("print(7", "syntax-error", 0),
    ],
)  # fmt: skip
def test_verdicts(isolation, source, reason, passed):
    judgement = judge_program(source, TESTS, seconds=0.7 if reason == "timeout" else 5, isolation=isolation)
    assert (judgement.reason, judgement.passed) == (reason, passed)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_has_its_verdict(name):
    source, reason = HOSTILE[name]
    began, before = time.monotonic(), below(os.getpid())
    judgement = judge_program(source, TESTS, seconds=0.5 if reason == "timeout" else 10)
    assert judgement.reason == reason and judgement.passed < 2, judgement
    assert time.monotonic() - began < 15
    assert alive(below(os.getpid()) - before) == set()


@isolated
def test_nothing_passes_from_one_test_to_the_next(isolation):
    """A program that finds traces of the previous test prints their names, and so is wrong."""
    judgement = judge_program(passing(CHANNELS), TESTS, seconds=10, isolation=isolation)
    assert (judgement.reason, judgement.passed) == ("correct", 3), judgement


def test_leaks_between_programs_are_detected_within_one_process():
    """Within one process every channel's traces are found, so the test above looks in the right places."""
    apart = {"shared memory on disk", "the folder it is in", "the input", "a process", "a process of a process"}
    names = [name for name in CHANNELS if name not in apart]
    lines = run(passing(names) * 2, stdin="3 4\n", seconds=10).stdout.splitlines()
    assert lines == ["7", " ".join(names)]
    lines = run(passing(["a process"]) * 2, stdin="3 4\n", seconds=10).stdout.splitlines()
    assert lines[:2] == ["7", "a process"]


SCAN = """
import ctypes, gc
gc.unfreeze()
given = input()
tracked = gc.get_objects()
pages = {id(item) >> 12 for item in (*tracked, *gc.get_referents(*tracked), given)}
memory = b"".join(ctypes.string_at(page << 12, 1 << 12) for page in pages)
print(len(memory) > 1 << 20, given.encode() in memory, given[::-1].encode() in memory)
"""


@isolated
def test_expected_outputs_are_not_in_the_memory_of_the_program(isolation):
    """The heap pages that hold objects contain the input, but not the expected output."""
    judgement = judge_program(SCAN, [("a-word-nobody-has", "sah-ydobon-drow-a")], seconds=10, isolation=isolation)
    assert (judgement.reason, judgement.detail) == ("wrong-output", "True True False\n")


ENDINGS = {
    "exit functions": "import atexit\natexit.register(print, 'last')\nprint('first')",
    "an exit function that fails": "import atexit\natexit.register(lambda: 1 / 0)\nprint('first')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "a daemon": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(9), print(1)), daemon=True).start()",
    "a file that nobody closes": "out = open(1, 'w')\nout.write('7')",
    "such a file in a cycle": "class C: pass\nc = C(); c.me = c; c.out = open(1, 'w')\nc.out.write('7')",
    "such a file of a function": "out = open(1, 'w')\ndef f(): return out.write('7')\nf()",
    "a finaliser": "class C:\n    def __del__(self): print('gone')\nc = C()\nprint('here')",
    "a finaliser in a cycle": "class C:\n    def __del__(self): print('gone')\nc = C(); c.me = c\ndef f(): return c",
    "another standard output": "import io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb', 0), write_through=False)\nprint('7')",
    "a closed standard output": "import sys\nprint('7')\nsys.stdout.close()",
    "output that is lost": "import os\nprint('7')\nos.close(1)",
    "a number": "print('7')\nraise SystemExit(0)",
    "a high number": "print('7')\nraise SystemExit(256)",
    "True": "raise SystemExit(True)",
    "a text": "raise SystemExit('text')",
    "an interrupt": "raise KeyboardInterrupt",
    "a generator": "def g():\n    try: yield 1\n    finally: print('closed')\nh = g()\nnext(h)",
    "a pending exception": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    kept = e\n    out = open(1, 'w')\n    out.write('7')\nraise SystemExit",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDINGS)
def test_a_program_ends_as_the_interpreter_ends_it(name):
    """It leaves out the teardown of modules, which nobody can see."""
    there = subprocess.run([sys.executable, "-c", ENDINGS[name]], capture_output=True, text=True, env={})
    judgement = judge_program(ENDINGS[name], [("", there.stdout)], seconds=10, imports=True)
    assert judgement.reason == ("error" if there.returncode else "correct"), (there, judgement)


def test_much_input_and_much_output():
    numbers = " ".join(map(str, range(300_000)))
    judgement = judge_program("print(*input().split()[::-1])", [(numbers, " ".join(numbers.split()[::-1]))], seconds=20)
    assert judgement.reason == "correct"
    assert judge_program("print(7)", [(numbers, "7"), (numbers, "7")], seconds=20).passed == 2  # also if it is not read


def test_time_limit_is_per_test_and_bounded_in_total(monkeypatch):
    slow = "import time\ntime.sleep(0.4)\n" + RIGHT
    assert judge_program(slow, TESTS, seconds=1.1).reason == "correct"
    monkeypatch.setattr("bessemer.addons.tasks.sandbox.TOTAL_SECONDS", 0.0)
    assert judge_program("import time\ntime.sleep(0.4)\nprint(7)", TESTS[:1] * 99, seconds=0.2).reason == "timeout"
    judgement = judge_program("import time\ntime.sleep(0.2)\nprint(7)", TESTS[:1] * 99, seconds=0.5)
    assert judgement.reason == "timeout" and 5 < judgement.passed < 30


@pytest.mark.parametrize(
    ("expected", "actual", "tolerance", "equal"),
    [
        ("1 2\n3\n", "1  2 \r\n3", 0, True),
        ("1 2\n3\n", "1 2 3", 0, False),
        ("1\n2\n", "1\n\n2\n", 0, False),
        ("a", "A", 0, False),
        ("0.5", "0.50", 0, False),
        ("0.5", "0.50", 1e-9, True),
        ("1000000.5", "1000000.6", 1e-6, True),
        ("1000000007", "1000000008", 1e-6, False),
        ("5", "5.0000001", 1e-6, True),
        ("0.1 x", "0.1000001 x", 1e-6, True),
        ("0.1 x", "0.1000001 y", 1e-6, False),
        ("0.1", "nan", 0.1, False),
        ("1e9", "inf", 0.1, False),
        ("0.1", "0.1 0.1", 0.1, False),
        ("0.1", "1_0e-2", 0.1, False),
    ],
)
def test_outputs_are_compared(expected, actual, tolerance, equal):
    assert same_output(expected, actual, tolerance) is equal


# ---- from files

PLAIN = {"prompt": "Print the sum.", "tests": [{"input": stdin, "output": out} for stdin, out in TESTS]}
INPUTS, OUTPUTS = [list(column) for column in zip(*TESTS, strict=True)]
PUBLIC = json.dumps([{"input": "3 4\n", "output": "7\n", "testtype": "stdin"}])
PRIVATE = json.dumps([{"input": stdin, "output": out, "testtype": "stdin"} for stdin, out in TESTS[1:]])
PACKED = base64.b64encode(zlib.compress(pickle.dumps(PRIVATE))).decode()
LIVECODEBENCH = {
    "question_content": "Print the sum.",
    "question_id": "1873_A",
    "public_test_cases": PUBLIC,
    "starter_code": "",
}
PROGRAMS = {
    "plain": PLAIN,
    "lists": {"statement": "Print the sum.", "tests": {"inputs": INPUTS, "outputs": OUTPUTS}},
    "APPS": {"question": "Print the sum.", "input_output": json.dumps({"inputs": INPUTS, "outputs": OUTPUTS}), "starter_code": ""},
    "TACO": {"question": "Print the sum.", "input_output": json.dumps({"inputs": [[i[:-1], ""] for i in INPUTS], "outputs": [[o[:-1]] for o in OUTPUTS]}), "time_limit": "2.0 seconds", "memory_limit": "256.0 megabytes"},
    "LiveCodeBench": LIVECODEBENCH | {"private_test_cases": PRIVATE, "metadata": "{}"},
    "LiveCodeBench, packed": LIVECODEBENCH | {"private_test_cases": PACKED, "metadata": "{}"},
    "CodeContests": {"description": "Print the sum.", "public_tests": {"input": INPUTS[:1], "output": OUTPUTS[:1]}, "private_tests": {"input": INPUTS[1:], "output": OUTPUTS[1:]}, "generated_tests": {"input": [], "output": []}, "time_limit": {"seconds": 2, "nanos": 500_000_000}, "memory_limit_bytes": 256_000_000},
    "Codeforces": {"description": "Print the sum.", "input_format": "Two numbers.", "output_format": "One.", "examples": [{"input": "3 4", "output": "7"}], "official_tests": PLAIN["tests"], "time_limit": 2.0, "memory_limit": 256.0, "generated_checker": None},
}  # fmt: skip
FUNCTIONS = {
    "plain": ({"prompt": "add", "entry_point": "add", "tests": [{"input": [3, 4], "output": 7}]}, [([3, 4], 7)]),
    "APPS": ({"question": "add", "input_output": {"fn_name": "add", "inputs": [[3, 4]], "outputs": [[7]]}}, [([3, 4], 7)]),
    "LiveCodeBench": ({"question_content": "add", "public_test_cases": json.dumps([{"input": "[3]\n4", "output": "7"}]), "metadata": '{"func_name": "add"}'}, [([[3], 4], 7)]),
    "LiveCodeBench, U+2028": ({"question_content": "add", "public_test_cases": json.dumps([{"input": '"\u2028"\n4', "output": "7"}]), "metadata": '{"func_name": "add"}'}, [(["\u2028", 4], 7)]),
}  # fmt: skip


def file_of(tmp_path, *rows):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return get(f"code:{tmp_path}")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_every_collection(tmp_path, name):
    task = file_of(tmp_path, PROGRAMS[name])
    problem = task.problem("train", 0)
    assert problem.prompt.startswith("Print the sum.") and problem.prompt.endswith("writes standard output.")
    assert problem.meta["tests"] == 3 and problem.meta["function"] is None
    assert "7" not in json.dumps(problem.meta)  # the expected output is not part of the problem
    assert task.grade(problem, f"```python\n{RIGHT}\n```") == ("correct", RIGHT)
    assert task.grade(problem, "print(7)")[0] == "wrong-output"
    if name == "CodeContests":
        assert (problem.meta["seconds"], problem.meta["memory_mb"]) == (2.5, 244)
    if name == "Codeforces":
        assert "Input:\nTwo numbers." in problem.prompt and "Example:\n3 4\nOutput:\n7" in problem.prompt


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_every_collection(tmp_path, name):
    row, tests = FUNCTIONS[name]
    assert code_files.tests_of(row) == ("add", tests)
    task = file_of(tmp_path, row)
    body = "(self, a, b): return (sum(a) if a == [3] else 3 if isinstance(a, str) else a) + b"
    assert task.grade(task.problem("train", 0), f"class Solution:\n    def add{body}")[0] == "correct"
    assert task.grade(task.problem("train", 0), "class Solution:\n    pass")[0] == "no-function"


def test_names_that_graders_import_need_no_import_and_recursion_is_deep(tmp_path):
    """An answer may repeat a line's starter code, whose annotations name what it does not import; a method may be called
    like an imported function, and a program's own names come first."""
    add = FUNCTIONS["LiveCodeBench"][0]
    task = file_of(tmp_path, add | {"starter_code": "class Solution:\n    def add(self, a: List[int], b: int) -> int:"})
    problem = task.problem("train", 0)
    assert problem.prompt.endswith("def add(self, a: List[int], b: int) -> int:\n```")
    body = "(self, a: List[int], b: int) -> int:\n        return reduce(operator.add, a, b)"
    assert task.grade(problem, f"class Solution:\n    def add{body}")[0] == "correct"
    deep = "def add(a, b):\n    def down(n):\n        return n and 1 + down(n - 1)\n    return down(20_000) - 19_993"
    assert task.grade(problem, deep)[0] == "correct"
    (tmp_path / "programs").mkdir()
    task = file_of(tmp_path / "programs", PROGRAMS["LiveCodeBench"])
    for program in (
        "print(sum(map(int, sys.stdin.read().split())))",
        "print(int(math.fsum(map(int, chain(input().split())))))",
        "add = lambda text: eval(text.replace(' ', '+'))\nprint(add(input()))\nexit()\nprint(0)",
        "print(sum(map(int, input().split())))\nquit()",
    ):
        assert task.grade(task.problem("train", 0), program)[0] == "correct", program
    assert sandbox.judge("def f(n): return gcd(n, 4)", "f", [([6], 2)]).reason == "error"  # other tasks: Python alone


def test_a_pickle_is_read_and_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    packed = base64.b64encode(zlib.compress(pickle.dumps([Evil(), PRIVATE]))).decode()
    with pytest.raises(UserError, match="line 1: packed tests"):
        file_of(tmp_path, LIVECODEBENCH | {"private_test_cases": packed})
    assert not (tmp_path / "run").exists()


def row_with(stdin="1", output="2"):
    return {"prompt": "p", "tests": [{"input": stdin, "output": output}]}


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": "p", "tests": {"inputs": ["1", "2"], "outputs": ["1"]}}, "'tests' has 2 inputs and 1 outputs"),
        ({"prompt": "p", "tests": {"inputs": ["1"]}}, "needs the lists 'inputs' and 'outputs'"),
        ({"prompt": "p", "tests": []}, "no tests under any of"),
        ({"prompt": "p", "tests": 5}, "'tests' is a int"),
        ({"prompt": "p", "tests": "nothing"}, "neither JSON nor in LiveCodeBench's packing"),
        ({"prompt": "p", "tests": [5]}, "test 1 of 'tests' needs 'input' and 'output'"),
        (row_with(output="  \n"), "test 1 expects empty output"),
        (row_with([1, 2], 3), "a function needs 'entry_point'"),
        (row_with() | {"time_limit": "long"}, "'time_limit' is 'long'"),
        (row_with() | {"time_limit": 600}, "time limit is 600.0 seconds"),
        (row_with() | {"time_limit": {"seconds": None}}, "'time_limit' is None"),
        (row_with() | {"memory_limit": [256]}, "'memory_limit' is"),
        (row_with() | {"tolerance": 2}, "tolerance is 2"),
        (row_with() | {"checker": "int main"}, "needs its own checker"),
        ({"question": "q", "choices": ["a", "b"], "answer": "A"}, "the field 'choices' belongs to choice:PATH"),
    ],
)
def test_a_broken_line_is_named(tmp_path, row, hint):
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: .*" + hint) as error:
        file_of(tmp_path, row)
    assert f"Its fields are {', '.join(map(repr, row))}; a line of code:PATH is" in str(error.value)
