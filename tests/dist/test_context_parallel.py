"""Rows cut over ranks: attention alone, then loss, gradients and steps, against the same rows on one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from test_distributed_trainer import LR, config
from test_executor import CFG, TERMS, choice

from bessemer.addons.accelerate.precision import fp8_layers as fp8
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.distributed import context_attention, model_shard
from bessemer.addons.distributed.collective import trainer_of
from bessemer.addons.distributed.context_attention import Cut, FP8Core, attention, blocks, latent_core, runs_of
from bessemer.addons.distributed.context_parallel import Context
from bessemer.addons.distributed.mesh import Layout, Mesh, check, describe, nearest
from bessemer.addons.distributed.model_shard import ModelShard
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer
from bessemer.train import loss
from bessemer.train.objective import NextToken, next_token
from bessemer.train.trainer import Trainer

T = 24


def batch(number, segmented=False):
    tokens = torch.randint(0, CFG.vocab_size, (2, T), generator=torch.Generator().manual_seed(number))
    loss = torch.ones(2, T)
    loss[:, 0] = 0
    loss[1, 17:] = 0
    segments = torch.tensor([[0] * 7 + [1] * 17, [0] * 13 + [1] * 3 + [2] * 8]) if segmented else None
    return Batch(tokens, loss, segments)


class Replaying(NextToken):
    """Replays the experts that a batch prescribes, if any."""

    def __call__(self, model, batch, **terms):
        out = model.train_outputs(batch.tokens_BT, batch.segments, choice_BTLK=batch.extras.get("choice_BTLK"))
        return self.of(out, model.head_weight, batch, **terms)


def prescribed(number, segmented):
    """A batch; one without segments replays experts."""
    data = batch(number, segmented)
    return data if segmented else replace(data, extras={"choice_BTLK": choice(data.tokens_BT, number)})


def close(actual, expected, bound):
    return float((actual - expected).norm()) <= bound * float(expected.norm())


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("n", "size", "short"), [(1, 130, 0), (2, 100, 3), (4, 70, 1), (3, 64, 0)])
def test_every_query_meets_every_visible_key_once(n, size, short, segmented, monkeypatch):
    monkeypatch.setattr(context_attention, "KEYS", 48)
    length = 2 * n * size
    borders = torch.tensor([[0, 1, 40, 47, 100, 101], [0, 0, 64, 130, 150, 199]])
    segments = (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1) if segmented else None
    for rank in range(n):
        cut = Cut(None, n, rank, size, runs_of(segments))
        t = 2 * size - (short if rank == 0 else 0)
        here = torch.cat([torch.arange(size) + own * size for own in cut.own])[:t]
        counts = torch.zeros(2, t, length, dtype=torch.int32)
        for keys, pairs in blocks(cut, t):
            begin = keys.chunk * size + keys.first
            for rows, queries, seen, causal in pairs:
                n_queries, n_keys = queries.stop - queries.start, seen.stop - seen.start
                visible = torch.ones(n_queries, n_keys, dtype=torch.int32)
                counts[rows, queries, begin + seen.start : begin + seen.stop] += visible.tril() if causal else visible
        expected = torch.arange(length) <= here[:, None]
        if segmented:
            expected = expected & (segments[:, here, None] == segments[:, None])
        assert torch.equal(counts, expected.int().expand(2, -1, -1))


def attend_on_a_rank(rank, n, segmented, dtype):
    layer, x, dy, segments = one_layer(segmented, dtype)
    context = Context(dist.group.WORLD, n, rank)
    cut, mine = Cut(dist.group.WORLD, n, rank, T // (2 * n), runs_of(segments)), context.positions(T)
    rope = rope_of(T)[mine]
    own = x[:, mine].clone().requires_grad_()
    y = attention(layer.attn, own, rope, cut)
    y.backward(dy[:, mine])
    grads = {name: p.grad.float() for name, p in layer.attn.named_parameters()}
    for grad in grads.values():
        dist.all_reduce(grad)
    return mine.numpy(), y.detach().float().numpy(), own.grad.float().numpy(), {k: v.numpy() for k, v in grads.items()}


def one_layer(segmented, dtype):
    layer = Transformer(CFG).initialise(3).to_compute(dtype).layers[1]
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(2, T, CFG.dim, generator=draw).to(dtype) for _ in range(2))
    return layer, x, dy, batch(0, segmented).segments_BT


def rope_of(length):
    return Transformer(CFG).rope_table(length)


@pytest.mark.parametrize(("n", "segmented", "dtype"), [(2, False, torch.float32), (3, True, torch.float32),
                                                       (4, True, torch.bfloat16)])  # fmt: skip
def test_context_parallel_attention_matches_whole_rows(n, segmented, dtype):
    """Output and gradients of the input and of every weight: float32 to its last digits, BF16 within its rounding."""
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    layer, x, dy, segments = one_layer(segmented, dtype)
    x.requires_grad_()
    y = layer.attn(x, rope_of(T), segments)
    y.backward(dy)
    for positions, theirs, dx, grads in on_ranks(n, attend_on_a_rank, n, segmented, dtype):
        assert close(torch.from_numpy(theirs), y.detach()[:, positions].float(), bound)
        assert close(torch.from_numpy(dx), x.grad[:, positions].float(), 2 * bound)
        for name, parameter in layer.attn.named_parameters():
            assert close(torch.from_numpy(grads[name]), parameter.grad.float(), 2 * bound), name


SCALE, HEADS, NOPE, ROPE, VALUE, RANK_C = 0.2, 3, 8, 4, 6, 16


def core_case(length, dtype=torch.float32):
    """Queries, latents, W_UKV, the output's gradient, and segments; the values are narrower than the keys."""
    draw = torch.Generator().manual_seed(5)
    shapes = (2, length, HEADS, NOPE + ROPE), (2, length, RANK_C + ROPE), (HEADS * (NOPE + VALUE), RANK_C)
    q, latent, weight, dout = (
        torch.randn(shape, generator=draw).to(dtype) for shape in (*shapes, (2, length, HEADS, VALUE))
    )
    segments = torch.stack((torch.arange(length) // 37, torch.arange(length) // 90))
    return q, latent, weight, dout, segments


def whole_rows(length, dtype, segmented):
    """Output and gradients of q and latents in one piece: by the formula in float64, else by torch's attention."""
    q, latent, weight, dout, segments = core_case(length, dtype)
    q, latent = q.requires_grad_(), latent.requires_grad_()
    k, v = (latent[..., :RANK_C] @ weight.T).unflatten(-1, (HEADS, -1)).split([NOPE, VALUE], -1)
    k = torch.cat((k, latent[..., None, RANK_C:].expand(-1, -1, HEADS, -1)), -1)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, -1, -1)
    if segmented:
        mask = mask & (segments[:, :, None] == segments[:, None])
    if dtype == torch.float64:
        score = torch.einsum("bqhx,bkhx->bhqk", q, k).mul(SCALE).masked_fill(~mask[:, None], float("-inf"))
        out = torch.einsum("bhqk,bkhv->bqhv", score.softmax(-1), v)
    else:
        heads = (x.transpose(1, 2) for x in (q, k, F.pad(v, (0, NOPE + ROPE - VALUE))))
        out = F.scaled_dot_product_attention(*heads, mask[:, None], scale=SCALE)[..., :VALUE].transpose(1, 2)
    out.backward(dout)
    return out.detach(), q.grad, latent.grad


def core_on_a_rank(rank, n, length, segmented):
    context_attention.KEYS = 16
    q, latent, weight, dout, segments = core_case(length)
    context = Context(dist.group.WORLD, n, rank)
    own = context.positions(length)
    cut = Cut(dist.group.WORLD, n, rank, length // (2 * n), runs_of(segments if segmented else None))
    q, latent = (x[:, own].clone().requires_grad_() for x in (q, latent))
    out = latent_core(q, latent, weight, SCALE, cut)
    out.backward(dout[:, own])
    return own.numpy(), [x.numpy() for x in (out.detach(), q.grad, latent.grad)]


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_blocks_merge_as_exactly_as_whole_rows(n, segmented):
    """Against float64, in many blocks: at most twice the error that torch's attention makes over whole rows."""
    exact, single = (whole_rows(160, dtype, segmented) for dtype in (torch.float64, torch.float32))
    outcomes = on_ranks(n, core_on_a_rank, n, 160, segmented)
    for kind, (right, plain) in enumerate(zip(exact, single, strict=True)):
        actual = torch.zeros_like(right)
        for own, results in outcomes:
            actual[:, own] = torch.from_numpy(results[kind]).double()
        assert (actual - right).norm() < 2 * (plain.double() - right).norm() < 1e-5 * right.norm()


def fp8_attention(x, dy, rope, segments, **core):
    """Output and gradients of the input and of the weights, in FP8."""
    layer = Transformer(CFG).initialise(3).layers[1].train()
    x = x.clone().requires_grad_()
    y = fp8.attention(layer.attn_norm, layer.attn, x, rope, segments, PAPER, **core)
    y.backward(dy)
    weights = {"norm": layer.attn_norm.weight, **dict(layer.attn.named_parameters())}
    return y.detach(), x.grad, {name: weight.grad for name, weight in weights.items()}


def fp8_case(n, own_chunks):
    """Chunks of 128 tokens, so that tiles along tokens are those of whole rows. `own_chunks`: no token attends to
    another chunk."""
    draw, length, rows = torch.Generator().manual_seed(1), 256 * n, 4 // n
    x, dy = (torch.randn(rows, length, CFG.dim, generator=draw) for _ in range(2))
    position = torch.arange(length).expand(rows, -1)
    return x, dy, rope_of(length), position // 128 if own_chunks else (position > 150).long()


def fp8_on_a_rank(rank, n):
    outputs = []
    context = Context(dist.group.WORLD, n, rank)
    for own_chunks in (True, False):
        x, dy, rope, segments = fp8_case(n, own_chunks)
        cut = Cut(dist.group.WORLD, n, rank, 128, runs_of(segments))
        mine = context.positions(x.shape[1])
        y, dx, grads = fp8_attention(x[:, mine], dy[:, mine], rope[mine], segments, core=FP8Core(cut))
        for grad in grads.values():
            dist.all_reduce(grad)
        outputs.append((mine.numpy(), y.numpy(), {"x": dx.numpy(), **{k: v.numpy() for k, v in grads.items()}}))
    return outputs


@pytest.mark.parametrize("n", [2, 4])
def test_context_parallel_fp8_attention_matches_whole_rows(n):
    """If no token attends to another chunk, equal except where the last digits flip a rounding. Otherwise the keys'
    gradients are quantised in parts, and are as far from the exact ones as those of whole rows."""
    for own_chunks, outputs in zip((True, False), zip(*on_ranks(n, fp8_on_a_rank, n), strict=True), strict=True):
        x, dy, rope, segments = fp8_case(n, own_chunks)
        y, dx, grads = fp8_attention(x, dy, rope, segments)
        layer, x = Transformer(CFG).initialise(3).layers[1], x.requires_grad_()
        layer.attn(layer.attn_norm(x), rope, segments).backward(dy)
        exact = {"norm": layer.attn_norm.weight.grad, **{k: p.grad for k, p in layer.attn.named_parameters()}}
        for positions, y_theirs, gradients in outputs:
            assert close(torch.from_numpy(y_theirs), y[:, positions], 1e-5)
            for name, expected, right in [
                ("x", dx[:, positions], x.grad[:, positions]),
                *((k, grads[k], exact[k]) for k in grads),
            ]:
                actual = torch.from_numpy(gradients[name])
                assert close(actual, expected, 2e-3 if own_chunks else 0.08), name
                assert (actual - right).norm() < 1.1 * (expected - right).norm(), name


# --- a step -----------------------------------------------------------------------------------------------------------


def gradients_on_a_rank(rank, layout, name, micro, segmented, recompute):
    model = stepped(recompute)
    part = ModelShard(model, Mesh(layout, CFG), name)
    settings = config(counts_padding=segmented)
    training = trainer_of(part, Replaying(), None, *settings, model_config=CFG.model_dump(), warn=print)
    batches = [prescribed(part.pipeline_index * micro + number, segmented) for number in range(micro)]
    model.train()
    sums = training.collective.accumulate(batches, TERMS)
    grads = {}
    for parameter, p in part.model.named_parameters():
        dist.all_reduce(p.grad, group=part.mesh.group["expert" if ".experts." in parameter else "dense"])
        grads[parameter] = p.grad.numpy()
    loads = {gate: router.load_E.numpy() for gate, router in part.gates.items()}
    return sums.values, (sums.divisor, sums.tokens, sums.rows), grads, loads, part.mesh.experts.start


def stepped(recompute):
    model = Transformer(CFG).initialise(1)
    return set_fp8(model, PAPER) if recompute == "fp8" else model.set_recompute(recompute)


STEPS = [
    (Layout(cp=2), "gpipe", 1, False, ()),
    (Layout(cp=4), "gpipe", 2, True, ()),
    (Layout(pp=2, cp=2), "1f1b", 3, True, ("attend", "experts")),
    (Layout(pp=2, cp=2), "dualpipe", 4, False, ()),
    (Layout(ep=2, cp=2), "gpipe", 2, False, ()),
    (Layout(dp=2, cp=2), "gpipe", 1, True, ()),
    (Layout(pp=2, cp=2), "dualpipe", 4, True, "fp8"),
    (Layout(ep=2, cp=2), "gpipe", 2, False, "fp8"),
]


@pytest.mark.parametrize(("layout", "name", "micro", "segmented", "recompute"), STEPS, ids=str)
def test_a_context_parallel_step_matches_one_process(layout, name, micro, segmented, recompute):
    """Every metric and gradient, MTP and balance terms included, to float32's last digits; loads exactly, without what
    follows a row's last trained token where rows are not segmented. In FP8 the keys' gradients and the tiles along
    tokens are rounded in other parts."""
    actual = on_ranks(layout.world, gradients_on_a_rank, layout, name, micro, segmented, recompute)
    model, bound = stepped(recompute), 0.1 if recompute == "fp8" else 2e-5
    trainer = Trainer(model, Replaying(), None, *config(counts_padding=segmented))
    model.train()
    sums = trainer.collective.accumulate(
        [prescribed(n, segmented) for n in range(layout.dp * layout.ep * micro)], TERMS
    )
    parameters = dict(model.named_parameters())
    names = set()
    for values, counted, grads, loads, first in actual:
        assert counted == (sums.divisor, sums.tokens, sums.rows)
        for key, value in sums.values.items():
            assert values[key] == pytest.approx(value, rel=1e-5), key
        for gate, load in loads.items():
            assert torch.equal(torch.from_numpy(load), trainer.gates[gate].load_E), gate
        for parameter, grad in grads.items():
            expected = parameters[parameter].grad
            expected = expected[first : first + len(grad)] if ".experts." in parameter else expected
            assert close(torch.from_numpy(grad), expected, bound), parameter
        names |= grads.keys()
    assert names == parameters.keys()


def steps_on_a_rank(rank, layout, name, micro, folder, first, count):
    """Some steps from the checkpoint that is there, then the held-out loss and a checkpoint."""
    part = ModelShard(Transformer(CFG).initialise(1), Mesh(layout, CFG), name)
    training = trainer_of(part, next_token, None, *config(), folder, model_config=CFG.model_dump(), warn=print)
    assert training.start() == (first > 0)
    lots = [
        range(part.pipeline_index * micro + 100 * step, (part.pipeline_index + 1) * micro + 100 * step)
        for step in range(first, first + count)
    ]
    values = [training.update([batch(n) for n in lot]) for lot in lots]
    nats = model_shard.heldout_nats(part, [batch(n) for n in range(1000, 1003)])
    training.save()
    training.finish()
    weights = {n: t.numpy() for n, t in training.optimizer.masters().items()}
    biases = {gate: router.bias_E.numpy() for gate, router in part.gates.items()}
    return values, nats, weights, biases, (training.rows, training.tokens)


def test_context_parallel_steps_heldout_loss_and_resume_without_it(tmp_path):
    """Two steps over cut rows and two over whole ones equal four steps of one process."""
    cut = on_ranks(4, steps_on_a_rank, Layout(pp=2, cp=2), "1f1b", 2, tmp_path, 0, 2)
    remainder = on_ranks(2, steps_on_a_rank, Layout(pp=2), "1f1b", 2, tmp_path, 2, 2)
    trainer = Trainer(Transformer(CFG).initialise(1), next_token, None, *config())
    for step in range(4):
        expected = trainer.update([batch(100 * step + n) for n in range(2)])
        for values, *_ in cut if step < 2 else remainder:
            for key in ("train/total", "train/loss", "train/mtp_1", "train/balance", "train/grad_norm"):
                assert values[step % 2][key] == pytest.approx(expected[key], rel=1e-4), (step, key)
        if step % 2 == 0:
            continue
        nats, tokens = loss.heldout_nats(trainer.model, [batch(n) for n in range(1000, 1003)])
        masters = trainer.optimizer.masters()
        for _, theirs, weights, biases, counted in cut if step < 2 else remainder:
            assert theirs == (pytest.approx(nats, rel=1e-4), tokens) and counted == (trainer.rows, trainer.tokens)
            for name, weight in weights.items():
                assert (torch.from_numpy(weight) - masters[name]).abs().max() < 0.1 * LR, name
            for gate, bias in biases.items():
                assert torch.equal(torch.from_numpy(bias), trainer.gates[gate].bias_E), gate
    for name in cut[0][2]:
        assert (cut[0][2][name] == cut[1][2][name]).all(), "the ranks of a row have the same weights to the bit"


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match=r"26 tokens.*4 equal chunks.*24"):
        Context(None, 2, 0).positions(26)
    with pytest.raises(UserError, match=r"cp 4 on 6 ranks.*4 ranks"):
        check(Layout(cp=4), CFG, 6)
    assert all(near.cp == 2 for near in nearest(Layout(cp=2, dp=2), CFG, 8))
    assert all(near.cp == 1 for near in nearest(Layout(cp=3), CFG, 8))
    assert "pipeline 0, copy 0, piece 1: 2 3" in describe(Layout(ep=2, cp=2))
