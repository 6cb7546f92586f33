"""A dry run says what cannot run on the machine that it is for; a run is refused for it before anything is written."""

import json
from pathlib import Path

import pytest

from bessemer.addons.distributed import many_processes as many
from bessemer.addons.distributed.many_processes import Gpus
from bessemer.addons.plan import feasible, pace, stage_memory
from bessemer.addons.plan.hardware import GIB, device
from bessemer.addons.plan.stage_memory import StageMemory
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.model.accounting import main_params
from bessemer.model.config import preset

RECIPES = Path(__file__).parents[2] / "recipes"
H200, H800 = device("H200"), device("H800")


def faults(name, on, *overrides, world=None):
    recipe = Recipe.load(RECIPES / f"{name}.toml", overrides)
    needs = stage_memory.of_stages(recipe, world, on)
    texts = {stage: stage_memory.fault(recipe, need, on) for stage, need in needs.items()}
    return needs, {stage: text for stage, text in texts.items() if text}


@pytest.fixture(autouse=True)
def guessed(monkeypatch):
    """Times do not matter here."""
    monkeypatch.setattr(pace, "WORTH", 1e99)


def test_stage_that_cannot_fit_is_reported_first_and_last(call, tmp_path, monkeypatch):
    """671B parameters on this machine: counted, not allocated."""
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "tiny", "--set", "model.preset=v3", "--dry-run")
    assert status == 2 and out.startswith("missing, or does not fit:") and "no fault found" not in out
    blocks = out.strip().split("\n\n")
    assert blocks[0] == blocks[-1]
    for stage in ("pretrain", "zero", "eval"):
        assert f'stage "{stage}" needs' in blocks[0]
    assert "this machine has" in out and "--device" in out and "in all about" in out
    status, out, err = call("run", "tiny", "--set", "model.preset=v3")
    assert status == 2 and 'stage "pretrain" needs' in err and not (tmp_path / "runs").exists()


def test_local_processes_share_memory(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "tiny", "--set", "model.preset=v3", "--dry-run", "--processes", "2")
    assert status == 2 and "for all of them together" in out and "in all about" in out


def test_times_and_memory_of_a_dry_run_are_those_of_the_plan(call):
    """Of a model of another family, and of one GPU, where gradients have no sum over ranks beside them."""
    _, dry, _ = call("run", "qwen2.5-1.5b-grpo", "--dry-run", "--device", "H100", "--json")
    _, plan, _ = call("plan", "qwen2.5-1.5b-grpo", "--cluster", "1xH100", "--json")
    planned = json.loads(plan)
    seconds = {stage["stage"]: stage["seconds"] * planned["interval"]["likely"] for stage in planned["stages"]}
    shown = {stage["name"]: stage["seconds"] for stage in json.loads(dry)["stages"] if stage["name"] in seconds}
    assert shown == pytest.approx(seconds) and seconds["grpo"] < 3600
    _, dry, _ = call("run", "one-gpu", "--dry-run", "--device", "H100", "--json")
    _, plan, _ = call("plan", "one-gpu", "--cluster", "1xH100", "--json")
    (rank,) = json.loads(plan)["memory_gib_per_rank"]
    assert json.loads(dry)["memory_gib_per_rank"]["0"]["gradients"] == pytest.approx(rank["gradients"])
    need = stage_memory.of_stages(Recipe.load("one-gpu"), 1, device("H100"))["base"]
    assert need.bytes["gradients"] / GIB == pytest.approx(rank["gradients"])


def test_stage_that_would_take_years_is_a_fault(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "tiny", "--set", "pretrain.tokens=1e15", "--dry-run", "--json")
    stages = {stage["name"]: stage for stage in json.loads(out)["stages"]}
    (fault,) = stages["pretrain"]["faults"]
    assert status == 2 and "years here" in fault and stages["pretrain"]["seconds"] > 1e9
    assert not stages["zero"]["faults"]


def test_recipe_that_fits_prints_time_and_memory(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "tiny", "--dry-run")
    assert status == 0 and out.rstrip().endswith("no fault found") and "missing" not in out
    assert "2 pretrain, about " in out and "3 zero (rl), about " in out and "in all about " in out
    assert out.count("     memory ") == 3


def test_rl_of_v2_lite_on_eight_h200():
    """Reference and reward models are sharded like the policy; a trainer that samples gathers the network."""
    needs, refused = faults("node", H200)
    zero, count = needs["zero"], main_params(preset("v2-lite"))
    assert not refused and zero.bytes["reference"] == zero.bytes["weights"] and "gathered" not in zero.bytes
    assert zero.worker_bytes["weights"] == 2 * count // 4 and not zero.workers
    _, twice = faults("r1-paper", H200, "layout.schedule=dualpipe", world=2048)
    assert "zero" in twice, "two stages a rank, as the recipe says"
    assert 2 * 2 * count / 8 < needs["r1"].bytes["judges"] < 2 * 2 * count / 3, "their experts are divided by eight"
    local, _ = faults("node", H200, 'zero.rollout={engine="local"}')
    assert local["zero"].bytes["gathered"] == 2 * count
    apart, _ = faults("node", H200, 'zero.rollout={engine="vllm", workers=4}')
    assert apart["zero"].workers == 4 and apart["zero"].worker_bytes["weights"] == 2 * count
    assert not faults("node", H200, "layout.ep=4")[1]
    _, refused = faults("node", H200, "layout.ep=2", "layout.recompute=[]")
    assert {"zero", "dev1", "r1"} < refused.keys()
    assert all("[layout] that fits: ep = 4, recompute = " in text for text in refused.values()), "one for all stages"


def test_updates_and_sampling_take_turns():
    need = StageMemory("zero", 2, {"weights": 5, "activations": 3, "working": 1, "gathered": 5, "cache": 2})
    assert need.total == 5 + 7 and need.total_of({"weights", "activations"}) == 8


def test_r1_paper_on_one_process_and_on_2048_ranks():
    """671B: all of it fits where the recipe says."""
    alone = ("layout.pp=1", "layout.ep=1", "layout.cp=1")
    _, unsplit = faults("r1-paper", H200, *alone)
    assert {"zero", "dev1", "dev3", "helpful", "r1"} <= unsplit.keys()
    needs, split = faults("r1-paper", H200, world=2048)
    assert not split and needs["dev1"].ranks == 2048 and len(needs) == 17
    assert needs["zero"].bytes["activations"] > 0.5 * needs["zero"].total and "gathered" not in needs["zero"].bytes
    _, twice = faults("r1-paper", H200, "layout.schedule=dualpipe", world=2048)
    assert "zero" in twice, "two stages a rank, as the recipe says"
    assert 2500 * GIB / 256 < needs["r1"].bytes["judges"] < 1.5 * 2500 * GIB / 256
    assert all(needs[name].workers == 1024 and not needs[name].bytes for name in ("cold-start", "maths", "aime"))
    recipe = Recipe.load(RECIPES / "r1-paper.toml")
    few = {stage.name: note for stage in recipe.stages if (note := stage_memory.without_rows(recipe, stage, 2048))}
    assert few.keys() == {"distilled"} and "1,984" in few["distilled"], "64 conversations on 2,048 ranks"
    local, _ = faults("r1-paper", H200, 'zero.rollout={engine="local"}', world=2048)
    assert local["zero"].bytes["gathered"] > 1200 * GIB


def test_v3_pretraining_fits_and_long_rows_do_not():
    needs, refused = faults("v3", H800)
    assert refused.keys() == {"extend-32k", "extend-128k"} and "cp = 16 (4,096 ranks)" in refused["extend-32k"]
    assert 60 < needs["pretrain"].total / GIB < H800.room / GIB
    assert needs["extend-128k"].bytes["activations"] == pytest.approx(
        4 * needs["extend-32k"].bytes["activations"], rel=0.01
    )
    _, cut = faults("v3", H800, "layout.cp=8", "layout.dp=2", "layout.recompute=[\"attend\", \"experts\"]",
                    "pretrain.fp8=off", "extend-32k.fp8=off", "extend-128k.fp8=off", world=16384)  # fmt: skip
    assert "extend-32k" not in cut


def test_memory_is_checked_for_the_ranks_that_a_run_starts(call, tmp_path, monkeypatch):
    """Eight GPUs share masters and moments of V2-Lite, which one does not hold."""
    _, alone = faults("tiny", H200, "model.preset=v2-lite", world=1)
    assert "pretrain" in alone
    eight = Gpus(8, 8, None)
    monkeypatch.setattr(many, "find_gpus", lambda: eight)

    def check(n_ranks):
        assert "pretrain" not in faults("tiny", H200, "model.preset=v2-lite", world=n_ranks)[1]
        raise UserError(f"checked for {n_ranks}")

    with pytest.raises(UserError, match="checked for 8"):
        many.start(Recipe.load(RECIPES / "tiny.toml"), tmp_path, check=check)
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", "tiny", "--dry-run", "--json")
    lines = {stage["name"]: stage["found"] for stage in json.loads(out)["stages"]}
    assert status == 0 and any(" a rank: " in line for line in lines["pretrain"])
    assert call("run", "tiny", "--set", "model.preset=v3")[0] == 2 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("model", ["tiny-random/deepseek-v3", "someone/tiny-random-llama-405b"])
def test_guessed_model_size_refuses_no_run(model, tmp_path):
    """Before its files are here, nothing but [model] or its name tells its size."""
    (tmp_path / "own.toml").write_text(
        f'name = "own"\nmodel.preset = "v3"\n[[stage]]\nname = "base"\nkind = "import"\nmodel = "hub:{model}"\n'
        '[[stage]]\nname = "zero"\nkind = "rl"\nsource = "base"\ntasks = ["arithmetic"]\nrollouts = 1\n'
    )
    recipe = Recipe.load(tmp_path / "own.toml")
    need = stage_memory.of_stages(recipe)["zero"]
    assert need.guess and stage_memory.fault(recipe, need, H800), "a dry run says what it would be"
    feasible.check(recipe, tmp_path / "run", None, 1)


def test_world_alone_is_not_compared_with_this_machine(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("run", RECIPES / "v3.toml", "--dry-run", "--world", "2048")
    assert (
        status in (0, 2)
        and "this machine" not in out
        and "does not fit" not in out.replace("missing, or does not fit", "")
    )
    status, out, _ = call("run", RECIPES / "v3.toml", "--dry-run", "--set", 'corpus.parts={text="fables-en"}')
    assert status == 2 and "for all of them together" in out
