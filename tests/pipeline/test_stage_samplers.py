"""Stages that sample, with the samplers of RL: rollout workers answer what this process would."""

import json
import os
from pathlib import Path

import pytest
import rl_stage
import torch
from whole_runs import GRPO, IMPORTED, figures, run

from bessemer.addons.distributed import folder_sampling, ray_cluster
from bessemer.addons.distributed.folder_sampling import FolderEngine
from bessemer.config.recipe import Recipe
from bessemer.engine.engine import Engine
from bessemer.errors import UserError
from bessemer.pipeline import runner
from bessemer.train import setup

RECIPE = (
    IMPORTED
    + """
[[stage]]
kind = "reject"
tasks = ["arithmetic"]
problems = 4
samples = 2
max_new_tokens = 12
others = 1
answers = "all"
repeated = 1.0
consistency = 0.0
{rollout}
[[stage]]
kind = "distill"
from = "base"
teacher = "base"
tasks = ["arithmetic"]
steps = 2
prompts_per_step = 3
samples = 2
max_new_tokens = 12
eval_problems = 2
lr = 1e-3
{rollout}
[[stage]]
kind = "eval"
models = ["base", "distill"]
tasks = ["arithmetic"]
problems = 3
samples = 2
max_new_tokens = 12
top_p = 0.9
searched_words = 0
{rollout}
"""
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return rl_stage.write_base(tmp_path_factory.mktemp("base"))


def outputs(base, out, rollout, monkeypatch):
    """What the stages make; none of the answers of `reject` may be left, so its counts are compared."""
    recipe = out.with_suffix(".toml")
    recipe.write_text(RECIPE.format(base=base / "model", rollout=rollout))
    monkeypatch.setattr("bessemer.addons.r1.reject.fault", lambda row, config: None)
    runner.run(Recipe.load(recipe), out)
    stages = {path.name.split("-", 1)[1]: path for path in out.glob("0*")}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "reject": (stages["reject"] / "samples.jsonl").read_text(),
        "distill": (stages["distill"] / "model" / "model.safetensors").read_bytes(),
        "eval": json.loads((stages["eval"] / "results.json").read_text()),
        "train": [line["values"]["train/loss"] for line in metrics if "train/loss" in line["values"]],
    }


def test_rollout_workers_answer_for_every_stage_what_this_process_would(base, tmp_path, monkeypatch):
    monkeypatch.delenv(ray_cluster.ADDRESS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    local = outputs(base, tmp_path / "local", "", monkeypatch)
    apart = outputs(base, tmp_path / "apart", 'rollout = "ray"', monkeypatch)
    assert local.pop("eval")["rows"] == apart.pop("eval")["rows"]
    assert local == apart


def test_a_folder_engine_plans_what_the_engine_plans(base):
    engine = Engine(*setup.load_model(base / "model"))
    options = dict(samples=3, max_new_tokens=700, seed=5, temperature=0.7, batch_rows=4)
    prompts = [[0, 5, 6], [0, 7], [0, 5, 6]]
    plans = [each.plan(prompts, **options) for each in (engine, FolderEngine(base / "model"))]
    assert plans[0] == plans[1]


def test_a_sampler_with_other_numbers_is_refused_before_the_first_answer(base, monkeypatch):
    engine, said = Engine(*setup.load_model(base / "model")), []
    folder = FolderEngine(base / "model")
    folder.check(engine.generate, "float32", "it", said.append)
    with torch.no_grad():
        engine.model.layers[0].attn.wo.weight.mul_(1.2)
    with pytest.raises(UserError, match="it does not compute"):
        folder.check(engine.generate, "float32", "it", said.append)
    assert said == []
    monkeypatch.setattr(folder_sampling, "HOST_SHARE", 1e-9)
    folder.check(engine.generate, "float32", "it", said.append)
    assert "it is not checked" in said[0]


@pytest.mark.parametrize(("rollout", "complaint"), [
    ('rollout = {{ engine = "ray", precision = "bfloat16" }}', r"rollout\.precision"),
    ('rollout = "ray"\nprecision = "bfloat16"', "precision has no effect"),
    ('rollout = {{ engine = "ray", url = "x" }}', "url"),
    ('rollout = "vllm-server"', "url"),
    ('rollout = "nowhere"', "nowhere"),
])  # fmt: skip
def test_settings_without_effect_are_refused(base, tmp_path, rollout, complaint):
    recipe = Path(tmp_path / "recipe.toml")
    text = RECIPE.replace("{rollout}", rollout, 1).replace("{rollout}", "")
    recipe.write_text(text.format(base=base / "model"))
    with pytest.raises(UserError, match=complaint):
        runner.run(Recipe.load(recipe), tmp_path / "run")


def test_workers_get_the_weights_that_ranks_train_in_parts(base, tmp_path, monkeypatch):
    """The network is gathered for every exchange, and its memory may go in between."""
    recipe, out = tmp_path / "ranks.toml", tmp_path / "run"
    recipe.write_text(
        (IMPORTED + GRPO).format(base=base / "model") + 'max_new_tokens = 16\nrollout = "ray"\n[layout]\nep = 2\n'
    )
    monkeypatch.delenv(ray_cluster.ADDRESS, raising=False)
    status, output = run(recipe, out, "--processes", 2)
    assert status == 0, output[-3000:]
    gaps = figures(out, "zero", "rl/sampler_gap").values()
    assert len(gaps) == 3 and max(gaps) < 1e-5
