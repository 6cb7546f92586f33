"""New rules ring on a history made for them and not on healthy ones; causes stand before what follows from them."""

import json
import math
import random

import pytest

from bessemer.addons.diagnose.alarms import RULES, AlarmTracker
from bessemer.addons.diagnose.causes import EXPLAINED_BY, SETUP, ordered
from bessemer.addons.diagnose.diagnosis import diagnose
from bessemer.addons.diagnose.names import ADVICE, MEANING, PLAIN, TRAINERS


def alarms_of(records=60, /, **columns):
    """The alarms at the end of a run whose metrics are functions of the record's number."""
    tracker = AlarmTracker()
    for n in range(records):
        tracker.add(n, {name: make(n) for name, make in columns.items()})
    return [alarm.code for alarm in tracker.active]


def constant(value):
    return lambda n: value


NOISE = [random.Random(5).gauss(0, 1) for _ in range(200)]


@pytest.mark.parametrize(
    ("code", "columns"),
    [
        ("learning-rate-zero", {"lr": constant(0.0)}),
        ("frozen-reference", {"kl": constant(0.0), "grad_norm": constant(0.3), "lr": constant(1e-6)}),
        ("wrong-kl-sign", {"kl_weight": constant(-0.01)}),
        ("wrong-kl-sign", {"kl": lambda n: 2.7e-4 * n**2, "loss": lambda n: -2e-5 * n**2 + 0.01 * NOISE[n]}),
        ("negative-kl", {"kl": lambda n: -0.02 + 0.001 * NOISE[n]}),
        ("not-finite", {"loss": lambda n: 0.1 if n < 50 else math.nan}),
        ("not-finite", {"grad_norm": lambda n: 0.1 if n < 57 else math.inf}),
        ("steps-too-large", {"clip_share": lambda n: 0.02 if n < 40 else 0.6}),
        ("steps-too-large", {"grad_norm": lambda n: 1.0 if n < 40 else 4000.0}),
        ("sampler-mismatch", {"sampler_kl": lambda n: 0.001 if n < 40 else 0.4}),
        ("no-contrast", {"dead_groups": constant(1.0)}),
        ("no-contrast", {"reward_std": constant(0.0), "reward": constant(0.0)}),
        ("length-collapse", {"length": lambda n: 200 - 3 * n, "reward": constant(0.3), "reward_std": constant(0.4)}),
        ("collapse", {"reward": lambda n: 1.2 if n < 40 else 0.3, "reward_std": constant(0.5)}),
        ("never-ending", {"truncated": constant(0.9)}),
    ],
)
def test_each_rings_alone_without_accuracy(code, columns):
    assert alarms_of(**columns) == [code]


@pytest.mark.parametrize(
    "columns",
    [
        {"lr": lambda n: 1e-6 * max(0, n - 3)},  # warm-up
        {"kl": lambda n: 1e-5 * n, "grad_norm": constant(0.3), "lr": constant(1e-6)},  # far from anything, and moving
        {"kl": constant(0.0), "grad_norm": constant(0.0), "lr": constant(1e-6)},  # dead groups: nothing moves
        {"kl": lambda n: 2.7e-4 * n**2, "loss": lambda n: 2e-5 * n**2 + 0.01 * NOISE[n]},
        {"kl": lambda n: 0.015 * n, "loss": lambda n: 0.02 * NOISE[n]},  # the loss is the policy's part
        {"kl": lambda n: 2e-3 * n, "loss": lambda n: -0.01 - 1e-3 * n},  # right answers are the longer ones
        {"kl": lambda n: 0.002 * NOISE[n]},  # an unbiased estimate scatters around 0
        {"kl": lambda n: 0.01 if n % 5 == 0 else -0.02},  # low, and not always below 0
        {"loss": lambda n: math.nan if n % 10 == 3 else 0.1},  # skipped steps
        {"grad_norm": lambda n: 0.001 if n < 10 else 2.0},  # the first groups had no contrast
        {"length": lambda n: 200 - 3 * n, "reward": lambda n: 0.01 * n, "reward_std": constant(0.4)},
        {"reward": lambda n: 0.5 + 0.2 * NOISE[n], "reward_std": constant(0.5)},
        {"dead_groups": lambda n: float(n % 2)},  # one group a record
    ],
)
def test_what_is_no_fault(columns):
    assert alarms_of(**columns) == []


def test_causes_stand_before_what_follows():
    assert [code for code, _ in ordered([("collapse", 40, False), ("steps-too-large", 44, False)])] == [
        "steps-too-large", "collapse"
    ]  # fmt: skip
    assert ordered([("length-collapse", 20, False), ("wrong-kl-sign", 30, False)]) == [
        ("wrong-kl-sign", []), ("length-collapse", ["wrong-kl-sign"])
    ]  # fmt: skip
    # all groups dead from the start cannot follow from anything; later it may
    for since, first in ((5, "groups-too-hard"), (25, "entropy-collapse")):
        rung = [("groups-too-hard", since, since == 5), ("entropy-collapse", 30, False)]
        assert ordered(rung)[0][0] == first
    assert ordered([("never-ending", 5, True), ("sampler-mismatch", 30, False)])[0][0] == "sampler-mismatch"
    # cut answers are all wrong, so their groups are dead
    both = [("groups-too-hard", 5, True), ("never-ending", 5, True)]
    assert [code for code, _ in ordered(both)] == ["never-ending", "groups-too-hard"]
    for codes in (SETUP, EXPLAINED_BY):
        everything = [(code, n, False) for n, code in enumerate(sorted({*codes, *EXPLAINED_BY}))]
        assert sorted(code for code, _ in ordered(everything)) == sorted(code for code, *_ in everything)


def test_the_tables_agree():
    codes = {code for rule in RULES for code in rule.codes}
    assert {*EXPLAINED_BY} | {*SETUP} | {*ADVICE} <= codes
    assert {other for others in EXPLAINED_BY.values() for other in others} <= codes
    metrics = {name for rule in RULES for name in rule.needs}
    assert metrics <= MEANING.keys()
    for trainer in TRAINERS.values():
        assert {*trainer.names} <= MEANING.keys() and trainer.settings.keys() <= PLAIN.keys()
    for text in ADVICE.values():
        text.format_map(PLAIN)


def test_an_alarm_that_no_longer_holds_is_history(tmp_path):
    def log(entropies):
        lines = (
            json.dumps({"step": n, "data": {"actor/entropy": value, "actor/lr": 1e-6}})
            for n, value in enumerate(entropies)
        )
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        (run,) = diagnose(tmp_path / "a.jsonl").runs
        return run

    run = log([0.5] * 20 + [0.001] * 20 + [0.5] * 20)
    assert run.findings == [] and [code for code, *_ in run.earlier] == ["entropy-collapse"]
    assert [(each.code, each.since) for each in log([0.5] * 20 + [0.001] * 20).findings] == [("entropy-collapse", 24)]
