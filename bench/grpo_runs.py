"""A GRPO stage on a model directory, run by `bessemer run` in a process of its own on one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from same_run import metric_lines

RECIPE = """
name = "bench"
seed = {seed}
[[stage]]
kind = "import"
name = "base"
model = {model}
[[stage]]
kind = "rl"
name = "grpo"
precision = "float32"
prompt_template = "model"
"""
SEED = 7
KEPT = 2000
"""Characters of a failed run's output that are shown."""


def write_recipe(path: Path, model: Path, keys: str) -> Path:
    """Writes the recipe; `keys`: what the stage has beside these."""
    path.write_text(RECIPE.format(seed=SEED, model=json.dumps(str(model.resolve()))) + keys)
    return path


def run(recipe: Path, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bessemer", "run", str(recipe), "--out", str(out), *more]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=own, capture_output=True, text=True)


def fail(done: subprocess.CompletedProcess[str]) -> None:
    """Ends the bench with what the process printed."""
    sys.exit(f"{done.args}: {done.stdout[-KEPT:]}{done.stderr[-KEPT:]}")


def rollouts(out: Path) -> list[dict[str, Any]]:
    """The line of metrics of every rollout."""
    return [line for line in metric_lines(out) if "rl/reward" in line["values"]]
