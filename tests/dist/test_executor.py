"""Every schedule on real ranks gives the whole network's loss and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.distributed.executor import Executor, Work
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_slice import Slice, cut, keep_experts
from bessemer.addons.distributed.schedules import schedule
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import balance_weight, next_token

CFG = preset("tiny", vocab_size=96, dim=32, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=24, kv_lora_rank=16,
             qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12)  # fmt: skip
TERMS = {"mtp_lambda": 0.3, "balance_alpha": 1e-2}


def model_of(cfg, fp8):
    model = set_fp8(Transformer(cfg).initialise(1), PAPER if fp8 else None)
    model.train()
    return model


def batch(number, segmented):
    tokens = torch.randint(0, CFG.vocab_size, (2, 14), generator=torch.Generator().manual_seed(number))
    loss = torch.ones(2, 14)
    loss[:, 0] = 0
    loss[1, 9:] = 0
    return Batch(tokens, loss, (torch.arange(14) // 6).expand(2, -1).contiguous() if segmented else None)


def replayed(number):
    """A batch with random experts to replay; the gate still chooses at the last three tokens of a row."""
    data = batch(number, False)
    return replace(data, extras={"choice_BTLK": choice(data.tokens_BT, number)})


def choice(tokens_BT, number):
    layers = CFG.n_layers - CFG.n_dense_layers
    draw = torch.rand(*tokens_BT.shape, layers, CFG.n_routed_experts, generator=torch.Generator().manual_seed(number))
    choice_BTLK = draw.topk(CFG.n_activated_experts).indices.short()
    choice_BTLK[:, -3:] = -1
    return choice_BTLK


def run(executor, work):
    """Runs the work; every parameter is reported once, when its gradient is complete."""
    reports = {}

    def completed(parameters):
        for parameter in parameters:
            assert parameter not in reports
            reports[parameter] = None if parameter.grad is None else parameter.grad.clone()

    executor.run(work, completed)
    assert reports.keys() == {p for part in executor.slices.values() for p in part.parameters()}
    for parameter, grad in reports.items():
        assert parameter.grad is grad is None or torch.equal(parameter.grad, grad)


def on_a_rank(rank, name, ranks, micro, cfg, fp8, segmented):
    table = schedule(name, ranks, micro)
    model = model_of(cfg, fp8)
    slices = {(lane, stage): Slice(model, stage, table.stages) for lane, stage in table.slices_on(rank)}
    executor = Executor(table, rank, slices, [range(ranks)])
    work = []
    for lane in range(table.lanes):
        batches = [batch(lane * table.per_lane + m, segmented) for m in range(table.per_lane)]
        work.append([
            Work(b.tokens_BT, b.segments_BT, lambda out, head, b=b: next_token.of(out, head, b, **TERMS).total,
                 balance_weight(b, TERMS["balance_alpha"]))
            for b in batches
        ])  # fmt: skip
    run(executor, work)
    executor.sum_shared()
    grads = {n: p.grad.numpy() for part in slices.values() for n, p in part.named_parameters() if p.grad is not None}
    return sum(executor.losses), grads


def on_a_rank_of_a_mesh(rank, name, layout, micro, fp8):
    """Parallel over pipeline, experts and data: every (dp, ep) rank has its own micro-batches."""
    model, mesh = model_of(CFG, fp8), Mesh(layout, CFG)
    table = schedule(name, layout.pp, micro)
    keep_experts(model, mesh.experts)
    exchange = mesh.exchange()
    slices = {(lane, stage): Slice(model, stage, table.stages, exchange) for lane, stage in table.slices_on(mesh.pp)}
    executor = Executor(table, mesh.pp, slices, layout.groups("pp"))
    first, actual = (mesh.dp * layout.ep + mesh.ep) * micro, []
    for make in (lambda number: batch(number, False), replayed):
        model.zero_grad()
        batches = [make(first + number) for number in range(micro)]
        work = [
            [
                Work(b.tokens_BT, None, lambda out, head, b=b: next_token.of(out, head, b, **TERMS).total,
                     balance_weight(b, TERMS["balance_alpha"]), choice_BTLK=b.extras.get("choice_BTLK"))
                for b in batches[lane * table.per_lane : (lane + 1) * table.per_lane]
            ]
            for lane in range(table.lanes)
        ]  # fmt: skip
        run(executor, work)
        executor.sum_shared()
        named = {n: p for part in slices.values() for n, p in part.named_parameters() if p.grad is not None}
        for n in sorted(named):
            dist.all_reduce(named[n].grad, group=mesh.group["expert" if ".experts." in n else "dense"])
        actual.append((sum(executor.losses), {n: p.grad.numpy() for n, p in named.items()}))
    return actual, (mesh.experts.start, mesh.experts.stop)


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
@pytest.mark.parametrize(
    ("name", "layout", "micro"),
    [("1f1b", Layout(2, 1, 2), 3), ("dualpipe", Layout(2, 1, 2), 4), ("zbv", Layout(2, 2, 1), 4),
     ("gpipe", Layout(1, 1, 4, node=2), 2)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_pipeline_expert_and_data_parallel_match_one_process(name, layout, micro, fp8):
    """One step with the gates' choice, and one that replays other experts."""
    actual = on_ranks(layout.world, on_a_rank_of_a_mesh, name, layout, micro, fp8)
    totals = []
    for step, make in enumerate((lambda number: batch(number, False), replayed)):
        total, grads = whole(layout.dp * layout.ep * micro, CFG, fp8, False, make)
        totals.append(total)
        # in FP8, tiles along tokens start with each rank's own tokens, so weight gradients round differently
        assert sum(steps[step][0] for steps, _ in actual) == pytest.approx(total, rel=1e-6)
        for steps, (begin, end) in actual:
            for parameter, grad in steps[step][1].items():
                expected = grads[parameter][begin:end] if ".experts." in parameter else grads[parameter]
                error = (torch.from_numpy(grad) - expected).norm() / expected.norm()
                assert error < (0.06 if fp8 else 3e-6), (step, parameter, float(error))
    assert abs(totals[1] - totals[0]) > 1e-4 * totals[0], "other experts, another loss"


def whole(micro, cfg, fp8, segmented, make=None):
    model, total = model_of(cfg, fp8), 0.0
    for number in range(micro):
        b = batch(number, segmented) if make is None else make(number)
        out = model.train_outputs(b.tokens_BT, b.segments, choice_BTLK=b.extras.get("choice_BTLK"))
        loss = next_token.of(out, model.head_weight, b, **TERMS).total
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(name, ranks, micro, cfg=CFG, fp8=False, segmented=False, bound=2e-6):
    actual = on_ranks(ranks, on_a_rank, name, ranks, micro, cfg, fp8, segmented)
    total, grads = whole(micro, cfg, fp8, segmented)
    assert sum(loss for loss, _ in actual) == pytest.approx(total, rel=1e-6)
    n_held = set()
    for _, on_rank in actual:
        n_held |= on_rank.keys()
        for parameter, grad in on_rank.items():
            error = (torch.from_numpy(grad) - grads[parameter]).norm()
            assert error <= bound * grads[parameter].norm(), (parameter, float(error))
    assert n_held == grads.keys()


@pytest.mark.parametrize(
    ("name", "ranks", "micro"),
    [("gpipe", 2, 3), ("1f1b", 2, 4), ("1f1b", 4, 5), ("interleaved", 2, 4), ("zb1p", 3, 4), ("zbv", 2, 4),
     ("dualpipe", 2, 4), ("dualpipe", 4, 8), ("dualpipe-v", 2, 5)],
)  # fmt: skip
def test_every_schedule_matches_the_whole_network(name, ranks, micro):
    compare(name, ranks, micro)


def test_segments_without_mtp_and_tied_weights():
    compare("1f1b", 2, 3, CFG.model_copy(update={"n_mtp": 0}), segmented=True)
    compare("dualpipe", 2, 4, segmented=True)


def test_rows_too_short_for_the_last_mtp_module():
    compare("dualpipe", 2, 4, CFG.model_copy(update={"n_mtp": 15}), segmented=True)


def test_fp8_matches_the_whole_network():
    """Every stage quantises what the whole network quantises there, so FP8 agrees too."""
    compare("dualpipe", 2, 4, fp8=True)
    compare("zb1p", 2, 3, fp8=True)


def test_slices_partition_the_layers():
    for stages in range(1, 6):
        cuts = cut(CFG, stages)
        assert [i for layers in cuts for i in layers] == list(range(CFG.n_layers)) and len(cuts) == stages
    sizes = [len(layers) for layers in cut(preset("v3"), 16)]
    assert [len(layers) for layers in cut(preset("servable"), 2)] == [5, 3], "the head counts"
    assert sizes == [4] * 15 + [1], "MTP and both uses of the head weigh as much as four layers"
    model = model_of(CFG, False)
    names = {name for stage in range(3) for name, _ in Slice(model, stage, 3).named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    for stage in range(3):
        part = Slice(model, stage, 3)
        assert all(stage in part.owners(name) for name, _ in part.named_parameters())


def test_wrong_slices_are_refused():
    model = model_of(CFG, False)
    with pytest.raises(ValueError, match=r"rank 1.*\[\(0, 1\)\].*\[\(0, 0\)\]"):
        Executor(schedule("1f1b", 2, 2), 1, {(0, 0): Slice(model, 0, 2)}, [range(2)])
