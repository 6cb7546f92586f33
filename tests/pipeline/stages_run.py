"""The real stages at the smallest size that still learns: after 8 seconds every second answer is well-formed.

`killed` runs the recipe and has SIGKILL, which no handler can catch, end it in the middle of a stage.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch

from bessemer.config.recipe import Recipe
from bessemer.pipeline import runner
from bessemer.runs.metrics import StageMetrics

torch.set_num_threads(1)

RECIPE = """
name = "small"
seed = 7
[model]
preset = "tiny"
vocab_size = 512
dim = 32
n_layers = 2
inter_dim = 64
moe_inter_dim = 16
n_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 8
n_activated_experts = 2
max_seq_len = 192
init_std = 0.08

[[stage]]
kind = "corpus"
row_length = 64
vocab_sample = 20000
[stage.parts]
english = "{text}"
countdown = "task:countdown"
arithmetic = "task:arithmetic"
[stage.limits]
countdown = "6K"
arithmetic = "50K"

[[stage]]
kind = "pretrain"
tokens = "80K"
lr = [["0", 0.0], ["5K", 1e-2], ["60K", 1e-2], ["80K", 2e-3]]
batch_rows = 8
micro_rows = 4
compile = "off"
precision = "float32"
prompts = ["a fox"]
first_sample = "10K"
sample_every = "40K"
validate_every = "40K"
save_seconds = 0.3
[stage.mixture]
english = 0.1
countdown = 0.05
arithmetic = 0.85

[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
rollouts = 3
prompts_per_rollout = 3
samples = 6
updates_per_rollout = 2
lr = 3e-3
kl.reference_every = 3
max_new_tokens = 40
heldout.minimum_pass = 0.0
heldout.problems = 6
heldout.every = 2
micro_tokens = 600
save_seconds = 0

[[stage]]
kind = "eval"
models = ["pretrain", "zero"]
tasks = ["arithmetic"]
problems = 4
samples = 4
max_new_tokens = 40
"""


def write_recipe(folder: Path) -> Path:
    """Write the recipe and its text: 300 documents of four sentences."""
    draw = random.Random(0)
    parts = [
        ("a fox", "a crow", "an old man", "the king"),
        ("saw", "found", "lost"),
        ("a ring", "the moon", "his bread"),
    ]
    texts = [" ".join(" ".join(map(draw.choice, parts)) + "." for _ in range(4)) for _ in range(300)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "small.toml").write_text(RECIPE.format(text=folder / "text.jsonl"))
    return folder / "small.toml"


def run(recipe: Path, out: Path, *overrides: str) -> dict[str, runner.StageResult]:
    results = runner.run(Recipe.load(recipe, overrides), out)
    return {result.name: result for result in results}


def copy_without(run: Path, out: Path, *stages: str) -> Path:
    """Copy a finished run as if these stages had never begun."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(*stages))
    names = {stage.partition("-")[2] for stage in stages}
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["stage"] not in names))
    return out


def send_at(number: int, stage: str, step: int):
    """A StageMetrics.write that signals this process once `stage` has written the line of `step`."""
    write = StageMetrics.write

    def deadly(self, at, tokens, values):
        write(self, at, tokens, values)
        if (self._stage, at) == (stage, step):
            os.kill(os.getpid(), number)

    return deadly


def killed(recipe: Path, out: Path, stage: str, step: int, seconds: float = 120) -> None:
    """Run the recipe in a new process that dies once `stage` has written the metrics of `step` and nothing after them.
    It is no fork of the test process: whole runs use libraries whose threads do not survive a fork."""
    command = [sys.executable, __file__, str(recipe), str(out), stage, str(step)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == -signal.SIGKILL, done.stderr


if __name__ == "__main__":
    StageMetrics.write = send_at(signal.SIGKILL, sys.argv[3], int(sys.argv[4]))
    run(Path(sys.argv[1]), Path(sys.argv[2]))
