"""Alarms: each rings on a history made for it and no other; healthy runs stay silent, as does the documented one."""

import json
import math
import random

import pytest

from bessemer.addons.diagnose.alarms import AlarmTracker
from bessemer.addons.diagnose.history import WINDOW, MetricTrack

HEALTHY = {
    "accuracy": (0.2, 0.6), "format": (0.7, 0.95), "length": (68, 131), "think_share": (0.8, 0.95),
    "language": (0.78, 0.93), "truncated": (0.02, 0.3), "entropy": (0.6, 0.3), "kl": (0.0, 0.13),
    "dead_groups": (0.3, 0.1), "sampler_gap": (1e-6, 2e-6), "clip_share": (0.01, 0.01),
}  # fmt: skip
MEASURED = {
    "accuracy": (0.285, 0.176, 0.27, 0.195, 0.309, 0.395, 0.418, 0.52, 0.625, 0.445),
    "format": (0.898, 0.902, 0.914, 0.836, 0.809, 0.824, 0.719, 0.793, 0.801, 0.676),
    "length": (66.4, 69.4, 74.7, 92.9, 100, 105, 110, 112, 112, 129),
    "think_share": (0.98, 0.98, 0.98, 0.996, 0.984, 0.996, 0.996, 0.992, 0.996, 1),
    "language": (0.817, 0.882, 0.849, 0.863, 0.834, 0.881, 0.879, 0.876, 0.915, 0.917),
    "truncated": (0.0508, 0.0547, 0.0469, 0.137, 0.145, 0.16, 0.246, 0.184, 0.188, 0.309),
    "entropy": (0.288, 0.272, 0.248, 0.238, 0.235, 0.205, 0.184, 0.183, 0.141, 0.106),
    "kl": (0, 0.000264, 0.00204, 0.00548, 0.0107, 0.0253, 0.0264, 0.0523, 0.0361, 0.0329),
    "dead_groups": (0, 0.125, 0.0625, 0.188, 0, 0, 0, 0, 0, 0.0625),
    "sampler_gap": (5.1e-07, 4.73e-07, 4.56e-07, 4.63e-07, 4.66e-07, 4.38e-07, 4.33e-07, 4.34e-07, 3.85e-07, 3.55e-07),
}
"""The first ten rollouts of the tiny recipe, seed 7."""
STUCK = {"accuracy": (0.1, 0.1), "format": (0.7, 0.7), "length": (68, 68)}  # learns nothing, and nothing is wrong


def made(rollouts=40, noise=0.0, **ends):
    """Metric tables of a run whose figures move linearly from one value to another, reached after 4/5 of the run."""
    rng = random.Random(3)
    lines = []
    for number in range(rollouts):
        share = min(1.0, number / (0.8 * (rollouts - 1)))
        values = {name: a + (b - a) * share for name, (a, b) in (HEALTHY | ends).items()}
        lines.append({f"rl/{name}": value * (1 + rng.gauss(0, noise)) for name, value in values.items()})
    return lines


def active(history):
    """The alarms at the end of a history of tables."""
    return AlarmTracker(enumerate(history)).active


def codes(history):
    return [alarm.code for alarm in active(history)]


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        # as the log reports for the first documents: format .88 -> .99, accuracy .06 -> .04
        ("format-hacking", {"accuracy": (0.06, 0.04), "format": (0.88, 0.99), "length": (57, 60)}),
        ("length-collapse", {**STUCK, "length": (57, 27)}),
        ("no-growth", {**STUCK, "tries": (1.0, 1.0)}),
        ("thinking-stops", {"think_share": (0.8, 0.2)}),
        ("thinking-stops", {"think_share": (0.8, 0.2), "turns": (1.2, 1.2)}),
        ("collapse", {"accuracy": (0.5, 0.05), "format": (0.9, 0.9), "truncated": (0.0, 0.0)}),
        ("entropy-collapse", {"entropy": (0.5, 0.001)}),
        ("entropy-explosion", {"entropy": (0.5, 3.0)}),
        ("groups-too-hard", {**STUCK, "accuracy": (0.01, 0.01), "dead_groups": (0.95, 0.95)}),
        ("groups-too-easy", {"accuracy": (0.6, 0.99), "dead_groups": (0.2, 1.0)}),
        ("never-ending", {"truncated": (0.1, 0.7)}),
        ("sampler-mismatch", {"sampler_gap": (0.01, 0.2)}),
        ("sampler-mismatch", {"sampler_gap": (0.01, 0.02), "sampler_far": (0.0, 0.03)}),
        ("kl-runaway", {"kl": (0.0, 3.0)}),
        ("language-mixing", {"language": (0.78, 0.5)}),
        ("reward-model-hacking", {"preference": (0.4, 0.8), "accuracy": (0.6, 0.5), "format": (0.9, 0.9)}),
    ],
)
def test_each_rings_alone(code, ends):
    alarms = active(made(**ends))
    assert [alarm.code for alarm in alarms] == [code]
    told = str(alarms[0])
    assert told.startswith(code.replace("-", " ") + ": ") and "Likely cause: " in told and "What to do: " in told
    assert any(digit.isdigit() for digit in alarms[0].message)


def test_a_run_that_does_not_grow_hears_what_differs_from_one_that_does():
    one_try, hard = (
        {**STUCK, "tries": (tries, tries), "dead_groups": (dead, dead)} for tries, dead in ((1, 0.3), (3, 0.7))
    )
    for ends, differs in (
        (one_try, "1.0 tries"),
        (hard, "70% of the groups"),
        ({**hard, "dead_groups": (0.3, 0.3)}, "steps"),
    ):
        (alarm,) = active(made(**ends))
        assert alarm.code == "no-growth" and differs in alarm.cause
    assert "no-growth" not in codes(made(rollouts=19, **one_try))
    assert codes(made(tries=(1, 3), length=(68, 80), accuracy=(0.1, 0.1), format=(0.7, 0.7))) == []


@pytest.mark.parametrize("seed", range(3))
def test_healthy_runs_stay_silent_from_first_to_last(seed):
    for ends in (
        {},
        STUCK,
        # the probe run whose retries grew (length 10.8 -> 39.7), and the one that thinks throughout
        {"accuracy": (0.18, 0.57), "format": (0.6, 0.99), "length": (10.8, 39.7), "think_share": (0.51, 0.97),
         "language": (0.5, 0.95), "truncated": (0.0, 0.05)},
        # a shorter answer that is right more often is no collapse
        {"accuracy": (0.3, 0.8), "length": (150, 60)},
        # in search traces nearly every token is certain
        {"entropy": (0.08, 0.03)},
        # bfloat16, and a reward model that does no harm
        {"sampler_gap": (0.012, 0.012), "sampler_far": (0.002, 0.002), "preference": (0.4, 0.7)},
        # samples drawn one rollout ahead are older than the policy, which is no fault of the sampler
        {"sampler_gap": (0.1, 0.1), "sampler_far": (0.05, 0.05), "staleness": (2, 2)},
        # tool calls replaced thoughts
        {"think_share": (0.8, 0.2), "turns": (1.1, 2.0), "accuracy": (0.2, 0.9)},
        # already good at the start
        {"accuracy": (0.9, 0.93), "format": (0.9, 1.0), "dead_groups": (0.6, 0.7)},
    ):  # fmt: skip
        tracker = AlarmTracker()
        for step, values in enumerate(made(rollouts=40 + 40 * seed, noise=0.04, **ends)):
            assert tracker.add(step, values) == [], ends


def test_the_tiny_recipe_as_it_learnt_stays_silent():
    """As measured, then on to the end that docs/results.md and docs/log.md report: half solved, a third cut off."""
    tracker = AlarmTracker()
    heldout = {0: 0.211, 10: 0.398, 20: 0.434, 30: 0.492}
    for number in range(32):
        if number in heldout:
            assert tracker.add(number, {"rl/heldout_pass_at_1": heldout[number]}) == []
        values = {f"rl/{name}": column[min(number, 7 + number % 3)] for name, column in MEASURED.items()}
        if number > 9:
            values |= {"rl/truncated": 0.33, "rl/length": 131, "rl/entropy": 0.08, "rl/format": 0.69}
        assert tracker.add(number, values) == []


def test_an_alarm_is_raised_once_and_repeated_only_in_the_report():
    tracker, rung = AlarmTracker(), []
    for step, values in enumerate(made(kl=(0.0, 5.0))):
        rung += [(step, alarm.code) for alarm in tracker.add(step, values)]
    assert [code for _, code in rung] == ["kl-runaway"] and 5 < rung[0][0] < 20
    assert tracker.raised["kl-runaway"][0] == rung[0][0]
    assert [alarm.code for alarm in tracker.active] == ["kl-runaway"]
    for step in range(40, 50):
        assert tracker.add(step, {"rl/kl": 0.01}) == []
    assert tracker.active == [] and list(tracker.raised) == ["kl-runaway"]


def test_a_resumed_tracker_is_where_it_was():
    """Also through JSON, as metrics.jsonl stores the tables: non-finite values come back as null."""
    ends = {"truncated": (0.1, 0.9), "kl": (0.0, 4.0), "preference": (0.2, 0.9), "accuracy": (0.6, 0.2)}
    lines = list(enumerate(made(noise=0.1, **ends)))
    lines[7][1]["rl/kl"] = math.nan
    lines[9][1]["rl/entropy"] = math.inf
    uninterrupted = AlarmTracker()
    codes = [[alarm.code for alarm in uninterrupted.add(step, values)] for step, values in lines]
    assert sum(map(len, codes)) > 2
    for cut in (1, 8, 20, 39):
        recorded = [
            (step, {n: v if math.isfinite(v) else None for n, v in values.items()}) for step, values in lines[:cut]
        ]
        resumed = AlarmTracker(json.loads(json.dumps(recorded)))
        assert [[alarm.code for alarm in resumed.add(step, values)] for step, values in lines[cut:]] == codes[cut:]
        assert resumed.raised == uninterrupted.raised and resumed.active == uninterrupted.active


def test_too_little_is_no_reason():
    worst = {f"rl/{name}": value for name, value in {
        "accuracy": 0.0, "format": 1.0, "length": 1.0, "truncated": 1.0, "entropy": 0.0, "kl": 99.0, "dead_groups": 1.0,
        "sampler_gap": 9.0, "think_share": 0.0, "language": 0.0, "preference": 1.0,
    }.items()}  # fmt: skip
    assert codes([]) == [] and codes([worst] * (WINDOW - 1)) == []
    assert (
        codes([{}] * 50) == [] and codes([{"moe/load/1": [1.0, 2.0], "rl/accuracy": "high", "rl/kl": None}] * 50) == []
    )
    assert "never-ending" in codes([worst] * WINDOW)


def test_one_bad_rollout_is_no_alarm():
    history = made()
    history[-1] = history[-1] | {"rl/kl": 400.0, "rl/truncated": 0.9, "rl/dead_groups": 1.0}
    assert codes(history) == []


def test_the_form_may_come_before_the_task():
    """Format rises at once, accuracy later: no alarm while it is early, and none once accuracy has followed."""
    lines = [
        {"rl/accuracy": 0.1 if n < 12 else 0.1 + 0.02 * (n - 12), "rl/format": min(1.0, 0.5 + 0.1 * n)}
        for n in range(40)
    ]
    tracker = AlarmTracker()
    assert [alarm for step, values in enumerate(lines) for alarm in tracker.add(step, values)] == []
    assert codes([{**values, "rl/accuracy": 0.1} for values in lines]) == ["format-hacking"]


def test_cut_answers_matter_sooner_where_accuracy_falls():
    third = {"truncated": (0.3, 0.35), "format": (0.9, 0.9)}
    assert codes(made(accuracy=(0.5, 0.55), **third)) == []
    assert codes(made(accuracy=(0.55, 0.3), **third)) == ["never-ending"]


def test_a_reward_model_is_measured_from_where_it_joined():
    """R1 uses preference rewards only in the last part. The held-out accuracy, if any, is the one to watch."""
    before = made(rollouts=20, accuracy=(0.5, 0.7))
    late = made(rollouts=20, accuracy=(0.7, 0.7), preference=(0.4, 0.8))

    def with_held(lines, first, last):
        share = [n / (len(lines) - 1) for n in range(len(lines))]
        tables = [[line] + [{"rl/heldout_pass_at_1": first + (last - first) * s}] * (not n % 5)
                  for n, (line, s) in enumerate(zip(lines, share, strict=True))]  # fmt: skip
        return [line for table in tables for line in table]

    assert codes(before + late) == []
    assert codes(with_held(before, 0.4, 0.6) + with_held(late, 0.6, 0.62)) == []
    assert codes(with_held(before, 0.4, 0.6) + with_held(late, 0.55, 0.4)) == ["reward-model-hacking"]
    # it fell between the last evaluation before and the first one after
    assert codes(with_held(before, 0.4, 0.6) + with_held(late, 0.45, 0.45)) == ["reward-model-hacking"]
    fallen = active(before + made(rollouts=20, accuracy=(0.7, 0.55), preference=(0.4, 0.8)))
    assert [alarm.code for alarm in fallen] == ["reward-model-hacking"] and "while accuracy fell" in fallen[0].message


def test_mixing_is_judged_among_answers_that_think():
    """An answer without thoughts has a language share of 0, which does not count as mixing."""
    assert codes(made(language=(0.45, 0.48), think_share=(0.5, 0.5))) == []
    assert codes(made(language=(0.35, 0.35), think_share=(0.9, 0.9))) == ["language-mixing"]  # mixed from the start


def test_memory_does_not_grow():
    track = MetricTrack()
    for number in range(1000):
        track.add(float(number % 100))
    assert len(track.first) == len(track.recent) == WINDOW and track.count == 1000
    assert (track.start, track.now, track.peak) == (2.0, 97.0, 97.0)
    history = AlarmTracker(enumerate([{"rl/a": 1.0}, {"rl/a": 3.0}])).history
    assert history["a"].now == 2.0
