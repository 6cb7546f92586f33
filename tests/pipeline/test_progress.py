"""Estimates of the time left, with a clock that the test advances."""

import io
import re

from bessemer.runs.progress import RunProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_time_left_of_stage_and_run():
    clock, out = Clock(), io.StringIO()
    progress = RunProgress({"one": 10.0, "two": 100.0, "three": 50.0}, out, clock)
    progress.begin("one")
    progress.end("one", 20.0)  # twice the estimate
    stage = progress.begin("two")
    stage.total(100, "steps", done=40)  # an earlier attempt did 40
    clock.now += 12
    stage.advance(12, "loss [red]3.2")
    assert stage.left() == 48.0  # one step a second, 48 to go
    # so far: 20 + 12 + 48 seconds against an estimate of 110; the third stage was estimated at 50
    assert abs(progress.run_left("two", 12.0, 48.0) - (48 + 50 * 80 / 110)) < 1e-9
    line = out.getvalue()
    assert re.search(r"\[2/3 two\]\s+52% 52/100 steps · loss \[red\]3.2 · 48s left · run 1m 24s left", line), line


def test_a_log_gets_a_line_every_ten_seconds_and_no_control_codes():
    clock, out = Clock(), io.StringIO()
    stage = RunProgress({"one": 1.0}, out, clock).begin("one")
    stage.total(600, "steps")
    for _ in range(600):
        clock.now += 0.1
        stage.advance()
    assert len(out.getvalue().splitlines()) in (5, 6) and "\x1b" not in out.getvalue()


def test_a_stage_that_knows_no_total_shows_no_time():
    clock, out = Clock(), io.StringIO()
    stage = RunProgress({"one": 1.0}, out, clock).begin("one")
    clock.now += 11
    stage.advance(1, "reading")
    assert "left" not in out.getvalue() and "reading" in out.getvalue()


def test_bars_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock, out = Clock(), Terminal()
    progress = RunProgress({"one": 1.0}, out, clock)
    stage = progress.begin("one")
    stage.total(10)
    clock.now += 5
    stage.advance(5, "half")
    progress._bars.refresh()
    progress.end("one", 5.0)
    assert "50% 5/10 steps · half · 5.0s left" in out.getvalue() and "whole run" in out.getvalue()


def test_stages_after_the_last_that_is_asked_for_are_not_waited_for():
    progress = RunProgress({"one": 10.0, "two": 100.0, "three": 50.0}, io.StringIO(), Clock(), until="two")
    assert progress.run_left("one", 10.0, 0.0) == 100.0
    progress.end("one", 10.0)
    assert progress.run_left("two", 0.0, 30.0) == 30.0
