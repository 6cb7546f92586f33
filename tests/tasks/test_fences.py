"""Programs in Markdown as models write it: which block is the answer, for functions and for programs, end to end."""

import json

import pytest

from bessemer.addons.tasks.fences import blocks, flush_left, last_program
from bessemer.tasks import get

ADD = "a, b = map(int, input().split())\nprint(a + b)"
BAD = "a, b = map(int, input().split())\nprint(a - b)"
DOUBLE = "def double(n):\n    return 2 * n"
TRIPLE = "def double(n):\n    return 3 * n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    by_name = {}
    lines = {
        "program": {"prompt": "Add two numbers.", "tests": [{"input": "3 4\n", "output": "7\n"}]},
        "function": {"prompt": "Double n.", "entry_point": "double", "tests": [{"input": [4], "output": 8}]},
    }
    for name, line in lines.items():
        path = tmp_path_factory.mktemp("code") / f"{name}.jsonl"
        path.write_text(json.dumps(line) + "\n")
        task = get(f"code:{path}@test")
        by_name[name] = task, task.problem("test", 0)
    return by_name


def fenced(source, language="python", fence="```", indent=""):
    body = "\n".join(indent + line for line in source.split("\n"))
    return f"{indent}{fence}{language}\n{body}\n{indent}{fence}"


@pytest.mark.parametrize(
    ("kind", "summary", "correct"),
    [
        ("program", fenced(ADD), True),
        ("program", fenced(ADD) + "\n\nFor\n\n" + fenced("3 4", "") + "\n\nit prints\n\n" + fenced("7", ""), True),
        ("program", fenced(ADD) + "\n\nIt prints:\n\n" + fenced("7", "text"), True),
        ("program", fenced(ADD, "") + "\n\nIt prints:\n\n" + fenced("7", ""), True),
        ("program", fenced(ADD) + "\n\nRun it:\n\n" + fenced("echo 3 4 | python add.py", ""), True),
        ("program", fenced(ADD) + "\n\nInput and output:\n\n" + fenced("3 4\n7"), True),
        ("program", fenced(ADD, fence="~~~"), True),
        ("program", fenced(ADD, "", "~~~") + "\n\nIt prints:\n\n" + fenced("7", "", "~~~"), True),
        ("program", fenced(ADD, fence="````"), True),
        ("program", fenced(ADD, "python title=add.py"), True),
        ("program", "1. Read, add and print:\n\n" + fenced(ADD, indent="   ") + "\n\n2. Done.", True),
        ("program", "- The program:\n\n" + fenced(ADD, fence="~~~", indent="    "), True),
        ("program", "- ```python\n" + "\n".join(f"  {line}" for line in ADD.split("\n")) + "\n  ```", True),
        ("program", "So: ```python\n" + ADD + "```", True),
        ("program", "A first idea:\n\n" + fenced(BAD) + "\n\nThat is wrong. Instead:\n\n" + fenced(ADD), True),
        ("program", fenced(ADD) + "\n\nOr:\n\n" + fenced(BAD), False),
        ("program", fenced(BAD) + "\n\nIt prints:\n\n" + fenced("7", ""), False),
        ("program", fenced("7", "") + "\n\nis what\n\n" + fenced(BAD) + "\n\nprints.", False),
        ("program", fenced("7", ""), False),
        ("program", fenced(ADD) + "\n\nFor\n\n```python\n3 4", False),  # a block is left open
        ("function", fenced(DOUBLE), True),
        ("function", fenced(DOUBLE) + "\n\nUsage:\n\n" + fenced("print(double(4))  # 8"), True),
        ("function", fenced(DOUBLE) + "\n\n" + fenced("from solution import double\nprint(double(4))"), True),
        ("function", fenced("gcd = 1") + "\n\n" + fenced("from math import gcd\n" + DOUBLE + "\nprint(gcd(4, 6))"),
         True),
        ("function", fenced(DOUBLE) + "\n\nTests:\n\n" + fenced("def test():\n    assert double(4) == 8\n\ntest()"),
         True),
        ("function", fenced(DOUBLE) + "\n\nUsage:\n\n" + fenced(">>> double(4)\n8", "pycon"), True),
        ("function", fenced(f'{DOUBLE}\n\n"""Example:\n    ```\n    double(4)\n    ```\n"""'), True),
        ("function", fenced(TRIPLE) + "\n\nCorrected:\n\n" + fenced(DOUBLE), True),
        ("function", fenced(DOUBLE) + "\n\nFaster:\n\n" + fenced(TRIPLE), False),
        ("function", fenced(TRIPLE) + "\n\nUsage:\n\n" + fenced("print(double(4))"), False),
        ("function", fenced("def helper(n):\n    return n") + "\n\n" + fenced(f"def helper(n): ...\n\n{DOUBLE}"), True),
        ("function", fenced("def gcd(a, b): ...") + "\n\n" + fenced(f"from math import gcd\n\ngcd(1, 2)\n{DOUBLE}"),
         True),
        ("function", "<answer>\n" + fenced(DOUBLE) + "\nUsage:\n" + fenced("double(4)") + "\n</answer>", True),
        ("function", "<answer>\n    def double(n):\n        return 2 * n\n</answer>", True),
    ],
)  # fmt: skip
def test_the_answer_is_the_last_whole_program(tasks, kind, summary, correct):
    task, problem = tasks[kind]
    for newline in ("\n", "\r\n"):
        verdict = task.verify(problem, ("<think>Easy.</think>\n\n" + summary).replace("\n", newline))
        assert verdict.correct is correct, (verdict, newline)
        assert verdict.formatted or not correct


def test_a_block_ends_where_its_fence_does():
    text = "````python\na = 1\n```\nb = 2\n````\n~~~\nc\n```\n~~~"
    assert [text[block.begin : block.end] for block in blocks(text)] == ["a = 1\n```\nb = 2\n", "c\n```\n"]
    assert [block.closed for block in blocks("```\nx\n~~~\n")] == [False]
    assert list(blocks("```text\nx\n```\nUse `x` or ```x``` here.")) == []
    assert last_program("x") == "x" and last_program("```\nx") == "x"


def test_only_shared_indentation_is_removed():
    source = 'def f():\n    return """\n  a\n"""\n'
    assert flush_left(source) == source
    assert flush_left("  x = 1\n\n   \n  if x:\n    y = 2\n") == "x = 1\n\n \nif x:\n  y = 2\n"
    assert flush_left("") == "" and flush_left("\n\n") == "\n\n"
