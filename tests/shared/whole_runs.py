"""`bessemer run` in a process of its own, as a user starts it; what its recipes share, and its curves."""

import json
import os
import signal
import subprocess
import sys

import pytest

IMPORTED = """
name = "imported"
seed = 3
[[stage]]
kind = "import"
name = "base"
model = "{base}"
style = "zero"
"""
"""The beginning of a recipe; `base` is a model directory."""
GRPO = """
[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
precision = "float32"
prompt_template = "model"
rollouts = 3
prompts_per_rollout = 4
samples = 4
lr = 1e-2
heldout = {{ every = 9, problems = 2, minimum_pass = 0.0 }}
"""
"""A stage of three rollouts; `max_new_tokens` follows."""
VARIED = """
def varied(problem, answer, verdict):
    return float(sum(map(ord, answer)) % 3)
"""
"""A random model is never right; GRPO needs rewards that differ."""


def start(recipe, out, *more, output=subprocess.PIPE, **environment):
    """The process, which leads a session. `output` gets both of its streams."""
    command = [sys.executable, "-m", "bessemer", "run", str(recipe), "--out", str(out), *map(str, more)]
    own = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.Popen(
        command, env=own, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )  # fmt: skip


def run(recipe, out, *more, seconds=900, **environment):
    """(exit status, output); the whole session is killed after so many seconds."""
    process = start(recipe, out, *more, **environment)
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def figures(out, stage, key):
    """A stage's metric by step; no step may occur twice."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    own = [(line["step"], line["values"][key]) for line in lines if line["stage"] == stage and key in line["values"]]
    assert len(dict(own)) == len(own), "a step is there twice"
    return dict(own)


def same_curve(mine, wanted, rel=2e-3, abs=1e-6):
    """Equal up to rounding, which depends on the order of sums; a lost or repeated batch would exceed that at once."""
    assert wanted and mine.keys() == wanted.keys()
    for step, value in wanted.items():
        assert mine[step] == pytest.approx(value, rel=rel, abs=abs), step


def write_talks(path, count):
    """A file of conversations that add 1."""
    turns = ((f"{n} + 1 =", str(n + 1)) for n in range(count))
    talks = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
