"""The interval of a predicted time."""

import json
import math
import random
from pathlib import Path

import pytest

from bessemer.addons.plan import record
from bessemer.addons.plan.estimate import LocalEstimate
from bessemer.addons.watch.expected import Expected, ExpectedTime

RECIPES = Path(__file__).parents[2] / "recipes"


def test_nine_of_ten_next_runs_are_inside():
    draw, inside = random.Random(3), 0
    for _ in range(600):
        *ratios, last = (draw.lognormvariate(0.2, 0.4) for _ in range(9))
        interval = record.next_ratio(ratios)
        inside += interval.low <= last <= interval.high
    assert inside / 600 == pytest.approx(0.9, abs=0.03)


CAUSES = {"machine": 0.1, "training": 0.1, "sampling": 0.4}


def times(**kinds):
    return Expected(
        {name: ExpectedTime(100.0, {kind: 1.0}, 0.05) for name, kind in kinds.items()}, tuple(kinds), CAUSES
    )


def test_a_run_s_own_stages_come_first():
    """What one took corrects the others, those of its kind most, and narrows their interval."""
    expected = times(a="sampling", b="sampling", c="training")
    factors = expected.factors({"a": (1.5, 0.0)})
    assert 1.4 < factors["b"] < 1.5 and 1 < factors["c"] < 1.1
    assert expected.factors({}) == dict.fromkeys("abc", 1.0)
    unsure = expected.factors({"a": (1.5, 1.0)})
    assert 1 < unsure["b"] < factors["b"]
    before, after = expected.interval(["b"]), expected.interval(["b"], {"a": (1.5, 0.0)})
    assert after.high / after.low < 0.6 * before.high / before.low
    assert after.low < 150 < after.high


def test_an_interval_of_a_run_holds_nine_of_ten():
    """Times drawn as the model has them: causes that stages share, and a factor of each."""
    expected, draw, inside = times(a="training", b="sampling", c="sampling"), random.Random(5), 0
    interval = expected.interval()
    for _ in range(2000):
        causes = {cause: draw.gauss(0, spread) for cause, spread in CAUSES.items()}
        took = 0.0
        for time in expected.stages.values():
            shared = causes["machine"] + sum(share * causes[kind] for kind, share in time.parts.items())
            took += time.seconds * math.exp(shared + draw.gauss(0, time.spread))
        inside += interval.low <= took <= interval.high
    assert inside / 2000 == pytest.approx(0.9, abs=0.04)
    assert interval.likely == 300 and expected.interval([]).high == 0


def test_work_beside_the_measurement_widens_the_interval():
    quiet, busy = record.spreads(), record.spreads(0.5)
    assert busy["machine"] > 0.25 > quiet["machine"] and busy["training"] == quiet["training"]


def test_every_time_of_a_local_estimate_has_an_interval():
    estimate = LocalEstimate(times(base="training", zero="training"), {}, {"base": 130.0}, ())
    facts = estimate.facts()
    rows = {row["stage"]: row["interval_seconds"] for row in facts["stages"]}
    assert rows["zero"]["low"] < rows["zero"]["likely"] < rows["zero"]["high"]
    assert 115 < rows["zero"]["likely"] < 130 and facts["interval_seconds_left"] == rows["zero"]
    assert "1 finished stages of this run" in estimate.describe()


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
