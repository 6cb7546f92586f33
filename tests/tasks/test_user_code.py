"""Tasks and rewards from a user's own file: loaded by name, warned about, hashed; the example runs."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from completions import completion
from rl_parts import reward, rewarded

from bessemer import plugins
from bessemer.config import places
from bessemer.config.rl import RLConfig
from bessemer.errors import UserError
from bessemer.pipeline import inputs
from bessemer.rl import rollout
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks import Problem, Task, Verdict, get
from bessemer.tasks.registry import shared_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAME = "remainder.py:Remainder"


def sample():
    return ScoredSample(Problem("p", "", "en", {}), [1], completion([1], ""), Verdict(True, True, "correct", None))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_beside", {})
    for name in ("my_own", "by_way_of"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    shutil.copy(EXAMPLES / "remainder.py", tmp_path)
    with places.of_recipe(tmp_path):
        yield tmp_path


def test_a_task_is_found_by_its_file_and_says_so(folder):
    with pytest.warns(UserWarning, match=r"remainder\.py .*outside the sandbox"):
        (folder / "remainder.py").open("a").write("# changed\n")
        task = get(NAME, languages=["zh"])
    assert isinstance(task, Task) and (task.name, task.languages) == (NAME, ("zh",))
    problem = task.problem("test", 3)
    assert problem == get(NAME, languages=["zh"]).problem("test", 3) and problem.id.startswith(NAME)
    assert task.verify(problem, f"<think>t</think><answer>{problem.meta['value']}</answer>").sound
    assert get(NAME, sloppy=0.0).mix.sloppy == 0.0
    assert shared_file(NAME, NAME) is None, "its splits are its own"


def test_the_example_matches_that_of_the_page():
    page = (ROOT / "docs" / "tasks.md").read_text()
    assert re.search('```python\n(""".*?)```', page, re.DOTALL)[1] == (EXAMPLES / "remainder.py").read_text()


@pytest.mark.parametrize(
    ("text", "name", "fault"),
    [
        ("", "absent.py:A", r"there is no file absent\.py.*looked in"),
        (
            "from bessemer.tasks import Task\nclass Mine(Task):\n    pass",
            "mine.py:Min",
            "defines no Min; did you mean Mine",
        ),
        ("x = 1\n1 / 0", "mine.py:Mine", r"mine\.py, line 2: ZeroDivisionError"),
        ("def f(:", "mine.py:f", r"mine\.py, line 1: SyntaxError"),
        ("import sys\nsys.exit(3)", "mine.py:Mine", r"mine\.py, line 2: SystemExit: 3; correct the file"),
        ("Mine = 3", "mine.py:Mine", "is not a task; derive the class"),
        ("from bessemer.tasks import Task\nclass Mine(Task):\n    pass", "mine.py:Mine", "does not define make"),
        (
            "from bessemer.tasks import Task\nclass Mine(Task):\n    domain = 3\n    make = grade = print",
            "mine.py:Mine",
            "has the domain 3; set the attribute",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_mistake_is_named(folder, text, name, fault):
    (folder / "mine.py").write_text(text)
    with pytest.raises(UserError, match=fault):
        get(name)


DOUBLE = """
from bessemer.tasks import Problem, Task
class Double(Task):
    def make(self, split, index, seed, language, phrasing):
        n = 2 * index + (split == "test")
        return Problem(f"double/{split}/{index}", f"Compute 2*{n}.", language, {"value": VALUE})
"""


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_task_without_grade_is_graded_by_its_integer(folder):
    (folder / "double.py").write_text(DOUBLE.replace("VALUE", "2 * n"))
    task = get("double.py:Double")
    verdicts = [
        task.verify(task.problem("test", 4), f"<think>t</think><answer>{n}</answer>") for n in ("18", "19", "2*9")
    ]
    assert [verdict.reason for verdict in verdicts] == ["correct", "wrong-value", "unparsable"]
    assert task.domain == "own"
    (folder / "words.py").write_text(
        DOUBLE.replace("VALUE", "str(2 * n)").replace("def make", "domain = 'mine'\n    def make")
    )
    words = get("words.py:Double")
    assert words.domain == "mine"
    with pytest.raises(UserError, match=r"double/test/4 has meta\[\"value\"\] = '18'.* define grade"):
        words.verify(words.problem("test", 4), "<think>t</think><answer>18</answer>")


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_reward_function_takes_the_place_of_the_accuracy(folder):
    (folder / "mine.py").write_text(
        "def short(problem, answer, verdict):\n    return 0.5 * verdict.correct + len(problem.meta) / len(answer)\n"
        "def wrong(problem, answer, verdict):\n    return float('nan')\n"
    )
    config = RLConfig(
        kind="rl", name="zero", tasks=["words"], reward=["mine.py:short", {"name": "format", "weight": 0.25}]
    )
    text = "<think>t</think><answer>7</answer>"
    sample = completion([1], text)
    groups = rollout.verify([(get("words"), Problem("p", "", "en", {"value": 7}))], [[1]], [[sample]], "")
    Reward.of_config(config).score(groups)
    assert groups[0][0].reward == 0.5 + 1 / len(text) + 0.25
    with pytest.raises(UserError, match=r"mine\.py:wrong .*line 3\) returned .*nan.*return a number"):
        reward("mine.py:wrong").score(groups)
    with pytest.raises(UserError, match="is not a function"):
        reward("remainder.py:Remainder")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("def f(problem, answer, verdict, scale): return 1.0", "missing a required argument: 'scale'"),
        ("def f(problem, answer, verdict): pass", "returned something else .*NoneType.*; return a number"),
        ("def f(*_): return 10**400", "too large to convert to float.*; return a number"),
        ("import sys\ndef f(*_): sys.exit(3)", r"mine\.py, line 2: SystemExit: 3"),
        ("def f(*_): return [1.0, 2.0]", "not 'list'.*; return a number"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_reward_function_is_one_of_ours(folder, text, fault):
    (folder / "mine.py").write_text(text)
    with pytest.raises(UserError, match=fault):
        reward("mine.py:f").score([[sample()]])


@pytest.mark.filterwarnings("ignore:.*your own code")
def test_a_file_imports_what_lies_beside_it(folder):
    (folder / "my_scales.py").write_text("SCALE = 0.5")
    (folder / "mine.py").write_text("from my_scales import SCALE\ndef f(*_): return SCALE")
    path_before = list(sys.path)
    (folder / "my_late_scales.py").write_text("SCALE = 2.0")
    (folder / "late.py").write_text("def f(*_):\n    import my_late_scales\n    return my_late_scales.SCALE")
    assert rewarded([sample()], "mine.py:f") == [0.5] and sys.path == [*path_before, str(folder)]
    assert rewarded([sample()], "late.py:f") == [2.0] and sys.path == [*path_before, str(folder)]
    (folder / "own.py").write_text("import sys\nsys.path = [*sys.path[1:]]\nf = max")
    assert plugins.find("rewards", "own.py:f", takes="problem, answer, verdict")("x", "", "") == "x"


LATE = "def f(*_):\n    import my_own\n    return my_own.X"
IMPORTS = ["from my_own import X\nf = max", LATE, "import by_way_of\nf = max"]


@pytest.mark.parametrize(("first", "text"), [*((IMPORTS[0], text) for text in IMPORTS), (LATE, LATE)])
@pytest.mark.filterwarnings("ignore:.*your own code")
def test_modules_of_one_name_in_two_folders_are_not_mixed_up(folder, first, text):
    for side in ("one", "two"):
        (folder / side).mkdir()
        (folder / side / "mine.py").write_text(first if side == "one" else text)
        (folder / side / "my_own.py").write_text("X = 1")
        (folder / side / "by_way_of.py").write_text("import my_own")
    reward("one/mine.py:f")
    with pytest.raises(
        UserError, match=r"imports my_own, of which there are two, .*two/my_own\.py and .*one/my_own\.py"
    ):
        reward("two/mine.py:f")
    (folder / "shadow.py").write_text("import sys\ndef f(*_): return 1")
    (folder / "sys.py").write_text("")
    with pytest.raises(UserError, match=r"sys\.py and Python's own; rename"):
        reward("shadow.py:f")


def test_the_file_is_among_those_that_a_stage_reads(folder):
    config = RLConfig(kind="rl", name="zero", tasks=[NAME], reward="mine.py:short")
    (folder / "mine.py").write_text("def short(*_): return 0.0")
    files_before = inputs.read_by(config)
    assert set(files_before) == {"remainder.py", "mine.py"}
    (folder / "mine.py").write_text("def short(*_): return 1.0")
    files_after = inputs.read_by(config)
    assert (
        files_before["remainder.py"] == files_after["remainder.py"]
        and files_before["mine.py"] != files_after["mine.py"]
    )
    assert inputs.changed({"files": files_before, "since": 0}, files_after).startswith("mine.py changed")


def test_the_example_runs_and_is_evaluated_by_name(tmp_path, call):
    small = ["base.tokens=4K", 'base.lr=[["0", 0.001]]', "corpus.limits.remainder=30K", "corpus.vocab_sample=10000"]
    small += [f"{stage}.{key}" for stage in ("zero", "eval") for key in ("max_new_tokens=8", "samples=2")]
    small += [
        'zero.lr=[["0", 0.0001]]',
        "zero.rollouts=1",
        "zero.prompts_per_rollout=4",
        "zero.heldout.minimum_pass=0.0",
    ]
    small += ["zero.heldout.problems=4", "eval.problems=2"]
    options = [word for setting in small for word in ("--set", setting)]
    code, out, err = call("run", str(EXAMPLES / "remainder.toml"), "--out", str(tmp_path / "r"), *options)
    assert code == 0, err
    assert (out + err).count("remainder.py is your own code") == 1
    assert (tmp_path / "r" / "03-zero" / "done.json").is_file() and (tmp_path / "r" / "04-eval" / "done.json").is_file()
    named = f"{EXAMPLES}/remainder.py:Remainder"
    code, out, err = call(
        "eval",
        str(tmp_path / "r" / "03-zero"),
        "--task",
        named,
        "--problems",
        "2",
        "--samples",
        "2",
        "--max-tokens",
        "8",
    )
    assert code == 0 and "Remainder" in out, err
