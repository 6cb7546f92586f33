"""Stages that train adapters on our own network: what they sample from, change, leave and resume."""

import json
import signal
import subprocess
import sys

import pytest
import rl_stage
import torch
from safetensors.torch import load_file
from whole_runs import VARIED, figures, write_talks

from bessemer.config.recipe import Recipe
from bessemer.hf.mapping import LAYER
from bessemer.pipeline import runner

LORA = (
    "lora={rank=4, alpha=8}", rl_stage.COIN, "samples=4", "kl.weight=0.05", "kl.reference_every=3", "lr=1e-2",
    'precision="float32"', 'hooks=["routing-replay"]',
)  # fmt: skip
ADAPTED = {
    key.removesuffix(".weight")
    for name, keys in LAYER.items() if name.startswith(("attn.w", "ffn.w", "ffn.shared.w")) for key in keys
}  # fmt: skip
"""The ends of the names on disk of what has adapters."""
RECIPE = """
name = "adapted"
seed = 3
[[stage]]
kind = "import"
model = "{base}"
style = "zero"
[[stage]]
kind = "sft"
data = ["talks.jsonl"]
epochs = 1
row_length = 64
lr = 1e-2
lr_final = 1e-3
batch_rows = 4
micro_rows = 2
prompts = ["1 + 1 ="]
lora = {{ rank = 2, targets = ["o_proj", "gate_proj", "up_proj"] }}
precision = "bfloat16"
[[stage]]
kind = "rl"
tasks = ["arithmetic"]
rollouts = 2
prompts_per_rollout = 4
samples = 4
max_new_tokens = 12
reward = "varied.py:varied"
lr = 1e-2
heldout = {{ every = 2, problems = 2, minimum_pass = 0.0 }}
lora = {{ rank = 2 }}
[[stage]]
kind = "distill"
from = "import"
teacher = "rl"
tasks = ["arithmetic"]
steps = 2
prompts_per_step = 4
samples = 2
max_new_tokens = 12
lr = 1e-2
eval_every = 2
eval_problems = 2
lora = {{ rank = 2 }}
[[stage]]
kind = "reward-model"
name = "helpful"
aim = "helpful"
from = "import"
data = ["pairs.jsonl"]
made = 8
samples = 1
max_new_tokens = 4
row_length = 192
lr = 1e-2
batch_rows = 2
micro_rows = 2
heldout = 0.3
lora = {{ rank = 2 }}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def changed(before, after):
    """Names of the tensors that differ between two model directories."""
    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {name for name, tensor in new.items() if not torch.equal(tensor, old[name].to(tensor.dtype))}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    stage = rl_stage.Stage(base, tmp_path_factory.mktemp("whole") / "run", *LORA)
    stage.run()
    return stage


def test_rl_samples_what_it_trains_and_changes_only_what_has_adapters(base, whole):
    assert min(whole.values("rl/grad_norm")) > 0 and max(whole.values("rl/kl")) > 0
    assert max(whole.values("rl/sampler_gap")) < 1e-4, "the sampler is the model that is trained"
    names = {name.removesuffix(".weight").split(".", 3)[3] for name in changed(base, whole.out)}
    assert names and names <= ADAPTED


def test_a_killed_stage_resumes_with_its_adapters(base, whole, tmp_path):
    command = [sys.executable, rl_stage.__file__, base, tmp_path, signal.SIGKILL.value, 4, *LORA]
    status = subprocess.run([*map(str, command)], capture_output=True, timeout=300).returncode
    assert status == -signal.SIGKILL
    again = rl_stage.Stage(base, tmp_path, *LORA)
    again.run()
    assert not rl_stage.differences(again.leaves(), whole.leaves())


def test_every_stage_that_trains_takes_adapters(base, tmp_path):
    write_talks(tmp_path / "talks.jsonl", 24)
    pairs = ({"prompt": f"{n} + 1 =", "chosen": str(n + 1), "rejected": "What?"} for n in range(24))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "varied.py").write_text(VARIED)
    (tmp_path / "r.toml").write_text(RECIPE.format(base=base / "model"))
    out = tmp_path / "run"
    runner.run(Recipe.load(tmp_path / "r.toml"), out)
    folders = {folder.name.partition("-")[2]: folder for folder in out.iterdir() if folder.is_dir()}
    for stage, before in (("sft", "import"), ("rl", "sft"), ("distill", "import")):
        names = {name.removesuffix(".weight") for name in changed(folders[before], folders[stage])}
        assert names and {name.split(".", 3)[3] for name in names} <= ADAPTED, stage
        if stage == "sft":
            assert {name.split(".")[-1] for name in names} == {"o_proj", "gate_proj", "up_proj"}
    assert "score.weight" in load_file(folders["helpful"] / "model" / "model.safetensors")
    losses = figures(out, "helpful", "train/loss")
    assert len(losses) > 1 and len(set(losses.values())) > 1
