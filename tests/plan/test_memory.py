"""A rank holds what the planner says: to the byte before the first step, within 5 % during training."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from allocator import live_and_highest
from ranks import on_ranks
from step_memory import LENGTH, MICRO, ROWS, Step, storages

from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.accelerate.precision.operand import quantise, transpose
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_slice import cut
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.table import Action, Pair, actions, fullest
from bessemer.addons.plan import dry_run, memory, plan_config
from bessemer.addons.plan.cost import setup_memory
from bessemer.addons.plan.hardware import parse_cluster
from bessemer.addons.plan.memory import NumberFormats
from bessemer.config.recipe import Recipe
from bessemer.hf.mapping import slots
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.optimizer import Optimizer

BEFORE = ("weights", "gradients", "masters", "moments", "routing")
TINY, V3 = preset("tiny"), preset("v3")
MODELS = [TINY, preset("tiny", vocab_size=1001, dim=120), preset("tiny", n_mtp=0), preset("tiny", n_mtp=2),
          preset("tiny", q_lora_rank=0, n_shared_experts=0), preset("moonlight"), V3]  # fmt: skip
LAYOUTS = [("gpipe", Layout(1, 1, 1), 2), ("1f1b", Layout(2, 1, 2), 4), ("dualpipe", Layout(2, 2, 2), 4),
           ("zbv", Layout(2, 2, 1), 4), ("interleaved", Layout(2, 1, 4), 4),
           ("dualpipe", Layout(4, 2, 8), 8), ("1f1b", Layout(2, 2, 2, cp=4), 4)]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "micro"), LAYOUTS, ids=str)
def test_planned_bytes_match_real_optimizer_groups(name, layout, micro):
    """On every pipeline rank, in BF16 with BF16 moments and in float32, with either optimizer: to the byte, padding
    included."""
    table = schedule(name, layout.pp, micro)
    for cfg in MODELS:
        if table.stages > cfg.n_layers + cfg.n_mtp:
            continue
        for number, muon in ((2, False), (4, False), (2, True)):
            numbers = NumberFormats(number, number, muon=muon)
            for pp in range(layout.pp):
                planned = memory.rank_params(cfg, layout, table, pp, numbers).bytes(numbers)
                real = dry_run.measure(cfg, layout, table, layout.rank(pp, layout.dp - 1, 0), numbers)
                assert planned == real, (cfg, pp, numbers)


def test_muon_has_one_moment_for_matrices():
    """A dry run of a recipe with Muon holds what the trainer's own optimizer holds."""
    cfg, table = preset("tiny"), schedule("gpipe", 1, 1)
    with torch.device("meta"):
        model = Transformer(cfg)
    real = Optimizer(model, compute_dtype=torch.bfloat16, stacked=model.hidden_matrices())
    moments = sum(t.nbytes for group in real.groups for t in group.moments.values())
    with_adam_and_muon = [
        dry_run.dry_run(cfg, Layout(), table, 1, 64, NumberFormats(2, 4, muon=muon))[0] for muon in (False, True)
    ]
    assert with_adam_and_muon[1]["moments"] == moments < 0.65 * with_adam_and_muon[0]["moments"]
    assert {
        kind: size for kind, size in with_adam_and_muon[0].items() if size != with_adam_and_muon[1][kind]
    }.keys() == {"moments"}
    _, cfg, config, _ = plan_config.resolve("builtin:tiny", plan_config.parse([]))
    for dtype in ("bfloat16", "float32"):
        recipe = Recipe.load("tiny", [f"pretrain.moments={dtype}"])
        own = plan_config.of_recipe(recipe, *plan_config.pretraining(recipe)[::2])
        setup = plan_config.setup(own, cfg, parse_cluster("1xH100"))
        planned = dry_run.of_recipe(recipe, device_name="H100").ranks[0]["moments"]
        assert setup_memory(cfg, setup, table)[0]["moments"] == planned
    adamw = plan_config.setup(replace(config, optimizer="adamw"), cfg, parse_cluster("1xH100"))
    assert setup_memory(cfg, adamw, table)[0]["moments"] > 1.5 * planned


def test_gate_limits_the_nodes_of_a_token():
    """Moonlight's gate has one group, so its six experts can lie on two nodes."""
    free, limited = preset("moonlight"), preset("v3")
    for cfg, copies in ((free, 2), (limited, 2), (preset("v3", n_limited_groups=1), 1)):
        alone, spread = (memory.working(cfg, Layout(ep=ep), 1, 8192, NumberFormats(2, 2))["layer"] for ep in (1, 16))
        assert spread - alone == 2 * 8192 * copies * cfg.dim * 2


def test_tied_embeddings_are_counted_once():
    cfg, layout, table = preset("tiny", tie_embeddings=True), Layout(), schedule("gpipe", 1, 1)
    numbers = NumberFormats(2, 4)
    planned = memory.rank_params(cfg, layout, table, 0, numbers).bytes(numbers)
    assert planned == dry_run.measure(cfg, layout, table, 0, numbers)


def test_planning_v3_allocates_nothing():
    """2,048 ranks: the pipeline ranks hold the whole network, and the experts once per copy and DualPipe lane."""
    cfg, layout = V3, Layout(16, 2, 64)
    table = schedule("dualpipe", 16, 120)
    ranks = [memory.rank_params(cfg, layout, table, pp) for pp in range(16)]
    experts = sum(size for rank in ranks for kind, size in rank.vectors.items() if kind.expert)
    assert experts == 2 * 59 * 4 * 3 * 7168 * 2048  # two lanes, 58 layers and MTP, 256 / 64 experts
    middle = next(rank for rank in ranks if rank.gates == 8)  # E.1: about 3.27e9 with two stages of 4 MoE layers
    assert middle.parameters / 1e9 == pytest.approx(3.27, abs=0.03)


# --- while training --------------------------------------------------------------------------------------------


def on_a_rank(rank, name, layout, dtype, fp8):
    """Bytes held before a step, bytes kept by a step's forwards, and a lower and an upper bound of a step's peak on
    top. The profiler misses what gloo's threads free: what it still counts at the end is what it missed."""
    model = set_fp8(Transformer(TINY).initialise(1), PAPER if fp8 else None)
    step = Step(rank, model, layout, name, compute_dtype=dtype)
    before = storages(t for g in step.groups for t in (g.compute, g.grad, g.summed, g.master, *g.moments.values()))
    step.trainer.update(step.batches)
    saved, work = step.saved(), step.work()
    dist.barrier()
    missed, most = live_and_highest(lambda: step.executor.run(work))
    return before, saved, most - missed, most


CASES = [("dualpipe", Layout(2, 1, 2), torch.bfloat16, True), ("1f1b", Layout(2, 1, 2), torch.bfloat16, False),
         ("gpipe", Layout(2, 1, 2), torch.float32, False), ("1f1b", Layout(2, cp=2), torch.bfloat16, False),
         ("gpipe", Layout(cp=2), torch.float32, False)]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "dtype", "fp8"), CASES, ids=str)
def test_memory_of_real_ranks(name, layout, dtype, fp8):
    """Averaged over the ranks of a pipeline stage, because real routing is not balanced. In FP8 the CPU emulation needs
    working memory that no GPU needs, so only what is kept is compared there."""
    table, numbers = schedule(name, layout.pp, MICRO), NumberFormats(dtype.itemsize, 4, fp8, fused=False)
    counted = on_ranks(layout.world, on_a_rank, name, layout, dtype, fp8)
    saved = memory.saved_by_stage(
        TINY, cut(TINY, table.stages), ROWS, LENGTH, numbers, cp=layout.cp, whole=layout.ep == 1
    )
    planned = memory.per_rank(TINY, layout, table, ROWS, LENGTH, numbers)
    for pp in range(layout.pp):
        ranks = [counted[layout.rank(pp, 0, ep, cp)] for ep in range(layout.ep) for cp in range(layout.cp)]
        all_forwards = sum(saved[a.stage] for a in actions(table.steps[pp]) if a.kind == "F") + planned[pp]["operands"]
        assert sum(rank[1] for rank in ranks) / len(ranks) == pytest.approx(all_forwards, rel=0.05)
        before = sum(planned[pp][kind] for kind in BEFORE[:-1])
        assert all(rank[0] == before for rank in ranks)
        if not fp8:
            total = before + planned[pp]["activations"] + planned[pp]["working"]
            least, most = (before + sum(rank[column] for rank in ranks) / len(ranks) for column in (2, 3))
            assert 0.95 * least < total < 1.05 * most, (least, total, most)


def test_fp8_operands_are_kept_as_memory_allows():
    """Once on a CPU; on a GPU twice, once or not at all, depending on the memory left."""
    layout, table, numbers = Layout(1, 1, 2), schedule("1f1b", 1, 2), NumberFormats(fp8=True)
    model = Transformer(TINY)
    (once,) = (kinds["operands"] for kinds in memory.per_rank(TINY, layout, table, 1, 128, numbers))
    names = {slot.name for slot in slots(TINY) if slot.fp8}
    local = [p[: len(p) // 2] if ".experts." in n else p for n, p in model.named_parameters() if n in names]
    assert once == sum(part.nbytes for p in local for part in quantise(p.detach(), "block"))
    twice = once + sum(part.nbytes for p in local for part in transpose(quantise(p.detach(), "block")))
    bare = sum(memory.per_rank(TINY, layout, table, 1, 128, numbers, room=0)[0].values())
    for room, expected in ((bare + once - 1, 0), (bare + once, once), (bare + twice, twice), (1e12, twice)):
        (kinds,) = memory.per_rank(TINY, layout, table, 1, 128, numbers, room=room)
        assert kinds["operands"] == expected
    (plain,) = memory.per_rank(TINY, layout, table, 1, 128, NumberFormats())
    assert plain["operands"] == 0


def test_most_live_walks_the_table():
    F, B, I, W = (Action(kind, 0, 0) for kind in "FBIW")
    later, saved = Action("F", 1, 0), {0: 10, 1: 3}
    for steps, expected, why in (
        ((F, F, B, F), 20, "the second and the third forward"),
        ((F, I, F, W), 20, "an I leaves what its W needs"),
        ((F, Pair(later, B)), 13, "in a pair the forward comes first"),
        ((later, later, later, Action("B", 1, 0), Action("B", 1, 1), F), 13, "one of each outweighs three small ones"),
        ((), 0, "a rank without work"),
    ):
        assert memory.most_live(fullest(steps), saved) == expected, why


@pytest.mark.parametrize(("name", "layout", "micro"), LAYOUTS, ids=str)
def test_the_fullest_moments_match_those_of_a_walk(name, layout, micro):
    """Whatever the stages weigh, no moment that was left out holds more."""
    table = schedule(name, layout.pp, micro)
    for saved in ({s: 1 for s in range(table.stages)}, {s: 3**s for s in range(table.stages)},
                  {s: 1 + 7 * (table.stages - s) for s in range(table.stages)}):  # fmt: skip
        for rank, steps in enumerate(table.steps):
            live, walked = 0, [0]
            for action in actions(steps):
                live += saved[action.stage] * {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
                walked.append(live)
            assert memory.most_live(table.fullest[rank], saved) == max(walked)


def test_recomputation_keeps_less_of_its_phase():
    for fp8 in (False, True):
        numbers = NumberFormats(fp8=fp8)
        sizes = {
            phases: sum(memory.saved_by_stage(V3, cut(V3, 16), 1, 4096, numbers, phases).values())
            for phases in ((), ("attend",), ("experts",), ("attend", "experts"))
        }
        assert (
            sizes["attend", "experts"]
            < min(sizes["attend",], sizes["experts",])
            < max(sizes["attend",], sizes["experts",])
            < sizes[()]
        )
