"""The recipes of models that people know, from first stage to last: a tiny model of the family, small numbers.

What differs from the recipe: the model, the tasks (one that needs no package), the numbers in SMALL, float32, a reward
that tells a random model's answers apart, and the sampler: the trainer's own, or, for smollm2-vllm, vLLM itself too.
Ranks, [layout], FSDP2, experts over ranks, LoRA, hooks, losses and the chain of stages are the recipe's.

A random model is never right, so nothing would be left of a cold start from its answers. The base of v2-lite-r1 is
therefore pre-trained for some seconds on the documents of the task, until some of its answers are right.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from hf_cases import made
from whole_runs import VARIED, figures, run

from bessemer.config.recipe import Recipe
from bessemer.data.tokenizer import Tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = {
    "rl": {"rollouts": 2, "prompts_per_rollout": 4, "samples": 4, "updates_per_rollout": 2, "max_new_tokens": 40,
           "micro_tokens": 256, "precision": "float32", "heldout.problems": 2, "heldout.every": 2,
           "heldout.minimum_pass": 0.0, "lr": 1e-3, "save_seconds": 0, "prompt_template": "model"},
    "reject": {"problems": 64, "samples": 8, "max_new_tokens": 40, "consistency": 0.0, "repeated": 1.0},
    "sft": {"epochs": 1, "row_length": 256, "precision": "float32"},
    "eval": {"problems": 2, "samples": 1, "max_new_tokens": 8, "precision": "float32"},
    "examples": {"examples": 32},
}  # fmt: skip
"""Kind of stage -> the keys that shrink."""
CASES = {
    "qwen2.5-1.5b-grpo": ("qwen2", 1), "qwen2.5-7b-grpo": ("qwen2", 2), "qwen3-30b-a3b-grpo": ("qwen3-moe", 2),
    "v2-lite-r1": ("v2-lite", 2), "smollm2-vllm": ("llama", 1),
}  # fmt: skip
"""Recipe -> the family of its model, and the ranks of its miniature."""
PRETRAINED = """
name = "base"
seed = 7
[model]
preset = "v2-lite"
vocab_size = 400
dim = 32
n_layers = 2
inter_dim = 64
moe_inter_dim = 16
n_heads = 2
kv_lora_rank = 16
qk_nope_head_dim = 24
qk_rope_head_dim = 8
v_head_dim = 32
n_routed_experts = 8
n_activated_experts = 2
max_seq_len = 512
rope_factor = 1.0
init_std = 0.08
[[stage]]
kind = "corpus"
row_length = 64
vocab_sample = 20000
parts = { arithmetic = "task:arithmetic" }
limits = { arithmetic = "50K" }
[[stage]]
kind = "pretrain"
name = "base"
tokens = "80K"
lr = [["0", 0.0], ["5K", 1e-2], ["60K", 1e-2], ["80K", 2e-3]]
batch_rows = 8
micro_rows = 4
mtp_lambda = 0.0
precision = "float32"
mixture = { arithmetic = 1.0 }
"""
"""DeepSeek-V2's attention and gate at the smallest size that learns to answer."""


def write_model(folder, family):
    """A model directory: random, or in the case of DeepSeek's family pre-trained."""
    if family == "v2-lite":
        (folder / "base.toml").write_text(PRETRAINED)
        status, output = run(folder / "base.toml", folder / "base")
        assert status == 0, output[-3000:]
        return folder / "base" / "02-base" / "model"
    words = Tokenizer.train(["User: Compute 3*7+6.\nAssistant: <think>21+6=27</think><answer>27</answer>"] * 8, 290)
    shape = dict(vocab_size=words.vocab_size, max_position_embeddings=512, hidden_size=64, num_attention_heads=2)
    made(family, **shape).save_pretrained(folder / "model")
    words.save(folder / "model")
    return folder / "model"


def miniature(folder, name, family, ranks, sampler):
    """The recipe's file with what the docstring lists changed, and its overrides."""
    text = (RECIPES / f"{name}.toml").read_text()
    text = re.sub(r'(?m)^model = "(hf|package):.*"$', f'model = "{write_model(folder, family)}"', text)
    worker = "" if sampler == "local" else '[stage.rollout]\nengine = "vllm"\nmax_model_len = 256\n'
    text = re.sub(r"(?m)^\[stage\.rollout\]\n(?:\w.*\n)+", worker, text)
    text = text if worker else re.sub(r"(?m)^rollout = .*\n", "", text)
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
        if (stage.kind, key, sampler) != ("eval", "precision", "vllm")  # vLLM has a precision of its own
    ]  # fmt: skip
    return folder / f"{name}.toml", overrides


@pytest.mark.parametrize(("name", "sampler"), [
    *((name, "local") for name in CASES),
    pytest.param("smollm2-vllm", "vllm", marks=[
        pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="needs tools/vllm_cpu.sh"),
    ]),
])  # fmt: skip
@pytest.mark.timeout(900)
def test_a_recipe_runs_in_miniature(name, sampler, tmp_path):
    family, ranks = CASES[name]
    path, overrides = miniature(tmp_path, name, family, ranks, sampler)
    settings = [part for override in overrides for part in ("--set", override)]
    status, output = run(path, tmp_path / "run", "--processes", ranks, *settings)
    assert status == 0, output[-3000:]
    recipe = Recipe.load(path, overrides)
    folders = [tmp_path / "run" / f"{n:02d}-{stage.name}" for n, stage in enumerate(recipe.stages, 1)]
    assert all((folder / "done.json").is_file() for folder in folders)
    for stage in recipe.stages:
        if stage.kind == "rl":
            names = ("grad_norm", "sampler_gap", "staleness")
            norms, gaps, old = (figures(tmp_path / "run", stage.name, f"rl/{name}") for name in names)
            assert max(norms) == 4 and max(norms.values()) > 0, "two rollouts of two updates trained it"
            fresh = [gap for step, gap in gaps.items() if not old[step]]
            assert max(fresh) < 1e-4, "the sampler is the model that is trained"
            assert any(hook.name == "sample-ahead" for hook in stage.hooks) == (len(fresh) < len(gaps))
    if ranks > 1 and family != "v2-lite":
        assert "FSDP2" in output
