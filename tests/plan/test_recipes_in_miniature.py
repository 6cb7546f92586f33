"""The recipes of models that people know, run with a tiny random model of the family and small numbers.

What differs from the recipe: the model, the tasks (one that needs no package), numbers, and the trainer's own sampler
in place of vLLM. Ranks, [layout], FSDP2, LoRA, hooks, losses and the chain of stages are the recipe's.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hf_cases import made

from bessemer.config.recipe import Recipe
from bessemer.data.tokenizer import Tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "rl": {"rollouts": 2, "prompts_per_rollout": 4, "samples": 4, "updates_per_rollout": 2, "max_new_tokens": 12,
           "micro_tokens": 256, "precision": "float32", "heldout.problems": 2, "heldout.every": 2,
           "heldout.minimum_pass": 0.0, "lr": 1e-3, "save_seconds": 0},
    "reject": {"problems": 4, "samples": 2, "max_new_tokens": 12},
    "sft": {"epochs": 1, "row_length": 256, "precision": "float32"},
    "eval": {"problems": 2, "samples": 1, "max_new_tokens": 8},
    "examples": {"examples": 32},
}  # fmt: skip
"""Kind of stage -> the keys that shrink."""
CASES = [("qwen2.5-7b-grpo", "qwen2", 2)]
VARIED = """
def varied(problem, answer, verdict):
    return float(sum(map(ord, answer)) % 3)
"""
"""A random model is never right; GRPO needs rewards that differ."""


def write_model(folder, family):
    words = Tokenizer.train(["User: Compute 3*7+6.\nAssistant: <think>21+6=27</think><answer>27</answer>"] * 8, 290)
    made(family, vocab_size=words.vocab_size, max_position_embeddings=512).save_pretrained(folder / "model")
    words.save(folder / "model")
    return folder / "model"


def miniature(folder, name, family, ranks):
    """The recipe's file with what the docstring lists changed."""
    text = (RECIPES / f"{name}.toml").read_text()
    model = write_model(folder, family)
    text = re.sub(r'(?m)^model = "(hf|package):.*"$', f'model = "{model}"', text)
    text = re.sub(r"(?m)^\[stage\.rollout\]\n(?:\w.*\n)+", "", text)
    text = re.sub(r"(?m)^(ep|dp) = \d+", lambda found: f"{found[1]} = {ranks}", text)
    text = re.sub(r"(?m)^tasks = .*$", 'tasks = ["arithmetic"]', text)
    text = re.sub(r"(?m)^reward = .*$", 'reward = "varied.py:varied"', text)
    text = re.sub(r'(?m)^(kind = "import"\n(?:name = .*\n)?)', r'\1style = "zero"\n', text)
    text = re.sub(r"(?m)^system = .*\n", "", text)
    (folder / "varied.py").write_text(VARIED)
    (folder / f"{name}.toml").write_text(text)
    stages = Recipe.load(folder / f"{name}.toml").stages
    overrides = [
        f"{stage.name}.{key}={json.dumps(value)}"
        for stage in stages for key, value in SMALL.get(stage.kind, {}).items()
    ]  # fmt: skip
    return folder / f"{name}.toml", overrides


@pytest.mark.parametrize(("name", "family", "ranks"), CASES, ids=[name for name, *_ in CASES])
def test_a_recipe_runs_in_miniature(name, family, ranks, tmp_path):
    path, overrides = miniature(tmp_path, name, family, ranks)
    command = [sys.executable, "-m", "bessemer", "run", str(path), "--out", str(tmp_path / "run")]
    command += ["--processes", str(ranks), *(part for override in overrides for part in ("--set", override))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    recipe = Recipe.load(path, overrides)
    folders = [tmp_path / "run" / f"{n:02d}-{stage.name}" for n, stage in enumerate(recipe.stages, 1)]
    assert all((folder / "done.json").is_file() for folder in folders)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage in recipe.stages:
        if stage.kind == "rl":
            steps = {line["step"] for line in lines if line["stage"] == stage.name}
            assert max(steps) == 4, "two rollouts of two updates"
    if ranks > 1:
        assert "FSDP2" in done.stdout + done.stderr
