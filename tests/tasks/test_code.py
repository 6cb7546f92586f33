"""The code task: its prompts, hidden tests, rewards, documents, and problems from a file."""

import ast
import json
import random

import pytest

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.code import LONGEST, source_of
from bessemer.addons.tasks.code_functions import FAMILIES, HELD_OUT, TESTS, WORDS, definition, functions_of
from bessemer.addons.tasks.sandbox import same
from bessemer.errors import UserError
from bessemer.tasks import Problem, get

TASK = get("code")
EVERY = [function for split in ("train", "test") for function in functions_of(split)]


def hidden_tests(goal):
    return TASK.tests(Problem("p", "", "en", {"family": goal.family.name, "parameters": list(goal.parameters)}))


def think(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


def problem_of(name: str) -> Problem:
    return next(
        p for i in range(TASK.size("train")) if (p := TASK.problem("train", i, language="en")).meta["family"] == name
    )


def test_splits_are_disjoint_in_families_and_in_parameters():
    keys = {split: {function.key for function in functions_of(split)} for split in ("train", "test")}
    assert not keys["train"] & keys["test"] and len(keys["train"]) > 800 and len(keys["test"]) > 300
    families = {split: {function.family.name for function in functions_of(split)} for split in ("train", "test")}
    assert families["test"] - families["train"] == set(HELD_OUT) and len(families["train"]) >= 20
    kinds = [TASK.problem("test", i).meta["held_out"] for i in range(TASK.size("test"))]
    assert kinds.count("parameters") > 50 and kinds.count("family") > 200
    assert TASK.problem("train", 0).meta["held_out"] is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_first_problems_are_all_different(split):
    problems = [TASK.problem(split, i, seed=5) for i in range(TASK.size(split))]
    assert len({(p.meta["family"], *p.meta["parameters"]) for p in problems}) == TASK.size(split)
    assert {p.language for p in problems} == {"en", "zh"} and all(p.meta["difficulty"] in (1, 2, 3) for p in problems)
    assert all(json.loads(json.dumps(p.meta)) == p.meta for p in problems)


def test_prompts_specify_the_function():
    """No two functions of a split are asked for in the same words."""
    for language in ("en", "zh"):
        assert len({function.words(language) for function in EVERY}) == len(EVERY)
    for phrasing in ("seen", "held-out"):
        prompts = [get("code", phrasing=phrasing).problem("test", i, language="zh").prompt for i in range(50)]
        assert all("f(" in prompt and ("请" in prompt) == (phrasing == "held-out") for prompt in prompts)


def test_the_written_form_of_a_function_is_the_function():
    """The code shown in documents and the functions used for judging are written independently, and agree."""
    for goal in EVERY[::3]:
        space = {}
        exec(definition(goal.family.argument, goal.code), space)
        for value in goal.inputs(random.Random(goal.key), 20):
            expected = goal(value)
            assert same(expected, json.loads(json.dumps(space["f"](value)))), (goal.key, value)
            result = space["f"](value)
            assert type(expected) is type(result) and expected == result, (goal.key, value)


def test_hidden_tests_distinguish_a_function_from_likely_mistakes():
    """No rival that differs on any of 200 other arguments passes, whether of the same family or of another."""
    rng, pairs = random.Random(0), 0
    for goal in rng.sample(EVERY, 60):
        tests = hidden_tests(goal)
        assert len(tests) == TESTS and len({repr(arguments) for arguments, _ in tests}) == TESTS
        assert len({repr(expected) for _, expected in tests}) >= 2  # no constant passes
        others = goal.inputs(random.Random(1), 200)
        alike = [function for function in EVERY if function.family.argument == goal.family.argument]
        same_family = [function for function in alike if function.family is goal.family and function != goal]
        for rival in rng.sample(alike, 30) + same_family:
            if any(goal.differs(rival, value) for value in others):
                pairs += 1
                assert any(goal.differs(rival, value) for (value,), _ in tests), (goal.key, rival.key)
    assert pairs > 2500


def test_hidden_tests_are_the_same_for_every_way_of_asking_and_in_no_document():
    first = TASK.problem("test", 3, language="en")
    in_chinese = Problem("x", "", "zh", first.meta)
    assert TASK.tests(first) == TASK.tests(in_chinese)
    assert "tests" not in first.meta


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_answer_of_every_family_is_paid(name):
    goal = next(function for function in EVERY if function.family.name == name)
    meta = {"function": "f", "family": name, "parameters": list(goal.parameters)}
    answer = think("\n" + definition(goal.family.argument, goal.code) + "\n")
    verdict = TASK.verify(Problem("p", "", "en", meta), answer)
    assert (verdict.correct, verdict.formatted, verdict.reason) == (True, True, "correct")


PROBLEM = problem_of("add")
K = PROBLEM.meta["parameters"][0]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (think(f"def f(n): return n+{K}"), "correct"),
        (think(f"```python\ndef f(n):\n\n    return n + {K}\n```"), "correct"),
        (think(f"Here it is:\n```\nf = lambda n: {K} + n\n```\nGood luck."), "correct"),
        (think(f"def f(n): return n+{K + 1}"), "wrong-output"),
        (think(f"def f(n): return str(n+{K})"), "wrong-output"),
        (think("def f(n): return n+k"), "error"),
        (think("import os\nos._exit(0)"), "error"),
        (think("print('PASSED')"), "no-function"),
        (think(f"def g(n): return n+{K}"), "no-function"),
        (think("def f(n) = n"), "syntax-error"),
        (think(f"n+{K}"), "error"),
        (think("  \n"), "empty"),
        (think("#" * (LONGEST + 1)), "too-long"),
        (think(f"def f(n): return {K}+n <!-- -->"), "syntax-error"),
        (think(f"```python\ndef f(n): return 0\n```\n```python\ndef f(n): return n+{K}\n```"), "correct"),
        (think(f"```python\ndef f(n): return n+{K}\n```\n```python\ndef f(n): return 0\n```"), "wrong-output"),
        (f"<think>t</think>\n\nSo:\n```python\ndef f(n): return n+{K}\n```\nDone.", "correct"),
        (think(f'def f(n): return n+{K} if len("""a\n\nb""") == 4 else 0'), "correct"),  # a blank line that matters
        (f"<think>t</think>def f(n): return n+{K}", "no-answer"),
        (f"<answer>def f(n): return n+{K}</answer>", "no-think"),
        (f"<answer>def f(n): return n+{K}</answer>" * 2, "bad-tags"),
        (f"<think> </think><answer>def f(n): return n+{K}</answer>", "no-think"),
        ("", "no-answer"),
    ],
)
def test_reasons(completion, reason):
    verdict = TASK.verify(PROBLEM, completion)
    assert (verdict.reason, verdict.correct) == (reason, reason in ("correct", "no-think"))


def test_voting_ignores_the_layout_of_the_source():
    plain, fenced = think("def f(n):\n    return 1"), think("```py\ndef f(n):\n\n    return 1   \n```")
    answers = {TASK.verify(PROBLEM, text).answer for text in (plain, fenced, fenced.replace("\n", "\r\n"))}
    assert answers == {"def f(n):\n    return 1"}
    quoted = 'return "a\u2028b\x0cc\x1cd"'
    assert source_of(f"```python\n{quoted}\r\n```") == quoted, "a string holds what is no end of a line in Python"
    assert source_of("```python\nx\n") == "x" and source_of("```") == "```"


def test_unformatted_answers_are_not_run(monkeypatch):
    monkeypatch.setattr(sandbox, "judge", lambda *a, **k: pytest.fail("it ran"))
    for text in ("<answer>x = 1</answer>" * 2, "<think>t<answer>x = 1</answer>", "<think>t</think>\n\n```\nx = 1"):
        assert TASK.verify(PROBLEM, text).answer is None


def test_documents_are_of_the_train_split_and_their_verdicts_true():
    train = {definition(function.family.argument, function.code) for function in functions_of("train")}
    test_code = {function.code for function in functions_of("test")}
    with_verdict = right = answered = 0
    authors = set()
    for index in range(400):
        written = TASK.written(index, seed=2)
        assert written.text == f"User: {written.problem.prompt}\nAssistant:{written.response}"
        authors.add(written.author)
        goal = next(
            function
            for function in functions_of("train")
            if function.family.name == written.problem.meta["family"]
            and list(function.parameters) == written.problem.meta["parameters"]
        )
        thoughts, _, answer = written.response.partition("<answer>")
        code = answer.removesuffix("</answer>")
        if code:
            assert code in train
            answered += 1
            right += code == definition(goal.family.argument, goal.code)
        words = WORDS[written.problem.language]
        for line in thoughts.removeprefix("<think>").removesuffix("</think>").split("\n")[1:]:
            yes, no = line.endswith(words["yes"]), line.endswith(words["no"])
            tried = line.removesuffix(words["yes"]).removesuffix(words["no"])
            assert tried[0] == tried[-1] == "`", "code between backticks belongs to no language"
            expression, _, claim = tried[1:-1].partition(":f(")
            assert yes != no and expression not in test_code
            call, _, expected = claim.rpartition(":")
            argument, _, value = call.partition(")=")
            argument, value, expected = map(ast.literal_eval, (argument, value, expected))
            assert goal(argument) == expected
            assert eval(expression, {goal.family.argument: argument}) == value
            with_verdict += 1
            assert yes == (value == expected) or written.author == "sloppy"
    assert authors == {"direct", "sloppy", "careful"} and with_verdict > 300 and 0.5 < right / answered < 0.9


@pytest.mark.parametrize(
    ("share", "author"), [({"direct": 1.0}, "direct"), ({"direct": 0.0, "sloppy": 0.0}, "careful")]
)
def test_the_mix_sets_the_authors(share, author):
    task = get("code", **share)
    assert {task.written(index).author for index in range(40)} == {author}
    with pytest.raises(UserError, match="between 0 and 1"):
        get("code", sloppy=2)


# ---- problems from files

ROW = {
    "prompt": "Write inc(n): n plus 1.",
    "entry_point": "inc",
    "tests": [{"input": [1], "output": 2}, {"input": [-1], "output": 0}],
}


def file_of(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    )
    return f"code:{path}"


def test_the_time_limit_of_a_file_matches_that_of_one_test(tmp_path):
    tests = [{"input": [n], "output": n} for n in range(4)]
    task = get(file_of(tmp_path, {"prompt": "Same.", "entry_point": "f", "time_limit": 1.2, "tests": tests}))
    problem = task.problem("train" if task.size("train") else "test", 0)
    assert task.grade(problem, "import time\ndef f(n):\n    time.sleep(0.4)\n    return n")[0] == "correct"
    assert task.grade(problem, "import time\ndef f(n):\n    time.sleep(9)\n    return n")[0] == "timeout"


def test_problems_from_a_file(tmp_path):
    rows = [
        ROW | {"prompt": f"Write inc(n): n plus {k}.", "tests": [{"input": [1], "output": 1 + k}]} for k in range(60)
    ]
    rows.append(ROW | {"prompt": "写函数inc(n)：n加1。", "difficulty": 3, "id": "zh-1"})
    task = get(file_of(tmp_path, *rows))
    assert task.domain == "code" and task.languages == ("en", "zh") and task.size("train") + task.size("test") == 61
    problems = [task.problem(split, i) for split in ("train", "test") for i in range(task.size(split))]
    assert {problem.prompt for problem in problems} == {row["prompt"] for row in rows}
    assert {problem.language: problem.meta["difficulty"] for problem in problems} == {"en": 1, "zh": 3}
    problem = next(row for row in problems if row.language == "zh")
    assert problem.id.endswith("/zh-1")
    assert task.verify(problem, think("def inc(n): return n+1")).reason == "correct"
    assert task.verify(problem, think("def inc(n): return 2")).reason == "wrong-output"
    assert task.verify(problem, think("def f(n): return n+1")).reason == "no-function"
    assert task.problem("train", 0) != task.problem("train", 1) and task.problem("train", 0) == task.problem("train", 0)
    assert get(task.name, languages=["zh"]).size("train") + get(task.name, languages=["zh"]).size("test") == 1
    with pytest.raises(UserError, match="no pre-training documents"):
        task.document(0)


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[]", "line 2: a list; a line of code:PATH is"),
        (ROW | {"prompt": ""}, "no text under .* 'prompt'"),
        (ROW | {"entry_point": 5}, "5 is not a valid function name"),
        (ROW | {"entry_point": "f()"}, "not a valid function name"),
        (ROW | {"entry_point": "def"}, "not a valid function name"),
        (ROW | {"tests": []}, "no tests under any of 'tests'"),
        (ROW | {"tests": [{"input": 5, "output": 5}]}, "test 1: the input of a function is the list of its arguments"),
        (ROW | {"tests": [ROW["tests"][0], {"input": [5]}]}, "test 2 of 'tests' needs 'input'"),
        (ROW | {"tests": [{"input": [], "output": [float("nan")]}]}, "not finite"),
        (ROW | {"language": "fr"}, "language 'fr'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, row, hint):
    with pytest.raises(UserError, match=hint):
        get(file_of(tmp_path, ROW, row))


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        get(f"code:{tmp_path}/absent.jsonl")
    with pytest.raises(UserError, match="contains no problem"):
        get(file_of(tmp_path, ""))
    with pytest.raises(UserError, match=r"has no t\w+ problem"):
        task = get(file_of(tmp_path, ROW))
        task.problem("test" if task.size("train") else "train", 0)
