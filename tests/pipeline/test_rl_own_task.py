"""RL on one's own task as docs/tasks.md shows it: the page's two files are written and run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import rl_stage

import bessemer

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
BLOCKS = {name: text for text, name in re.findall(r"```\w+\n(# (double\.\w+).*?)```", PAGE, re.DOTALL)}
SMALL = (
    "rollouts=2",
    "prompts_per_rollout=4",
    "samples=4",
    "max_new_tokens=16",
    "heldout.every=2",
    "heldout.problems=8",
)


def bessemer_run(folder, base, out, *changes):
    settings = [f"import.model={base / 'model'}", *(f"rl.{one}" for one in (*SMALL, *changes))]
    command = [sys.executable, "-m", "bessemer", "run", "double.toml", "--out", str(out)]
    command += [word for setting in settings for word in ("--set", setting)]
    surroundings = os.environ | {"PYTHONPATH": str(Path(bessemer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, env=surroundings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for name, text in BLOCKS.items():
        (folder / name).write_text(text)
    base = rl_stage.write_base(folder / "base")
    done = bessemer_run(folder, base, folder / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, base, done.stderr + done.stdout


def test_it_takes_fifteen_lines():
    lines = [line for text in BLOCKS.values() for line in text.splitlines()]
    assert set(BLOCKS) == {"double.py", "double.toml"}
    assert sum(bool(line.strip()) and not line.startswith("#") for line in lines) <= 15


def test_the_page_s_files_run_and_show_the_reward(run):
    folder, _, output = run
    values = [json.loads(line)["values"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {
        name: [one[name] for one in values if name in one] for name in ("rl/reward", "rl/score", "rl/heldout_reward")
    }
    assert {name: len(one) for name, one in found.items()} == {"rl/reward": 2, "rl/score": 2, "rl/heldout_reward": 2}
    assert "reward 0." in output and "your own code" in output and "of difficulty" not in output
    lines = [json.loads(line) for line in (folder / "run" / "02-rl" / "rollouts.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} <= {f"What is 2 * {n}?" for n in range(1, 40, 2)}
    assert (folder / "run" / "02-rl" / "model" / "model.safetensors").is_file()


def test_without_the_smoke_setting_the_gate_names_it(run, tmp_path):
    folder, base, _ = run
    done = bessemer_run(folder, base, tmp_path / "run", "heldout.minimum_pass=0.02")
    assert done.returncode == 2 and "heldout.minimum_pass = 0" in done.stderr and "different rewards" in done.stderr
