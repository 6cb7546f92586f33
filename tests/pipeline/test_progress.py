"""Estimates of the time left, with a clock that the test advances."""

import io
import re

import rl_stage

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
    # so far: 20 + 12 + 48 seconds against an estimate of 110; the third stage was estimated at 50, and a quarter of the
    # whole estimate, 40, says that the estimates are right
    assert abs(progress.run_left("two", 12.0, 48.0) - (48 + 50 * 120 / 150)) < 1e-9
    line = out.getvalue()
    assert re.search(r"\[2/3 two\]\s+52% 52/100 steps · loss \[red\]3.2 · 48s left · run 1m 28s left", line), line


def test_the_run_s_time_stands_in_the_first_line():
    """Before a stage has done anything its estimate counts, and reading texts says nothing about training."""
    clock, out = Clock(), io.StringIO()
    progress = RunProgress({"corpus": 60.0, "train": 100.0, "rl": 40.0}, out, clock)
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
    assert train.left() == 0.5 * 20 * 900 / 100 + 0.5 * 80
    clock.now += 20
    train.advance(100)
    assert train.left() == 40 * 800 / 200


def test_an_estimate_for_what_is_left_of_an_interrupted_stage():
    clock = Clock()
    stage = RunProgress({"one": 100.0}, io.StringIO(), clock).begin("one")
    stage.total(100, "steps", done=60)
    clock.now += 5
    assert stage.left() == 35.0


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


def test_rl_counts_rollouts_and_says_which_accuracy_is_which(tmp_path, capsys):
    stage = rl_stage.Stage(rl_stage.write_base(tmp_path / "base"), tmp_path / "run", "rollouts=2", "heldout.every=1")
    run = stage.run()
    said = [line for line in capsys.readouterr().err.splitlines() if "held-out" in line]
    begins = [f"rollout {n} of 2, step {2 * n}: held-out (2 problems x 4)" for n in range(3)]
    assert len(said) == 3 and all(line.startswith(begin) for line, begin in zip(said, begins, strict=True)), said
    assert run.summary.keys() == {"steps", "last_rollout_accuracy", "heldout_accuracy"}


def test_what_all_stages_compute_in_is_said_once(tmp_path, capsys):
    out = io.StringIO()
    progress = RunProgress({"one": 1.0, "two": 1.0}, out)
    for name in ("one", "two"):
        context = rl_stage.StageContext(name, tmp_path, {}, None, None, tmp_path, None, progress.begin(name), None)
        context.say_once("compute in float32")
        context.say(f"the weights of {name}")
    assert out.getvalue().splitlines() == ["compute in float32", "the weights of one", "the weights of two"]
