"""Estimates of the time left, with a clock that the test advances."""

import io
import re

from bessemer.addons.watch.bars import TimedProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_left_of_stage_and_run():
    clock, out = Clock(), io.StringIO()
    progress = TimedProgress({"one": 10.0, "two": 100.0, "three": 50.0}, out, clock)
    progress.begin("one")
    progress.end("one", 20.0)  # twice the estimate
    stage = progress.begin("two")
    stage.total(100, "steps", done=40)  # an earlier attempt did 40
    clock.now += 12
    stage.advance(12, "loss [red]3.2")
    assert progress.left(stage) == 48.0  # one step a second, 48 to go
    # so far: 20 + 12 + 48 seconds against an estimate of 110; the third stage was estimated at 50, and a quarter of the
    # whole estimate, 40, says that the estimates are right
    assert abs(progress.run_left("two", 12.0, 48.0) - (48 + 50 * 120 / 150)) < 1e-9
    line = out.getvalue()
    assert re.search(r"\[2/3 two\]\s+52% 52/100 steps · loss \[red\]3.2 · 48s left · run 1m 28s left", line), line


def test_the_first_line_gives_the_run_s_time():
    """Before a stage has done anything its estimate counts, and reading texts says nothing about training."""
    clock, out = Clock(), io.StringIO()
    progress = TimedProgress({"corpus": 60.0, "train": 100.0, "rl": 40.0}, out, clock)
    progress.texts = {"corpus"}
    stage = progress.begin("corpus")
    clock.now += 11
    stage.advance(0, "reading")
    assert "reading · 49s left · run 3m 09s left" in out.getvalue()
    progress.end("corpus", 11.0)
    train = progress.begin("train")
    train.total(1000, "tokens")
    clock.now += 11
    train.advance(0)
    assert "1m 29s left · run 2m 09s left" in out.getvalue()
    clock.now += 9
    train.advance(100)  # 5 tokens a second, at twice the estimated time; a tenth of the work is half trusted
    assert progress.left(train) == 0.5 * 20 * 900 / 100 + 0.5 * 80
    clock.now += 20
    train.advance(100)
    assert progress.left(train) == 40 * 800 / 200


def test_an_estimate_for_what_is_left_of_an_interrupted_stage():
    clock = Clock()
    progress = TimedProgress({"one": 100.0}, io.StringIO(), clock)
    stage = progress.begin("one")
    stage.total(100, "steps", done=60)
    clock.now += 5
    assert progress.left(stage) == 35.0


def test_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, out = Clock(), Terminal()
    progress = TimedProgress({"one": 1.0}, out, clock)
    stage = progress.begin("one")
    stage.total(10)
    clock.now += 5
    stage.advance(5, "half")
    progress._bars.refresh()
    progress.end("one", 5.0)
    assert "50% 5/10 steps · half · 5.0s left" in out.getvalue() and "whole run" in out.getvalue()


def test_stages_after_the_last_that_is_asked_for_are_not_waited_for():
    progress = TimedProgress({"one": 10.0, "two": 100.0, "three": 50.0}, io.StringIO(), Clock(), until="two")
    assert progress.run_left("one", 10.0, 0.0) == 100.0
    progress.end("one", 10.0)
    assert progress.run_left("two", 0.0, 30.0) == 30.0
