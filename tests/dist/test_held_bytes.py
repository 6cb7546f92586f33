"""What ranks hold of networks during RL, counted from their live tensors: no whole copies while they train."""

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from bessemer.addons.distributed.on_ranks import OnRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.r1.distill import Distill
from bessemer.config.recipe import Recipe
from bessemer.runs.context import StageContext, StopFlag
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress

BENCH = Path(__file__).parents[2] / "bench" / "rl_memory.py"
spec = importlib.util.spec_from_file_location("rl_memory", BENCH)
rl_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rl_memory)


def test_ranks_hold_a_whole_network_only_while_they_sample():
    """2 and 4 gloo ranks: policy and reference are shards, a checkpoint holds no clone, the gathered copy goes."""
    facts = rl_memory.measure(["2 ranks, ep 2", "4 ranks, pp 2 x ep 2"])
    for name, row in facts["layouts"].items():
        for moment, gathered in (("sampling", row["whole"]), ("updates", 0)):
            held = row[moment]
            assert held["weights"] < (0.7 if name == "2 ranks, ep 2" else 0.45) * row["whole"]
            assert held["reference"] == pytest.approx(held["weights"], rel=0.01)
            assert held["gathered"] == pytest.approx(gathered, rel=0.01)
            assert held["rounded"] == held["critic"] == held["checkpoint"] == 0


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
@pytest.mark.parametrize(("name", "share"), [("2 ranks, ep 2, ray", 0.7), ("2 ranks, FSDP2, ray", 0.51)])
def test_ranks_hold_no_whole_network_for_a_sampler_elsewhere(name, share, tmp_path):
    """Two rollouts by a Ray worker: rank 0 hands one tensor over at a time."""
    # A program of its own: Ray hangs in the fork of a process that has used Ray, as this one may have
    subprocess.run([sys.executable, BENCH, "--only", name, "--json", tmp_path / "bytes.json"], check=True, timeout=280)
    (row,) = json.loads((tmp_path / "bytes.json").read_text())["layouts"].values()
    for held in (row["sampling"], row["updates"]):
        assert held["gathered"] == 0 and held["weights"] < share * row["whole"]
        assert held.get("handed over", 0) < 0.3 * row["whole"]
    assert row["sampling"]["handed over"] > 0


def distilled(rank, folder):
    """Bytes of the gathered student in every update, and how often it was gathered for samples."""
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    recipe = Recipe.load(folder / "recipe.toml")
    runtime, held, refreshed, kept = OnRanks(ranks, recipe.layout, lambda text: None), [], [], {}
    whole, make = runtime.whole, runtime.trainer

    def gathered(trainer):
        kept["student"] = policy = whole(trainer)
        refresh = policy.refresh
        policy.refresh = lambda: (refreshed.append(1), refresh())
        return policy

    def trainer(*arguments, **options):
        made = make(*arguments, **options)
        update = made.update

        def counted(batches):
            parameters = kept["student"].model.parameters()
            held.append(sum(parameter.untyped_storage().nbytes() for parameter in parameters))
            return update(batches)

        made.update = counted
        return made

    runtime.whole, runtime.trainer = gathered, trainer
    ctx = StageContext(
        "taught", folder, {"base": folder}, folder, recipe, folder,
        StageMetrics(Metrics(folder / f"metrics-{rank}.jsonl"), "taught"), RunProgress({}).begin("taught"), StopFlag(),
        runtime=runtime,
    )  # fmt: skip
    Distill().run(recipe.stage("taught"), ctx)
    return held, len(refreshed)


DISTILL = """
name = "memory"
seed = 7
[model]
preset = "tiny"
[[stage]]
kind = "import"
name = "base"
model = "nowhere"
[[stage]]
kind = "distill"
name = "taught"
teacher = "base"
tasks = ["arithmetic"]
steps = 2
prompts_per_step = 2
samples = 2
max_new_tokens = 6
lr = 1e-3
eval_every = 2
eval_problems = 1
precision = "float32"
[layout]
ep = 2
"""


def test_distillation_holds_no_whole_student_while_it_trains(tmp_path):
    rl_memory.write_base(tmp_path, "2 ranks, ep 2")
    (tmp_path / "recipe.toml").write_text(DISTILL)
    for held, refreshed in on_ranks(2, distilled, tmp_path):
        assert held == [0, 0] and refreshed == 4, "two evaluations and two steps sample"
