"""Training steps parallel over pipeline, experts, data and optimizer state, against the trainer on one process."""

import math
from dataclasses import replace
from itertools import cycle, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import on_ranks
from test_executor import CFG, TERMS, batch, replayed
from train_config import train_config

from bessemer.addons.accelerate.kernels import library
from bessemer.addons.accelerate.precision import tuning
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.distributed import zero1
from bessemer.addons.distributed.collective import trainer_of
from bessemer.addons.distributed.divided_matrices import divided, inside, owners
from bessemer.addons.distributed.executor import Executor
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl.losses import GRPO
from bessemer.train.flat_parameters import ALIGN, NORM_BLOCK, placed
from bessemer.train.muon import Run
from bessemer.train.objective import NextToken, next_token
from bessemer.train.trainer import Trainer

STEPS, CLIP, LR, GAMMA = 4, 0.05, 3e-3, 0.01
SAMPLED = GRPO(kl=0.0, constant=30, mtp_lambda=0.1)


def model_of(cfg, fp8=False):
    return set_fp8(Transformer(cfg).initialise(1), PAPER if fp8 else None)


def batches(step, lot, micro):
    return [batch(1000 * step + lot * micro + number, False) for number in range(micro)]


def config(dtype=torch.float32, terms=TERMS, clip=CLIP, **more):
    return train_config(
        tokens=1, lr=LR, gamma=GAMMA, batch_rows=1, micro_rows=1, clip=clip, terms=terms, compute_dtype=dtype, **more,
    )  # fmt: skip


def part_of(layout, name, cfg=CFG, fp8=False):
    return ModelShard(model_of(cfg, fp8), Mesh(layout, cfg), name)


def across(layout, name, cfg=CFG, fp8=False, dtype=torch.float32, state_dir=None, warn=print, bucket=1 << 14, **more):
    """This rank's trainer, with many buckets."""
    zero1.BUCKET, zero1.FILLING = bucket, 0.25
    part = part_of(layout, name, cfg, fp8)
    objective = SAMPLED if more.get("terms") == {} else next_token
    return trainer_of(
        part, objective, None, *config(dtype, **more), state_dir, model_config=cfg.model_dump(), warn=warn
    )


def samples(lot, micro, replay=True):
    """RL micro-batches, with another policy's experts to replay."""
    lot_batches = [replayed(lot * micro + number) for number in range(micro)]
    for data in lot_batches:
        choice = {"choice_BTLK": data.extras["choice_BTLK"]} if replay else {}
        data.extras = {"advantage_BT": data.loss_BT - 0.3, "old_logp_BT": -4.0 * data.loss_BT, **choice}
    return lot_batches


def alone(training):
    """The trainer, whose MTP modules are trained apart from the rest."""
    for module in training.model.mtp:
        module.apart = True
    return training


def warmed(rank, name, layout, micro, warms):
    """Two steps: their results, and how often they were warmed up."""
    training = across(layout, name)
    training.collective._warms = warms
    calls, warm = [], Executor.warm
    training.collective.executor_for(micro).warm = lambda work: (
        calls.append(tuning.allowed()),
        warm(training.collective._executor, work),
    )
    run = training.collective._executor.run
    training.collective._executor.run = lambda *arguments: (calls.append(tuning.allowed()), run(*arguments))
    values = [update(training, step, micro) for step in range(2)]
    for data in values:
        del data["train/tokens_per_second"]
    masters = {name: value.numpy() for name, value in training.optimizer.masters().items()}
    return values, masters, {name: load.numpy() for name, load in training.loads.items()}, calls


def test_warm_up_changes_nothing():
    """Metrics, weights and expert loads are bit for bit those without it. Kernels are tuned in it and never after."""
    layout = Layout(2, 1, 2)
    cold, warm = (on_ranks(layout.world, warmed, "dualpipe", layout, 4, warms) for warms in (False, True))
    for one, other in zip(cold, warm, strict=True):
        assert one[0] == other[0] and (one[3], other[3]) == ([True] * 2, [True, False, False])
        for actual, expected in ((other[1], one[1]), (other[2], one[2])):
            assert actual.keys() == expected.keys() and all((actual[name] == expected[name]).all() for name in expected)


def update(training, step, micro):
    return training.update(batches(step, training.collective.shard.pipeline_index, micro))


def on_a_rank(rank, name, layout, micro, dtype=torch.float32, fp8=False):
    training = across(layout, name, fp8=fp8, dtype=dtype)
    values = [update(training, step, micro) for step in range(STEPS)]
    weights = {name: value.numpy() for name, value in training.optimizer.masters().items()}
    moments = {n: v.float().numpy() for n, v in training.optimizer.state_dict().items() if n.startswith("m/")}
    biases = {name: gate.bias_E.numpy() for name, gate in training.gates.items()}
    n_bytes = sum(t.nbytes for g in training.optimizer.groups for t in g.moments.values())
    experts = training.collective.mesh.experts
    return values, weights, moments, biases, (experts.start, experts.stop), n_bytes


def replaying(rank, name, layout, micro):
    """The steps, and an RL step in the same processes that replays experts."""
    training = alone(across(layout, name, terms={}))
    values = training.update(samples(training.collective.shard.pipeline_index, micro))
    moments = {n: v.float().numpy() for n, v in training.optimizer.state_dict().items() if n.startswith("m/")}
    loads = {gate: load.tolist() for gate, load in training.loads.items()}
    experts = training.collective.mesh.experts.start, training.collective.mesh.experts.stop
    return on_a_rank(rank, name, layout, micro), (values, moments, loads, experts)


def at_home(lots, micro, dtype=torch.float32, fp8=False, **more):
    """The one-process trainer after the same steps, and what it logged."""

    trainer = Trainer(model_of(CFG, fp8), next_token, None, *config(dtype, **more))
    values = [trainer.update([b for lot in range(lots) for b in batches(step, lot, micro)]) for step in range(STEPS)]
    return trainer, values


LAYOUTS = [("1f1b", Layout(2, 1, 2), 3), ("dualpipe", Layout(2, 1, 2), 4), ("gpipe", Layout(1, 2, 2), 2),
           ("zbv", Layout(2, 2, 1), 4)]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "micro"), LAYOUTS, ids=str)
def test_steps_on_ranks_match_one_process(name, layout, micro):
    """Loss and norm to float32's last digits, routing biases exactly, weights within a tenth of an AdamW step (whose
    first steps divide a gradient by itself, however small)."""
    results = on_ranks(layout.world, replaying, name, layout, micro)
    actual = [steps for steps, _ in results]
    replays_as_at_home([replay for _, replay in results], layout.dp * layout.ep, micro)
    trainer, values = at_home(layout.dp * layout.ep, micro)
    weights, state = trainer.optimizer.masters(), trainer.optimizer.state_dict()
    held = set()
    for on_rank, own, moments, biases, (begin, end), _ in actual:
        for mine, expected in zip(on_rank, values, strict=True):
            for key in ("train/total", "train/loss", "train/mtp_1", "train/balance", "train/grad_norm"):
                assert mine[key] == pytest.approx(expected[key], rel=1e-4), key
            if layout.ep > 1:  # at most once to the other rank, in every sparse layer and MTP module
                sparse = CFG.n_layers - CFG.n_dense_layers + CFG.n_mtp
                assert 0.2 * sparse < mine["moe/sent_bytes/node"] / (4 * CFG.dim) <= sparse
        held |= own.keys()
        for parameter, value in own.items():
            part = slice(begin, end) if ".experts." in parameter else slice(None)
            moved = (torch.from_numpy(value) - weights[parameter][part]).abs().max()
            assert moved < 0.1 * LR, (parameter, float(moved))
            m = torch.from_numpy(moments[f"m/{parameter}"])
            assert (m - state[f"m/{parameter}"][part]).norm() <= 1e-3 * m.norm() + 1e-9, parameter
        for gate, bias in biases.items():
            assert torch.equal(torch.from_numpy(bias), trainer.gates[gate].bias_E), gate
    assert held == weights.keys()


def replays_as_at_home(actual, lots, micro):
    """Metrics, gradients (the first moments after one step) and expert loads."""

    def step(replay):
        trainer = alone(Trainer(model_of(CFG), SAMPLED, None, *config(terms={})))
        return trainer, trainer.update([b for lot in range(lots) for b in samples(lot, micro, replay)])

    (trainer, expected), (without, _) = step(True), step(False)
    state, free = trainer.optimizer.state_dict(), without.optimizer.state_dict()
    assert (state["m/layers.3.ffn.experts.w2"] - free["m/layers.3.ffn.experts.w2"]).norm() > 0.1 * state[
        "m/layers.3.ffn.experts.w2"
    ].norm()
    for values, moments, loads, (begin, end) in actual:
        for key in ("ratio", "entropy", "clip_share", "logp_gap", "logp_gap_max", "sampler_kl", "mtp_1", "grad_norm"):
            assert values[f"train/{key}"] == pytest.approx(expected[f"train/{key}"], rel=1e-5, abs=1e-7), key
        for name, value in moments.items():
            part = slice(begin, end) if ".experts." in name else slice(None)
            m = torch.from_numpy(value)
            assert (m - state[name][part]).norm() <= 1e-4 * m.norm() + 1e-9, name
        assert all(load == trainer.loads[gate].tolist() for gate, load in loads.items())


def test_moments_are_sharded():
    """dp 4: each rank holds a quarter of the moments that one process holds, up to padding."""
    actual = on_ranks(4, on_a_rank, "gpipe", Layout(1, 4, 1), 1)
    trainer, _ = at_home(1, 1)
    n_bytes = sum(t.nbytes for g in trainer.optimizer.groups for t in g.moments.values())
    assert all(n_bytes / 4 <= n_held < n_bytes / 4 + 200_000 for *_, n_held in actual)


def test_bfloat16_and_fp8_steps_match_one_process():
    """All ranks end with the same weights, and with losses and norms near those of one process."""
    for fp8 in (False, True):
        actual = on_ranks(2, on_a_rank, "gpipe", Layout(1, 1, 2), 2, torch.bfloat16, fp8)
        _, values = at_home(2, 2, torch.bfloat16, fp8)
        for on_rank, *_ in actual:
            for own, expected in zip(on_rank, values, strict=True):
                assert own["train/total"] == pytest.approx(expected["train/total"], rel=2e-3)
                assert own["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=5e-2)
        assert all((actual[0][1][n] == actual[1][1][n]).all() for n in actual[0][1] if ".experts." not in n)


def with_few(rank, name, layout, fp8, phases):
    """Three micro-batches where four are needed, so one of them is a filler."""
    training = across(layout, name, fp8=fp8)
    training.model.set_recompute(phases)
    values = training.update(training.collective.mine(batches(0, 0, 3)))
    loads = {gate: load.numpy() for gate, load in training.loads.items()}
    return values, training.rows, training.tokens, loads


@pytest.mark.parametrize(
    ("name", "layout", "fp8", "phases"),
    [("gpipe", Layout(1, 2, 1), False, ()), ("gpipe", Layout(1, 1, 2), True, ()),
     ("dualpipe", Layout(2, 1, 1), False, ("attend",))],
    ids=str,
)  # fmt: skip
def test_fillers_do_not_count_in_loads(name, layout, fp8, phases):
    """They do not count as rows or tokens, in the loss, or in what moves the routing biases and gives MaxVio: with MTP,
    in FP8, and if backward recomputes the gate."""
    trainer = Trainer(model_of(CFG, fp8), next_token, None, *config())
    expected = trainer.update(batches(0, 0, 3))
    routed = {gate: CFG.n_activated_experts * 3 * 2 * (13 if gate == "mtp0" else 14) for gate in trainer.gates}
    counts = set()
    for values, rows, tokens, loads in on_ranks(2, with_few, name, layout, fp8, phases):
        assert (rows, tokens) == (trainer.rows, trainer.tokens)
        for key in ("train/total", "train/balance", "train/grad_norm"):
            assert values[key] == pytest.approx(expected[key], rel=1e-3 if fp8 else 1e-5), key
        for gate, load in loads.items():
            assert load.sum() == routed[gate], gate
            assert (load == trainer.loads[gate].numpy()).all(), gate
            assert values[f"moe/max_vio/{gate}"] == expected[f"moe/max_vio/{gate}"]
        counts |= loads.keys()
    assert counts == trainer.loads.keys()


def padded(lot, micro):
    """Micro-batches of different lengths."""
    rows = []
    for number, data in enumerate(batches(0, lot, micro)):
        data.loss_BT[:, 14 - 3 * number - 4 :] = 0  # of 14 tokens
        rows.append(Batch(data.tokens_BT[:, : 14 - 2 * number], data.loss_BT[:, : 14 - 2 * number]))
    return rows


def with_padding(rank, name, layout, kernels):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.VARIABLE, kernels)
        library.forget()
        return padding_left_out(name, layout)


def padding_left_out(name, layout):
    training = across(layout, name, counts_padding=False)
    training.model.set_recompute(("attend",))
    training.update(training.collective.mine(padded(0, 3)))
    return {gate: load.numpy() for gate, load in training.loads.items()}


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("gpipe", Layout(1, 2, 1)), ("dualpipe", Layout(2, 1, 1))],
    ids=str,
)
def test_padding_does_not_count_in_loads(name, layout, kernels):
    """Backward recomputes the gates of a micro-batch after forward has met shorter ones."""
    trainer = Trainer(model_of(CFG), next_token, None, *config(counts_padding=False))
    trainer.update(padded(0, 3))
    lengths = [row.nonzero()[0].max() + 1 for data in padded(0, 3) for row in data.loss_BT.numpy()]
    for gate, load in trainer.loads.items():
        assert load.sum() == sum(length - (gate == "mtp0") for length in lengths) * CFG.n_activated_experts, gate
    counts = set()
    for loads in on_ranks(2, with_padding, name, layout, kernels):
        assert all((load == trainer.loads[gate].numpy()).all() for gate, load in loads.items())
        counts |= loads.keys()
    assert counts == trainer.loads.keys()


def without_mtp(rank, layout):
    """lambda 0: the MTP modules neither run nor count tokens."""
    training = across(layout, "1f1b", terms=TERMS | {"mtp_lambda": 0.0})
    return training.update(batches(0, 0, 2)), [reading(layout, ahead) for ahead in (False, True)]


def reading(layout, ahead):
    """Three steps that read rows, the last with a single row."""
    training, requests, logged = across(layout, "1f1b", read_ahead=ahead), [], []
    plan, T = training.plan, batch(0, False).tokens_BT.shape[1]
    plan.tokens, plan.batch_rows = 5 * T, lambda tokens: 2 if tokens < 4 * T else 1

    def rows(first, n):
        requests.append((training.reading // T, first, n))
        return batch(first, False).rows(0, n)

    training.batches, training.log = rows, lambda step, tokens, values: logged.append(values["train/total"])
    assert training.run()
    return requests, logged, training.tokens // T, training.rows


def test_zero_mtp_weight_skips_mtp_and_reading_ahead_is_exact():
    results = on_ranks(2, without_mtp, Layout(2, 1, 1))
    for _, (plain, ahead) in results:
        assert plain == ahead and plain[2:] == (5, 5)
        assert plain[0] == [(0, 0, 1), (0, 1, 1), (2, 2, 1), (2, 3, 1), (4, 4, 1)]
    actual = [values for values, _ in results]
    model = model_of(CFG)
    model.train()
    losses = [next_token(model, b, 0.0, TERMS["balance_alpha"]) for b in batches(0, 0, 2)]
    total = sum(float(loss.total.detach()) for loss in losses) / sum(float(loss.tokens) for loss in losses)
    for values in actual:
        assert values["train/total"] == pytest.approx(total, rel=1e-5)
        assert "moe/max_vio/mtp0" not in values


def poisoned(rank, layout):
    warnings = []
    training = across(layout, "1f1b", warn=warnings.append)
    if rank == 1:  # the last stage of the pipeline
        with torch.no_grad():
            training.model.head.weight[3, 3] = float("nan")
    earlier = {name: value.clone() for name, value in training.optimizer.masters().items()}
    message = update(training, 0, 2)
    later = training.optimizer.masters().items()
    return message, warnings, all(torch.equal(value, earlier[name]) or name == "head.weight" for name, value in later)


def test_nonfinite_step_on_one_rank_is_skipped_on_all():
    actual = on_ranks(2, poisoned, Layout(2, 1, 1))
    for message, warnings, untouched in actual:
        assert message == {"train/skipped": 1} and untouched
        assert all(words in warnings[0] for words in ("micro-batch 0 on rank 1", "not finite", "step 1, rows 0 to 3"))


class BothInfinities(NextToken):
    signs = cycle((1, -1))

    def of(self, *arguments, **terms):
        loss = super().of(*arguments, **terms)
        return replace(loss, total=loss.total * math.inf * next(self.signs))


def infinite(rank, layout):
    training, warnings = across(layout, "gpipe"), []
    training.warn = warnings.append
    training.objective = BothInfinities()
    return update(training, 0, 2), warnings


def test_losses_of_both_infinities_skip_the_step():
    for message, warnings in on_ranks(2, infinite, Layout(1, 2, 1)):
        assert message == {"train/skipped": 1} and "not finite" in warnings[0]


def with_muon(rank, name, layout, micro):
    training = across(layout, name, optimizer="muon")
    values = [update(training, step, micro) for step in range(STEPS)]
    weights = {name: value.numpy() for name, value in training.optimizer.masters().items()}
    muon = [g for g in training.optimizer.groups if "v" not in g.moments]
    own, cut = sum(g.moments["m"].numel() for g in muon), sum(len(g.divided.mine) for g in muon)
    return values, weights, (training.collective.mesh.experts.start, training.collective.mesh.experts.stop), own, cut


@pytest.mark.parametrize(("name", "layout", "micro"), [("dualpipe", Layout(2, 1, 2), 4), ("gpipe", Layout(1, 4, 1), 1)])
def test_muon_orthogonalises_whole_matrices(name, layout, micro):
    """Shares end within matrices; the weights equal those of one process to a tenth of a step."""
    actual = on_ranks(layout.world, with_muon, name, layout, micro)
    trainer, values = at_home(layout.dp * layout.ep, micro, optimizer="muon")
    weights, matrices = trainer.optimizer.masters(), model_of(CFG).hidden_matrices()
    for on_rank, own, (begin, end), *_ in actual:
        for mine, expected in zip(on_rank, values, strict=True):
            assert mine["train/total"] == pytest.approx(expected["train/total"], rel=1e-4)
        for parameter, value in own.items():
            part = slice(begin, end) if ".experts." in parameter else slice(None)
            moved = (torch.from_numpy(value) - weights[parameter][part]).abs().max()
            assert moved < 0.1 * LR, (parameter, float(moved))
    complete = sum(p.numel() for n, p in model_of(CFG).named_parameters() if n in matrices)
    assert sum(cut for *_, cut in actual) >= 3, "some matrices lie in two shares"
    if layout.dp == 4:  # a rank has a fourth, and the padding of these small buckets
        assert all(complete / 4 <= own < 1.3 * complete / 4 for *_, own, _ in actual)


def matrices(name, ep):
    """The matrices of Muon on a rank of this shape, (number, (rows, columns)), of experts and of the rest."""
    with torch.device("meta"):
        model = Transformer(preset(name))
    actual = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if stacked := model.hidden_matrices().get(name):
            expert = ".experts." in name
            number = stacked * (parameter.shape[0] // ep if expert else 1)
            actual[expert].append((number, (parameter.shape[-2] // stacked, parameter.shape[-1])))
    return actual


@pytest.mark.parametrize(("world", "ep"), [(8, 1), (64, 1), (128, 8), (512, 8)])
def test_muon_shards_have_little_padding(world, ep):
    """V2-Lite's shapes. A dense matrix is larger than a share of 128; it is whole on one of those that hold it."""
    for expert, actual in matrices("v2-lite", ep).items():
        shares = world // ep if expert else world
        sizes, work = [number * math.prod(shape) for number, shape in actual], [0.0] * shares
        assert sum(sizes) <= zero1.vector_size(sizes, shares) < 1.01 * sum(sizes)
        for part in zero1.buckets(sizes, shares):
            starts, size = placed(sizes[part], shares)
            runs = [Run(start, *one) for start, one in zip(starts, actual[part], strict=True)]
            share = size // shares
            cut = divided(runs, share)
            for run, owner in zip(cut, owners(runs, share, work), strict=True):
                assert run.start < (owner + 1) * share and run.start + run.numel > owner * share
            complete = [inside(runs, rank * share, (rank + 1) * share) for rank in range(shares)]
            places = [one.start + i * one.numel for one in cut for i in range(one.n)]
            places += [rank * share + one.start + i * one.numel for rank, some in enumerate(complete)
                       for one in some for i in range(one.n)]  # fmt: skip
            assert sorted(places) == [one.start + i * one.numel for one in runs for i in range(one.n)]
        dearest = max(run.cost / run.n for run in (Run(0, *one) for one in actual))
        assert max(work) < sum(work) / shares + 3 * dearest, "the work is spread"


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 5))
def test_parameters_do_not_overlap_in_buckets(sizes, shares):
    parts = [sizes[part] for part in zero1.buckets(sizes, shares)]
    assert [size for part in parts for size in part] == sizes and all(parts)
    starts, size = placed(sizes, shares)
    assert size % (shares * NORM_BLOCK) == 0 and all(start % ALIGN == 0 for start in starts)
    spans = sorted(zip(starts, (start + n for start, n in zip(starts, sizes, strict=True)), strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans)) and spans[-1][1] <= size
