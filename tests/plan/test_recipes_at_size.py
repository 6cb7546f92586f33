"""The recipes of models that people know: their memory tables, their plans, and what a dry run says of them."""

import json
import re
from pathlib import Path

import pytest

from bessemer.addons.plan import stage_memory
from bessemer.addons.plan.hardware import device, parse_cluster
from bessemer.config.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
AT = {
    "qwen2.5-1.5b-grpo": "1xH100", "qwen2.5-7b-grpo": "8xH100", "qwen3-30b-a3b-grpo": "4xH200",
    "v2-lite-r1": "8xH100", "smollm2-vllm": None, "node": "8xH200", "r1-paper": "2048xH200",
}  # fmt: skip
"""Recipe -> the devices that its header names; None: this machine."""


def needs_of(name, *overrides, cluster=None):
    recipe, cluster = Recipe.load(RECIPES / f"{name}.toml", overrides), cluster or AT[name]
    on = None if cluster is None else parse_cluster(cluster)
    return recipe, stage_memory.of_stages(recipe, on.size if on else 1, on.device if on else None)


@pytest.mark.parametrize("name", AT)
def test_a_recipe_s_header_has_its_memory(name):
    text = (RECIPES / f"{name}.toml").read_text()
    block = re.search(r"^# Memory .*, GiB:\n((?:#   .*\n)+)", text, re.MULTILINE)
    _, needs = needs_of(name)
    assert [line[4:] for line in block[1].splitlines()] == stage_memory.table(needs.values())
    if AT[name]:
        size, card = AT[name].split("x")
        assert block[0].startswith(f"# Memory of the fullest of {size} {card}, GiB:")


@pytest.mark.parametrize("name", [name for name, cluster in AT.items() if cluster])
def test_a_recipe_fits_the_devices_that_it_names_and_no_smaller_ones(name):
    recipe, needs = needs_of(name)
    on = parse_cluster(AT[name]).device
    assert not [text for need in needs.values() if (text := stage_memory.fault(recipe, need, on))]
    assert [text for need in needs.values() if (text := stage_memory.fault(recipe, need, device("RTX4090")))]


@pytest.mark.parametrize("name", ["qwen2.5-1.5b-grpo", "qwen2.5-7b-grpo", "qwen3-30b-a3b-grpo"])
def test_plan_of_a_model_of_another_family(name, call):
    _, out, _ = call("plan", name, "--cluster", AT[name], "--json")
    facts = json.loads(out)
    _, needs = needs_of(name)
    assert facts["fits"] and facts["stage_memory"]["grpo"]["total"] == needs["grpo"].total
    (grpo,) = (stage for stage in facts["stages"] if stage["stage"] == "grpo")
    assert grpo["seconds_interval"]["low"] < grpo["seconds"] < grpo["seconds_interval"]["high"]
    _, out, _ = call("plan", name, "--cluster", AT[name].replace("H100", "RTX4090").replace("H200", "RTX4090"))
    assert 'stage "grpo" needs' in out and "nine in ten" in out


def test_what_does_not_fit_names_what_does():
    """Same ranks and more recomputation, cards for a sampler, ranks for a model of which only the size is known."""
    recipe, needs = needs_of("qwen3-30b-a3b-grpo", cluster="8xH100")
    assert "vLLM sample, a copy on 2 devices" in stage_memory.fault(recipe, needs["eval"], device("H100"))
    recipe, needs = needs_of("v2-lite-r1", "layout.ep=1", "layout.dp=8")
    assert "ep = 8, recompute = " in stage_memory.fault(recipe, needs["zero"], device("H100")), "as many ranks"
    recipe, needs = needs_of("r1-paper", "layout.recompute=[]")
    assert "cp = 8, recompute = " in stage_memory.fault(recipe, needs["zero"], device("H200")), "2,048 ranks as before"
    large = Recipe.parse(
        'name = "large"\n[[stage]]\nkind = "import"\nname = "base"\nmodel = "hf://someone/llama-70b"\n[[stage]]\n'
        'kind = "rl"\nname = "zero"\nfrom = "base"\ntasks = ["countdown"]\nrollouts = 1\nlr = 1e-6\n'
    )
    need = stage_memory.of_stages(large, 8, device("H100"))["zero"]
    assert "[layout] that fits: dp = 16" in stage_memory.fault(large, need, device("H100"))


def test_the_nearest_layout_is_named():
    recipe, needs = needs_of("qwen2.5-7b-grpo", "layout.dp=1", "layout.recompute=[]", cluster="1xH100")
    assert "[layout] that fits: dp = 4" in stage_memory.fault(recipe, needs["grpo"], device("H100"))
    _, sharded = needs_of("qwen2.5-7b-grpo", cluster="16xH100")
    _, eight = needs_of("qwen2.5-7b-grpo")
    held = ("weights", "gradients", "moments", "reference")
    assert sum(sharded["grpo"].bytes[kind] for kind in held) * 2 == sum(eight["grpo"].bytes[kind] for kind in held)


def test_vllm_s_share_must_hold_its_copy():
    changed = "grpo.rollout.gpu_memory_utilization=0.1"
    recipe, needs = needs_of("qwen2.5-7b-grpo", changed)
    assert "raise rollout.gpu_memory_utilization" in stage_memory.fault(recipe, needs["grpo"], device("H100"))


@pytest.mark.parametrize("name", ["qwen2.5-7b-grpo", "qwen3-30b-a3b-grpo"])
def test_a_dry_run_never_passes_what_cannot_run(name, call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    card = AT[name].split("x")[1]
    changes = ("--set", 'grpo.hooks=["routing-replay"]', "--set", "layout.dp=4096")
    status, out, _ = call("run", name, "--dry-run", "--device", card, *changes)
    dense = "30b" not in name
    assert (status == 2) == dense and ("no fault found" in out) != dense
    assert ("leave the hook out" in out) == dense, "a mixture of experts replays them"
    assert " of 4,096 ranks without any" in out
