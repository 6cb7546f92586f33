"""docs/tasks.md: its example runs, and its lists match the code."""

import re
from pathlib import Path

import pytest

from bessemer.addons.tasks.gym import RULES
from bessemer.addons.tasks.maths_answers import ECHO, UNFINISHED
from bessemer.addons.tasks.referee import TIMEOUT
from bessemer.tasks import base, get, names
from bessemer.tasks.answer import BAD_TAGS, NO_ANSWER, NO_THINK

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


@pytest.fixture
def remainder(tmp_path):
    (tmp_path / "remainder_of_the_page.py").write_text(re.search('```python\n(""".*?)```', PAGE, re.DOTALL)[1])
    return get(f"{tmp_path}/remainder_of_the_page.py:Remainder")


def test_the_example_is_a_task(remainder):
    problem = remainder.problem("test", 0)
    value = problem.meta["a"] % problem.meta["b"]
    assert remainder.verify(problem, f"<think>t</think><answer>{value}</answer>").correct
    assert remainder.verify(problem, f"<think>t</think><answer>{value + 1}</answer>").reason == base.WRONG_VALUE
    problems = {
        s: {(p.meta["a"], p.meta["b"]) for p in (remainder.problem(s, i) for i in range(300))} for s in base.SPLITS
    }
    assert not problems["train"] & problems["test"] and min(map(len, problems.values())) > 30
    pages = [remainder.written(i) for i in range(300)]
    assert all(re.fullmatch("User: .+\nAssistant:<think>.+</think><answer>\\d+</answer>", page.text) for page in pages)
    for page in pages:
        assert page.author == "sloppy" or remainder.verify(page.problem, page.response).correct
    assert 0.3 < sum(remainder.verify(page.problem, page.response).correct for page in pages) / 300 < 0.8
    assert remainder.document(0, language="zh").startswith("User: ")


def test_the_lists_are_complete():
    for name in names():
        assert f"`{name}`" in PAGE, name
    graded = (base.CORRECT, base.WRONG_VALUE, base.WRONG_NUMBERS, base.UNPARSABLE, UNFINISHED, ECHO)
    for code in (*graded, TIMEOUT, NO_ANSWER, BAD_TAGS, NO_THINK):
        assert f"| `{code}` |" in PAGE, code
    assert len(RULES) == 10 and "Ten scorers" in PAGE
