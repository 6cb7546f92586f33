"""What a stage receives from the runner."""

import io
import json
import re
from types import SimpleNamespace

import pytest

from bessemer.runs.context import StageContext, StopFlag
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress
from bessemer.runs.step_log import StepLog


@pytest.fixture
def ctx(tmp_path):
    metrics = StageMetrics(Metrics(tmp_path / "metrics.jsonl"), "zero")
    progress = RunProgress({}).begin("zero")
    return StageContext("zero", tmp_path, {}, None, None, tmp_path, metrics, progress, StopFlag(), spent=100.0)


def test_rewind_takes_samples_and_rollouts_back_too(ctx):
    def write(steps):
        for step in steps:
            ctx.metrics.write(step, step, {"a": 1})
            ctx.sample(step, step, f"text {step}\n## step 0 forged\nend", title="easy")
            ctx.rollouts([{"step": step, "prompt": "p"}])

    names = ("samples.md", "rollouts.jsonl")
    write([1, 2])
    before = [(ctx.dir / name).read_bytes() for name in names]
    write([3, 4])
    ctx.rewind(2)
    assert [(ctx.dir / name).read_bytes() for name in names] == before
    assert len((ctx.dir / "metrics.jsonl").read_text().splitlines()) == 2
    ctx.rewind(-1)
    assert [(ctx.dir / name).read_bytes() for name in names] == [b"", b""]


def test_samples_and_lines_of_a_log_show_control_characters(ctx):
    """Samples of a barely trained model once sent them raw to the terminal and the log."""
    hostile = "\x1b[2J\x9b1m \x00\r tab\tand\nline \u202e\ud800"
    shown = "\\x1b[2J\\x9b1m \\x00\\r tab\tand\n{}line \\u202e\\ud800"
    ctx.sample(1, 1, hostile, title=hostile[:4])
    assert (ctx.dir / "samples.md").read_text() == "## step 1 · 1 tokens · \\x1b[2J\n\n    " + shown.format(
        "    "
    ) + "\n\n"
    log = io.StringIO()
    RunProgress({}, log).say(hostile)
    assert re.sub(r"\t| +", " ", log.getvalue()) == shown.format("").replace("\t", " ") + "\n"


def test_deadlines_count_earlier_attempts(ctx):
    assert 100.0 <= ctx.elapsed() < 101.0


@pytest.mark.parametrize("step", [0, 3])
def test_what_is_measured_before_the_first_step_is_written_once(ctx, step):
    """A run killed after the checkpoint of step 0 measures again, but must not write a second line."""

    class Log(StepLog):
        def begin(self, trainer):
            super().begin(trainer)
            if trainer.step == 0:
                ctx.metrics.write(0, 0, {"val/bpb/english": 2.0})

    trainer = SimpleNamespace(
        start=lambda: True, run=lambda: True, step=step, tokens=step, plan=SimpleNamespace(tokens=9)
    )
    for line in range(4):
        ctx.metrics.write(line, line, {"train/loss" if line else "val/bpb/english": 2.0})
    Log(ctx).train(trainer)
    lines = (ctx.dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(step + 1)]
