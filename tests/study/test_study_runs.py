"""A study of real runs: arms that share a base, figures of an evaluation and of metrics, a study that is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bessemer.addons.study.figures import of_run
from bessemer.addons.study.file import Study
from bessemer.cli import app
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.runs.metrics import Metrics

MINI = Path(__file__).parents[2] / "bench" / "mini.toml"
EVAL = """
[[stage]]
kind = "eval"
models = ["base", "zero"]
tasks = ["countdown"]
problems = 4
samples = 2
max_new_tokens = 40
precision = "float32"
"""
STUDY = """
name = "rates"
question = "Does the rate matter?"
claim = "It does not in two rollouts."
recipe = "recipe.toml"
shared = "base"
seeds = [1, 2, 3]
set = ["base.tokens=20000", 'base.lr=[["0", 6e-3]]', 'base.gamma=0.001', 'base.mtp_lambda=0.3',
  "base.validate_every=20000", "zero.rollouts=2", "zero.max_new_tokens=40",
  "zero.precision=float32", "zero.heldout.problems=4"]

[arm.slow]
set = ["zero.lr=1e-6"]
[arm.fast]
set = ["zero.lr=1e-4"]

[figure.accuracy]
stage = "eval"
model = "zero"
task = "countdown"
[figure.length]
stage = "zero"
metric = "rl/length"
last = 2
[figure.both]
of = ["accuracy", "length"]
take = "range"

[[rule]]
name = "equal"
first = "slow.accuracy"
second = "fast.accuracy"
side = "within"
by = 0.5
expected = 0.0
[[control]]
name = "answers have some length"
first = "slow.length"
side = "above"
by = 1
expected = 30
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    text = MINI.read_text(encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(text[: text.index('[[stage]]\nkind = "reject"')] + EVAL, encoding="utf-8")
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path


def test_real_runs_share_a_base_and_go_on_after_a_stop(folder):
    command = [sys.executable, "-m", "bessemer", "study", str(folder / "study.toml"), "--out", str(folder / "out")]
    first = subprocess.Popen([*command, "--jobs", "1"], stderr=subprocess.PIPE, text=True)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("base-1: done"):
            break
    time.sleep(2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == 130
    assert not (folder / "out" / "study.json").exists() or json.loads(
        (folder / "out" / "study.json").read_text()
    )["runs"]["ended"] < 6  # fmt: skip
    done = subprocess.run([*command, "--jobs", "2"], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out" / "study.json").read_text())
    assert found["verdict"] == "holds" and found["runs"] == {"all": 6, "ended": 6, "failed": 0}
    for run in found["results"]:
        assert set(run["figures"]) == {"accuracy", "length", "both"}
        assert run["figures"]["both"] == pytest.approx(abs(run["figures"]["length"] - run["figures"]["accuracy"]))
        records = [
            folder / "out" / name / "run" / "02-base" / "done.json"
            for name in (f"{run['arm']}-{run['seed']}", f"base-{run['seed']}")
        ]
        one, other = (json.loads(path.read_text())["digest"] for path in records)
        assert one == other
    lines = (folder / "out" / "fast-2" / "run" / "metrics.jsonl").read_text().splitlines()
    lengths = [v["rl/length"] for line in lines if "rl/length" in (v := json.loads(line)["values"])]
    [length] = [r["figures"]["length"] for r in found["results"] if (r["arm"], r["seed"]) == ("fast", 2)]
    assert length == pytest.approx(sum(lengths[-2:]) / 2)
    assert "answers have some length" in (folder / "out" / "study.html").read_text()


@pytest.mark.parametrize("old, new, named", [
    ('["zero.lr=1e-4"]', '["base.tokens=30000"]', "base"), ('shared = "base"', 'shared = "bass"', "base"),
    ('stage = "eval"', 'stage = "evil"', "evil"), ('["zero.lr=1e-4"]', '["zero.lrr=1e-4"]', "lr"),
    ('["zero.lr=1e-4"]', '["zero.tasks=[\\"cuontdown\\"]"]', "countdown"),
    ('task = "countdown"', 'task = "countdown:3"', "accuracy.*countdown:3.*its tasks: countdown"),
])  # fmt: skip
def test_an_arm_that_cannot_run_is_named_before_any_run(folder, old, new, named):
    (folder / "study.toml").write_text(STUDY.replace(old, new, 1))
    refused = CliRunner().invoke(app, ["study", str(folder / "study.toml"), "--out", str(folder / "out")])
    assert isinstance(refused.exception, UserError) and re.search(named, str(refused.exception))
    assert not (folder / "out").exists()


def test_a_task_of_ones_own_that_names_itself(folder):
    """Its rows have its name, and the figure the recipe's FILE.py:CLASS."""
    (folder / "own.py").write_text(
        "from bessemer.tasks.countdown import Countdown\n\n\nclass Own(Countdown):\n"
        "    def __init__(self, **settings):\n        super().__init__(**settings)\n        self.name = 'mine'\n"
    )
    recipe = folder / "recipe.toml"
    recipe.write_text(
        recipe.read_text().replace('tasks = ["countdown"]\nproblems = 4', 'tasks = ["own.py:Own"]\nproblems = 4')
    )
    (folder / "study.toml").write_text(STUDY.replace('task = "countdown"', 'task = "own.py:Own"'))
    study, run = Study.load(folder / "study.toml"), folder / "run"
    made_run(run, study.recipe("slow", 1), "mine")
    assert of_run(study, "slow", run)["accuracy"] == 0.5


def made_run(run: Path, recipe: Recipe, task: str) -> None:
    """A run that has ended, as far as its figures are read: `task` is the name in the rows of its evaluation."""
    for stage in ("02-zero", "03-eval"):
        (run / stage).mkdir(parents=True)
    (run / "recipe.toml").write_text(recipe.to_toml())
    row = {"model": "zero", "task": task, "pass_at_1": 0.5}
    (run / "03-eval" / "results.json").write_text(json.dumps({"rows": [row]}))
    metrics = Metrics(run / "metrics.jsonl")
    for step, length in enumerate((float("nan"), 3.0, 5.0)):
        metrics.write("zero", step, step, {"rl/length": length})
    metrics.close()


def test_a_metric_that_is_not_finite_at_the_end_is_no_figure(folder):
    """A run that diverged must not count with what it had before."""
    study, run = Study.load(folder / "study.toml"), folder / "run"
    made_run(run, study.recipe("slow", 1), "countdown")
    assert of_run(study, "slow", run)["length"] == 4.0
    metrics = Metrics(run / "metrics.jsonl")
    metrics.write("zero", 3, 3, {"rl/length": float("inf")})
    metrics.close()
    with pytest.raises(UserError, match=r"length of arm slow.*rl/length.*finite"):
        of_run(study, "slow", run)


def test_what_is_fixed_does_not_name_where_the_study_lies_and_follows_the_recipe(folder, tmp_path_factory):
    before = Study.load(folder / "study.toml").hash
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("recipe.toml", "study.toml"):
        (other / name).write_bytes((folder / name).read_bytes())
    assert Study.load(other / "study.toml").hash == before
    (other / "recipe.toml").write_text((folder / "recipe.toml").read_text().replace("samples = 4", "samples = 5", 1))
    assert Study.load(other / "study.toml").hash != before
