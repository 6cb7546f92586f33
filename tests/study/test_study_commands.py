"""`bessemer study` with arms that are commands of their own: refusals, failures, kills, resumption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chinese_pages import untranslated
from typer.testing import CliRunner

from bessemer.cli import app
from bessemer.errors import UserError

STUDY = """
name = "thirds"
question = "Is one arm better?"
claim = "The first arm is better by a tenth."
seeds = [1, 2, 3, 4]

[arm.high]
command = ["python", "arm.py", "high", "{seed}", "{out}"]
minutes = 0.1
[arm.low]
command = ["python", "arm.py", "low", "{seed}", "{out}"]
minutes = 0.1

[figure.accuracy]

[[rule]]
name = "higher"
first = "high"
second = "low"
side = "above"
by = 0.1
expected = 0.3

[[control]]
name = "an arm that is known to be high"
first = "high"
side = "above"
by = 0.2
expected = 0.5
"""
ARM = """
import json, pathlib, sys, time
arm, seed, out = sys.argv[1:]
here = pathlib.Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(f"{arm}-{seed}\\n")
if (here / "slow").exists() and (arm, seed) == ("low", "2"):
    time.sleep(60)
value = {"high": 0.5, "low": 0.1}[arm] + 0.01 * int(seed) * (1 if arm == "high" else 2)
if (here / f"{arm}-{seed}").exists():
    value = json.loads((here / f"{arm}-{seed}").read_text())
(pathlib.Path(out) / "figures.json").write_text(json.dumps({"accuracy": value}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "arm.py").write_text(ARM)
    return tmp_path


def study(folder: Path, *options: str):
    return CliRunner().invoke(app, ["study", str(folder / "study.toml"), "--out", str(folder / "out"), *options])


def facts(folder: Path) -> dict:
    return json.loads((folder / "out" / "study.json").read_text())


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()


def test_arms_of_other_programs_and_the_verdict(folder):
    done = study(folder)
    assert done.exit_code == 0, done.output
    found = facts(folder)
    assert found["verdict"] == "holds" and found["runs"] == {"all": 8, "ended": 8, "failed": 0}
    values = found["rules"][0]["values"]
    assert values == pytest.approx({str(seed): 0.4 - 0.01 * seed for seed in (1, 2, 3, 4)})
    page = (folder / "out" / "study.html").read_text()
    assert "holds" in done.stdout and "higher" in page
    names = [*facts(folder)["machine"].values(), found["question"], found["claim"], found["hash"], "high low accuracy"]
    assert untranslated(page, "thirds higher an arm that is known to be high", *map(str, names)) == []
    assert study(folder).exit_code == 0 and len(calls(folder)) == 8


def test_what_is_said_before_any_run(folder):
    done = study(folder, "--dry-run", "--jobs", "1")
    assert done.exit_code == 0 and not (folder / "out").exists()
    assert "8 runs" in done.stdout and "power" in done.stdout


@pytest.mark.parametrize("old, new", [("by = 0.1\n", "by = 0.05\n"), ('"low", "{seed}"', '"high", "{seed}"')])
def test_a_rule_or_arm_that_changes_after_results_is_refused(folder, old, new):
    assert study(folder).exit_code == 0
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace("Is one arm better?", "Is the first arm better?"))
    assert study(folder).exit_code == 0
    before = (folder / "out" / "study.json").read_bytes()
    (folder / "study.toml").write_text(text.replace(old, new, 1))
    refused = study(folder)
    assert isinstance(refused.exception, UserError)
    assert "--out" in str(refused.exception)
    assert (folder / "out" / "study.json").read_bytes() == before and len(calls(folder)) == 8
    other = CliRunner().invoke(app, ["study", str(folder / "study.toml"), "--out", str(folder / "other")])
    assert other.exit_code == 0


def test_what_has_run_so_far_is_shown_without_a_verdict(folder):
    refused = study(folder, "--show")
    assert isinstance(refused.exception, UserError) and not (folder / "out").exists()
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(
        text + "\n[arm.never]\ncommand = ['python', 'arm.py', 'never', '{seed}', '{out}']\n"
    )
    assert study(folder).exit_code == 1  # nothing asks for a figure of this arm, and its program fails
    for path in (folder / "out").glob("never-*/result.json"):
        path.unlink()
    done = study(folder, "--show")
    assert done.exit_code == 0 and facts(folder)["verdict"] == "cannot tell" and len(calls(folder)) == 12
    assert facts(folder)["rules"][0]["verdict"] == "holds" and facts(folder)["runs"]["ended"] == 8


def test_a_failed_run_is_shown_and_tried_again(folder):
    (folder / "low-3").write_text("NaN")
    done = study(folder)
    assert done.exit_code == 1
    found = facts(folder)
    assert found["verdict"] == "cannot tell" and found["runs"]["failed"] == 1
    assert "low-3" in done.stdout and "3" in found["rules"][0]["doubts"][0]
    (folder / "low-3").unlink()
    assert study(folder).exit_code == 0
    again = facts(folder)
    assert again["verdict"] == "holds" and len(calls(folder)) == 9
    assert [run["attempts"] for run in again["results"] if (run["arm"], run["seed"]) == ("low", 3)] == [2]


def test_what_a_failed_run_counts_as_is_fixed_beforehand(folder):
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace("[figure.accuracy]", "[figure.accuracy]\nfailed = 0.0"))
    (folder / "low-3").write_text('"none"')
    assert study(folder).exit_code == 1
    found = facts(folder)
    assert found["runs"]["failed"] == 1 and found["rules"][0]["values"]["3"] == pytest.approx(0.53)


def test_a_blind_control_refuses_the_verdict(folder):
    text = (folder / "study.toml").read_text()
    (folder / "study.toml").write_text(text.replace("by = 0.2\nexpected = 0.5", "by = 0.7\nexpected = 0.9"))
    assert study(folder).exit_code == 0
    found = facts(folder)
    assert found["rules"][0]["verdict"] == "holds"
    assert found["verdict"] == "cannot tell" and "blind" in found["why"][0]


@pytest.mark.parametrize("old, new, named", [
    ('first = "high"', 'first = "hihg"', "high"), ("seeds = [1, 2, 3, 4]", "seeds = [1, 2, 2]", "twice"),
    ("expected = 0.3", "expected = 0.05", "higher"), ('side = "above"', 'side = "over"', "above"),
    ('"{out}"]\nminutes', '"{out}"]\nset = ["zero.lr=1"]\nminutes', "command"),
    ("[figure.accuracy]", "[figure.accuracy]\nmean = 3", "mean"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(folder, old, new, named):
    (folder / "study.toml").write_text(STUDY.replace(old, new, 1))
    refused = study(folder)
    assert isinstance(refused.exception, UserError) and named in str(refused.exception)
    assert not (folder / "out").exists()


def test_a_killed_study_loses_no_run_and_starts_none_twice(folder):
    (folder / "slow").touch()
    command = [sys.executable, "-m", "bessemer", "study", str(folder / "study.toml"), "--out", str(folder / "out")]
    process = subprocess.Popen([*command, "--jobs", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        begun = folder / "out" / "low-2" / "process"
        while not begun.exists() or "low-2" not in calls(folder):  # the suite's timeout ends it
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        running = int(begun.read_text())
        os.kill(running, 0)  # the run itself goes on
        second = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        assert second.stderr is not None
        assert any(line.startswith("low-2") and str(running) in line for line in second.stderr)  # it waits for it
        assert calls(folder).count("low-2") == 1
        os.kill(running, signal.SIGKILL)
        (folder / "slow").unlink()
        assert second.wait(timeout=120) == 1  # that run has written no figure
    finally:
        process.kill()
    assert study(folder).exit_code == 0
    assert facts(folder)["verdict"] == "holds"
    assert sorted(calls(folder)) == sorted([*(f"{arm}-{n}" for arm in ("high", "low") for n in range(1, 5)), "low-2"])
