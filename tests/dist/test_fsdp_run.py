"""A random Qwen2 through SFT, RL, distillation, a reward model and more pre-training on two ranks, from one recipe as a
user runs it: against one process, killed and resumed, and with LoRA."""

import json
import os
import signal
import time

import pytest
import torch
import transformers
from hf_cases import made
from safetensors.torch import load_file
from whole_runs import VARIED, figures, run, same_curve, start, write_talks

from bessemer.data.tokenizer import Tokenizer

RECIPE = """
name = "qwen"
seed = 3

[layout]
recompute = ["attend"]

[[stage]]
kind = "import"
model = "qwen2"
style = "zero"

[[stage]]
kind = "sft"
from = "import"
data = ["talks.jsonl"]
epochs = 1
row_length = 64
lr = 3e-3
lr_final = 1e-3
batch_rows = 4
micro_rows = 2
prompts = ["1 + 1 ="]
precision = "float32"
save_seconds = 0

[[stage]]
kind = "rl"
name = "zero"
from = "sft"
tasks = ["arithmetic"]
rollouts = 3
prompts_per_rollout = 4
samples = 4
updates_per_rollout = 2
max_new_tokens = 12
micro_tokens = 200
lr = 1e-3
reward = "varied.py:varied"
kl = {{ weight = 0.01, reference_every = 2 }}
heldout = {{ every = 3, problems = 4, minimum_pass = 0.0 }}
precision = "float32"
save_seconds = 0
{more}

[[stage]]
kind = "distill"
name = "taught"
from = "import"
teacher = "zero"
tasks = ["arithmetic"]
steps = 2
prompts_per_step = 4
samples = 2
max_new_tokens = 12
lr = 3e-3
eval_every = 2
eval_problems = 2
micro_tokens = 200
precision = "float32"

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
batch_rows = 4
micro_rows = 2
heldout = 0.3
precision = "float32"
"""
PRETRAIN = """
[[stage]]
kind = "corpus"
name = "sums"
tokenizer = "zero"
row_length = 48
parts = { arithmetic = "task:arithmetic" }
limits = { arithmetic = "6K" }

[[stage]]
kind = "pretrain"
name = "more"
from = "zero"
corpus = "sums"
tokens = "2K"
lr = 1e-3
batch_rows = 4
micro_rows = 2
precision = "float32"
"""
LORA = "lora = { rank = 4, alpha = 8 }"
STAGES = ("01-import", "02-sft", "03-zero", "04-taught", "05-helpful")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_talks(folder / "talks.jsonl", 60)
    pairs = ({"prompt": f"{n} + 1 =", "chosen": str(n + 1), "rejected": "What?"} for n in range(40))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "varied.py").write_text(VARIED)
    words = Tokenizer.train(["1 + 1 = 2"] * 8, 270)
    made("qwen2", vocab_size=words.vocab_size, max_position_embeddings=512).save_pretrained(folder / "qwen2")
    words.save(folder / "qwen2")
    (folder / "recipe.toml").write_text(RECIPE.format(more=""))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """The folders of the run on one process and on two."""
    for name, n in (("one", 1), ("two", 2)):
        status, output = run(folder / "recipe.toml", folder / name, "--processes", n)
        assert status == 0, output[-3000:]
    return folder / "one", folder / "two"


def test_two_ranks_train_what_one_process_trains(runs):
    one, two = runs
    for stage, names in (
        ("sft", ("train/loss", "train/grad_norm")),
        ("zero", ("rl/reward", "rl/grad_norm", "rl/kl")),
        ("taught", ("train/loss", "train/grad_norm")),
        ("helpful", ("train/loss", "train/grad_norm")),
    ):
        for name in names:
            same_curve(figures(two, stage, name), figures(one, stage, name), rel=1e-3, abs=1e-7)
    assert min(figures(two, "zero", "rl/grad_norm").values()) > 0, "it trained"
    assert max(figures(two, "zero", "rl/sampler_gap_max").values()) < 1e-4
    for stage in STAGES[1:]:
        tensors = load_file(two / stage / "model" / "model.safetensors")
        assert tensors.keys() == load_file(one / stage / "model" / "model.safetensors").keys(), stage


def test_a_killed_run_resumes(folder, runs, tmp_path):
    """kill -9 of all its processes in the middle of RL: the next run ends with the model of the one that was not
    killed."""
    killed = tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        process = start(folder / "recipe.toml", killed, "--processes", 2, output=log)
    deadline = time.monotonic() + 600
    while not (killed / "03-zero" / "state" / "step-00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "03-zero" / "model").exists()
    status, output = run(folder / "recipe.toml", killed, "--processes", 2)
    assert status == 0, output[-3000:]
    for stage in STAGES[1:]:
        expected, actual = (load_file(out / stage / "model" / "model.safetensors") for out in (runs[1], killed))
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), stage


def test_a_rank_without_rows_waits_and_a_killed_run_resumes(folder, tmp_path):
    """Steps of one row or sample on two ranks: the metrics of one process, also after kill -9 of all of them."""
    text = RECIPE.format(more="").partition('[[stage]]\nkind = "distill"')[0]
    for keys in (
        ("updates_per_rollout = 2", "updates_per_rollout = 8"),
        ("samples = 4", "samples = 2"),
        ("rollouts = 3", "rollouts = 1"),
    ):
        text = text.replace(*keys)
    (folder / "few.toml").write_text(text.replace("batch_rows = 4", "batch_rows = 1"))
    status, output = run(folder / "few.toml", tmp_path / "alone", "--processes", 1)
    assert status == 0, output[-3000:]
    with (tmp_path / "log").open("w") as log:
        process = start(folder / "few.toml", tmp_path / "few", "--processes", 2, output=log)
    deadline = time.monotonic() + 600
    while not (tmp_path / "few" / "02-sft" / "state" / "step-00000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    status, output = run(folder / "few.toml", tmp_path / "few", "--processes", 2)
    assert status == 0 and "1 of 2 ranks without any" in output, output[-3000:]
    expected, actual = (figures(tmp_path / name, "sft", "train/loss") for name in ("alone", "few"))
    assert len(expected) > 3
    same_curve(actual, expected, rel=1e-5)
    for name in ("rl/reward", "rl/grad_norm", "rl/kl"):
        expected, actual = (figures(tmp_path / folder, "zero", name) for folder in ("alone", "few"))
        same_curve(actual, expected, rel=1e-3, abs=1e-7)
    assert min(figures(tmp_path / "few", "zero", "rl/grad_norm").values()) > 0


def test_the_experts_of_a_qwen3_moe_are_replayed_on_ranks_too(folder, tmp_path):
    """Routing replay (R3): two ranks train as one process does, and their own choice is the sampler's."""
    words = Tokenizer.train(["1 + 1 = 2"] * 8, 270)
    shape = dict(
        vocab_size=words.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**shape)).save_pretrained(folder / "qwen3moe")
    words.save(folder / "qwen3moe")
    text = RECIPE.format(more='hooks = ["routing-replay"]').partition('[[stage]]\nkind = "distill"')[0]
    (folder / "moe.toml").write_text(text.replace('model = "qwen2"', 'model = "qwen3moe"'))
    for n in (1, 2):
        status, output = run(folder / "moe.toml", tmp_path / f"moe{n}", "--processes", n)
        assert status == 0, output[-3000:]
        assert max(figures(tmp_path / f"moe{n}", "zero", "rl/routing_disagreement").values()) < 0.02
        assert max(figures(tmp_path / f"moe{n}", "zero", "rl/sampler_gap_max").values()) < 1e-4
    for name in ("rl/reward", "rl/grad_norm", "rl/kl"):
        one, two = (figures(tmp_path / f"moe{n}", "zero", name) for n in (1, 2))
        first = min(one)  # after it samples may differ
        assert len(one) == len(two) == 3 and two[first] == pytest.approx(one[first], rel=1e-3)
    assert min(figures(tmp_path / "moe2", "zero", "rl/grad_norm").values()) > 0, "it trained"
