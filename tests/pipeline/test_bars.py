"""Estimates of the time left, with a clock that the test advances."""

import io
import json
import re
from itertools import pairwise

import pytest

from bessemer.addons.watch.bars import PLAN, TimedProgress
from bessemer.addons.watch.expected import Expected, ExpectedTime

CAUSES = {"machine": 0.1, "training": 0.1, "sampling": 0.3, "texts": 0.5}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Run:
    """A run whose stages are made of one kind of work each."""

    def __init__(self, root, **stages):
        """`stages`: name -> (seconds, kind, further keys of its time)."""
        self.clock, self.out = Clock(), io.StringIO()
        self.progress = TimedProgress(dict.fromkeys(stages, 0.0), self.out, self.clock)
        times = {name: ExpectedTime(each[0], {each[1]: 1.0}, 0.04, *each[2:]) for name, each in stages.items()}
        self.progress.expect(Expected(times, tuple(times), CAUSES), root)

    def begin(self, name, work=0, done=0):
        stage = self.progress.begin(name)
        if work:
            stage.total(work, "steps", done=done)
        return stage

    def step(self, stage, seconds, work=1, **keys):
        self.clock.now += seconds
        stage.advance(work, **keys)
        return self.left(stage)

    def left(self, stage):
        """Seconds left of the stage and of the run."""
        seconds = self.progress.left(stage)
        return seconds, self.progress.run_left(stage, seconds)


def test_the_first_line_gives_the_run_s_time(tmp_path):
    """Before a stage has done anything its estimate counts, and texts say little about training."""
    run = Run(tmp_path, corpus=(60.0, "texts"), train=(100.0, "training"), rl=(40.0, "sampling"))
    stage = run.begin("corpus")
    run.clock.now += 11
    stage.advance(0, "reading [red]")
    assert "reading [red] · 49s left · run 3m 09s left" in run.out.getvalue()
    run.progress.end("corpus", 11.0)
    train = run.begin("train", 1000)
    run.clock.now += 11
    train.advance(0)
    line = run.out.getvalue().splitlines()[-1]
    assert re.search(r"\[2/3 train\]\s+0% 0/1K steps · 1m 2\ds left · run \dm \d+s left", line), line
    assert run.left(train)[1] == pytest.approx(129, rel=0.1)


def test_a_stage_goes_over_from_the_plan_to_its_own_speed(tmp_path):
    run = Run(tmp_path, train=(100.0, "training"))
    stage = run.begin("train", 100)
    lefts = [run.step(stage, 2.0)[0] for _ in range(60)]  # twice as long as planned
    assert 99 <= lefts[0] < 120 < lefts[9] < 180, "two seconds say little, twenty much"
    assert lefts[-1] == pytest.approx(80, rel=0.03)
    assert all(after - before < 20 for before, after in pairwise(lefts)), "no jump"


def test_other_work_on_the_machine_is_followed_within_a_minute(tmp_path):
    run = Run(tmp_path, train=(1000.0, "training"), rl=(500.0, "sampling"))
    stage = run.begin("train", 1000)
    for _ in range(400):
        left = run.step(stage, 1.0)
    assert left == (pytest.approx(600, rel=0.02), pytest.approx(1100, rel=0.02))
    for _ in range(30):
        left = run.step(stage, 2.0)
    assert left == (pytest.approx(2 * 570, rel=0.1), pytest.approx(2 * 1070, rel=0.15))
    for _ in range(60):
        left = run.step(stage, 1.0)
    assert left == (pytest.approx(510, rel=0.1), pytest.approx(1010, rel=0.15)), "and when it has gone"


def test_a_pause_for_validation_is_no_change_of_speed(tmp_path):
    run = Run(tmp_path, train=(1000.0, "training"))
    stage = run.begin("train", 1000)
    for _ in range(300):
        before, _ = run.step(stage, 1.0)
    after, _ = run.step(stage, 30.0)
    assert after == pytest.approx(before, rel=0.2)


def test_answers_that_grow_are_expected_to(tmp_path):
    """Rollouts of an untrained policy are short; the cap says how long they will be. Then they are short for good."""
    caps = (50.0,) * 20 + (100.0,) * 20
    run = Run(tmp_path, zero=(400.0, "sampling", caps, 25.0))  # 40 * 25 + 3,000 tokens: ten a second
    stage = run.begin("zero", 40)
    for length in (10, 15, 20, 30, 40):
        left, _ = run.step(stage, (length + 25) / 10, cost=length)
    assert left == pytest.approx((15 * 75 + 20 * 125) / 10, rel=0.2), "not five times what five have taken"
    for _ in range(15):
        left, _ = run.step(stage, 6.5, cost=40)
    assert left == pytest.approx(20 * 10.5, rel=0.1)
    lefts = [run.step(stage, 7.5, cost=50)[0] for _ in range(12)]
    assert lefts[-1] == pytest.approx(8 * 7.5, rel=0.2), "the limit of length rose, the answers did not"


def test_what_a_stage_has_shown_corrects_those_of_its_kind(tmp_path):
    run = Run(tmp_path, one=(100.0, "sampling"), other=(100.0, "training"), two=(100.0, "sampling"))
    stage = run.begin("one", 10)
    run.clock.now += 150
    run.progress.end("one", 150.0)
    stage = run.begin("other")
    assert run.progress.left(stage) == pytest.approx(104, abs=3), "training is another matter"
    assert run.left(stage)[1] == pytest.approx(104 + 145, abs=6)


def test_an_estimate_for_what_is_left_of_an_interrupted_stage(tmp_path):
    run = Run(tmp_path, one=(100.0, "training"))
    stage = run.begin("one", 100, done=60)
    run.clock.now += 5
    assert run.progress.left(stage) == pytest.approx(35)


def test_only_a_stage_that_this_call_ran_whole_is_learnt_from(tmp_path):
    run, learnt = Run(tmp_path, one=(100.0, "training")), []
    times = {name: ExpectedTime(10.0) for name in ("skipped", "resumed", "whole")}
    run.progress.expect(Expected(times, tuple(times), CAUSES, lambda *of: learnt.append(of)), tmp_path)
    run.progress.end("skipped", 12.0)
    for name, seconds in (("resumed", 50.0), ("whole", 8.0)):
        run.begin(name)
        run.clock.now += 8
        run.progress.end(name, seconds)
    assert [of[:2] for of in learnt] == [("whole", 8.0)]


def test_the_time_left_is_kept_for_the_live_page(tmp_path):
    (tmp_path / PLAN).write_text(json.dumps({"seconds": {"one": 100.0}}))
    run = Run(tmp_path, one=(100.0, "training"))
    stage = run.begin("one", 100)
    for _ in range(15):
        run.step(stage, 1.0)
    plan = json.loads((tmp_path / PLAN).read_text())
    assert plan["seconds"] == {"one": 100.0} and plan["left"]["seconds"] == pytest.approx(90, abs=1)


def test_weights_of_another_unit_become_seconds():
    """A build of data knows seconds per megabyte and no megabytes."""
    clock = Clock()
    progress = TimedProgress({"one": 1.0, "two": 2.0}, io.StringIO(), clock)
    progress.begin("one")
    clock.now += 80
    progress.end("one", 80.0)
    assert progress.left(progress.begin("two")) == pytest.approx(160, rel=0.2)


def test_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, out = Clock(), Terminal()
    progress = TimedProgress({"one": 10.0}, out, clock)
    stage = progress.begin("one")
    stage.total(10)
    clock.now += 5
    stage.advance(5, "half")
    progress._bars.refresh()
    progress.end("one", 5.0)
    assert "50% 5/10 steps · half · 5.0s left" in out.getvalue() and "whole run" in out.getvalue()


def test_stages_after_the_last_that_is_asked_for_are_not_waited_for():
    progress = TimedProgress({"one": 10.0, "two": 100.0, "three": 50.0}, io.StringIO(), Clock(), until="two")
    assert progress.run_left(progress.begin("one"), 0.0) == pytest.approx(100.0)
    progress.end("one", 10.0)
    assert progress.run_left(progress.begin("two"), 30.0) == 30.0
