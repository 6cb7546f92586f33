"""The interval of a predicted time."""

import json
import random
from pathlib import Path

import pytest

from bessemer.addons.plan import record
from bessemer.addons.plan.estimate import LocalEstimate

RECIPES = Path(__file__).parents[2] / "recipes"


def test_nine_of_ten_next_runs_are_inside():
    draw, inside = random.Random(3), 0
    for _ in range(600):
        *ratios, last = (draw.lognormvariate(0.2, 0.4) for _ in range(9))
        interval = record.next_ratio(ratios)
        inside += interval.low <= last <= interval.high
    assert inside / 600 == pytest.approx(0.9, abs=0.03)


def test_a_run_s_own_stages_come_first():
    earlier = record.of_this_machine()
    assert record.of_run({"a": 10.0}, {}, earlier) == earlier
    one = record.of_run({"a": 10.0, "b": 20.0}, {"a": 15.0}, earlier)
    assert one.middle == pytest.approx(1.5) and one.high / one.low == pytest.approx(earlier.high / earlier.low)
    planned = dict.fromkeys("abcd", 10.0)
    several = record.of_run(planned, {"a": 20.0, "b": 21.0, "c": 19.0}, earlier)
    assert several.middle == pytest.approx(2, rel=0.02) and several.high / several.low < earlier.high / earlier.low


def test_every_time_of_a_local_estimate_has_an_interval():
    estimate = LocalEstimate({"base": 100.0, "zero": 50.0}, {}, {"base": 130.0}, ())
    facts = estimate.facts()
    rows = {row["stage"]: row["interval_seconds"] for row in facts["stages"]}
    assert rows["zero"]["low"] < rows["zero"]["likely"] < rows["zero"]["high"]
    assert rows["zero"]["likely"] == pytest.approx(65)
    assert facts["interval_seconds_left"] == rows["zero"]
    assert "1 finished stages of this run, 1.30 x" in estimate.describe()


def test_every_time_of_a_plan_has_an_interval(call):
    facts = json.loads(call("plan", RECIPES / "tiny.toml", "--cluster", "2xH100", "--json")[1])
    factor = facts["interval"]
    assert factor["low"] < 1 < factor["likely"] < factor["high"] and factor["runs"] == 24
    for name in ("gpu_hours", "days", "step_seconds"):
        assert facts[f"{name}_interval"]["high"] == pytest.approx(factor["high"] * facts[name])
    for stage in facts["stages"]:
        assert stage["gpu_hours_interval"]["low"] == pytest.approx(factor["low"] * stage["gpu_hours"])
    assert call("plan", RECIPES / "tiny.toml", "--cluster", "2xH100")[1].count("nine in ten") >= 2


@pytest.mark.parametrize(
    ("name", "cluster", "stage"), [("tiny", "2xH100", "zero"), ("qwen2.5-7b-grpo", "8xH100", "grpo")]
)
def test_finished_stages_of_a_run_correct_a_plan_for_a_cluster(call, tmp_path, name, cluster, stage):
    """Of any family; text and JSON say what the interval is by."""
    command = ("plan", RECIPES / f"{name}.toml", "--cluster", cluster)
    planned = json.loads(call(*command, "--json")[1])
    (row,) = (row for row in planned["stages"] if row["stage"] == stage)
    seconds = row.get("seconds") or 3600 * row["gpu_hours"] / planned["gpus"]
    assert planned["interval"]["by"] == "published runs"
    folder = tmp_path / f"02-{stage}"
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps({"seconds": 3 * seconds}))
    facts = json.loads(call(*command, "--json", "--run", tmp_path)[1])
    assert facts["interval"]["by"] == record.FINISHED and facts["interval"]["likely"] == pytest.approx(3)
    (again,) = (row for row in facts["stages"] if row["stage"] == stage)
    interval = again.get("seconds_interval") or again["gpu_hours_interval"]
    assert interval["likely"] == pytest.approx(3 * (again.get("seconds") or again["gpu_hours"]))
    text = call(*command, "--run", tmp_path)[1]
    assert f"1 {record.FINISHED}" in text and "likely" in text


def test_every_training_of_another_family_has_a_time(call, tmp_path):
    """Not RL alone."""
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "response": "2"}) + "\n")
    (tmp_path / "mine.toml").write_text(MINE)
    facts = json.loads(call("plan", tmp_path / "mine.toml", "--cluster", "8xH100", "--json")[1])
    rows = {row["stage"]: row for row in facts["stages"]}
    assert rows.keys() == {"sft", "taught", "zero"} and all(row["seconds"] > 0 for row in rows.values())
    assert all(row["seconds_interval"]["low"] < row["seconds_interval"]["likely"] for row in rows.values())
    assert any("4 of 8 ranks without any" in note for note in facts["notes"])


MINE = """
name = "mine"

[[stage]]
kind = "import"
name = "base"
model = "hf://Qwen/Qwen2.5-7B"

[[stage]]
kind = "sft"
name = "sft"
from = "base"
data = ["talks.jsonl"]
lr = 1e-5
lr_final = 1e-6
row_length = 4096
batch_rows = 4

[[stage]]
kind = "distill"
name = "taught"
from = "sft"
teacher = "base"
tasks = ["arithmetic"]
lr = 1e-5
steps = 50

[[stage]]
kind = "rl"
name = "zero"
from = "sft"
tasks = ["arithmetic"]
rollouts = 9
lr = 1e-6
"""
