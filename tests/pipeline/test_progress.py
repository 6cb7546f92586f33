"""Signs of progress, with a clock that the test advances."""

import io

import rl_stage

from bessemer.runs.progress import RunProgress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_a_line_every_ten_seconds_and_no_control_codes():
    clock, out = Clock(), io.StringIO()
    stage = RunProgress({"one": 1.0}, out, clock).begin("one")
    stage.total(600, "steps")
    for _ in range(600):
        clock.now += 0.1
        stage.advance()
    assert len(out.getvalue().splitlines()) in (5, 6) and "\x1b" not in out.getvalue()


def test_the_time_left_follows_the_speed_of_this_attempt():
    clock, out = Clock(), io.StringIO()
    stage = RunProgress({"one": 0.0, "two": 0.0}, out, clock).begin("two")
    stage.total(100, "steps", done=40)
    clock.now += 12
    stage.advance(12, "loss [red]3.2")
    assert out.getvalue() == "[2/2 two]  52% 52/100 steps · loss [red]3.2 · 48s left\n"


def test_a_stage_that_knows_no_total_shows_no_time():
    clock, out = Clock(), io.StringIO()
    stage = RunProgress({"one": 1.0}, out, clock).begin("one")
    clock.now += 11
    stage.advance(1, "reading")
    assert "left" not in out.getvalue() and "reading" in out.getvalue()


def test_rl_counts_rollouts_and_says_which_accuracy_is_which(tmp_path, capsys):
    stage = rl_stage.Stage(rl_stage.write_base(tmp_path / "base"), tmp_path / "run", "rollouts=2", "heldout.every=1")
    run = stage.run()
    output = [line for line in capsys.readouterr().err.splitlines() if "held-out" in line]
    begins = [f"rollout {n} of 2, step {2 * n}: held-out (2 problems x 4)" for n in range(3)]
    assert len(output) == 3 and all(line.startswith(begin) for line, begin in zip(output, begins, strict=True)), output
    assert run.summary.keys() == {"steps", "last_rollout_accuracy", "heldout_accuracy"}


def test_the_compute_dtype_of_all_stages_is_printed_once(tmp_path, capsys):
    out = io.StringIO()
    progress = RunProgress({"one": 1.0, "two": 1.0}, out)
    for name in ("one", "two"):
        context = rl_stage.StageContext(name, tmp_path, {}, None, None, tmp_path, None, progress.begin(name), None)
        context.say_once("compute in float32")
        context.say(f"the weights of {name}")
    assert out.getvalue().splitlines() == ["compute in float32", "the weights of one", "the weights of two"]
