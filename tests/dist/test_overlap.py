"""Overlapped pairs: the bits of a forward followed by a backward, whatever overlaps with what."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from allocator import live_bytes
from ranks import on_ranks
from test_executor import CFG, TERMS, batch, model_of, whole

from bessemer.addons.distributed import chunk
from bessemer.addons.distributed.chunk import Chunk, Overlapped, Serial
from bessemer.addons.distributed.executor import Executor, Work
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_slice import Slice, keep_experts
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.table import Action, Pair, Table, actions
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.train import balance
from bessemer.train.objective import balance_weight, next_token


class Jittery(Overlapped):
    """Exchanges that take a random time."""

    def __init__(self, seed):
        super().__init__(torch.device("cpu"))
        self.random = torch.Generator().manual_seed(seed)

    def run(self, exchange, phase, after):
        pause = 4e-3 * float(torch.rand((), generator=self.random)) if exchange else 0.0

        def slow():
            time.sleep(pause)
            phase()

        return super().run(exchange, slow, after)


def work_of(b):
    return Work(b.tokens_BT, None, lambda out, head: next_token.of(out, head, b, **TERMS).total,
                balance_weight(b, TERMS["balance_alpha"]))  # fmt: skip


def apart(table: Table) -> Table:
    """The same work without pairs."""
    return replace(table, steps=tuple(tuple(actions(steps)) for steps in table.steps))


def step(table, pipelines, rank, cfg, fp8, exchange, experts, first, streams):
    """(losses, gradients, loads) of one step of a fresh model."""
    model = model_of(cfg, fp8)
    if experts is not None:
        keep_experts(model, experts)
    slices = {(lane, stage): Slice(model, stage, table.stages, exchange) for lane, stage in table.slices_on(rank)}
    gates = {name: gate for name, gate in model.gates().items() if any(name in part.gates for part in slices.values())}
    executor = Executor(table, rank, slices, pipelines, lambda: balance.uncounted(gates), streams)
    work = []
    for lane in range(table.lanes):
        batches = [batch(first + lane * table.per_lane + m, False) for m in range(table.per_lane)]
        work.append([work_of(data) for data in batches])
    executor.run(work)
    grads = {n: p.grad for part in slices.values() for n, p in part.named_parameters() if p.grad is not None}
    return executor.losses, grads, {name: gate.load_E.clone() for name, gate in gates.items()}


def different(actual, expected):
    """Names of everything that differs in any bit."""
    (losses, grads, loads), (losses_, grads_, loads_) = actual, expected
    assert grads.keys() == grads_.keys() and loads.keys() == loads_.keys()
    names = [name for name in grads if not torch.equal(grads[name], grads_[name])]
    return names + [name for name in loads if not torch.equal(loads[name], loads_[name])] + [
        "losses" for _ in range(losses != losses_)]  # fmt: skip


def on_a_rank(rank, name, layout, micro, cfg, fp8):
    mesh = Mesh(layout, cfg)
    table, exchange = schedule(name, layout.pp, micro), None if layout.ep == 1 else mesh.exchange()
    run = partial(
        step, pipelines=layout.groups("pp"), rank=mesh.pp, cfg=cfg, fp8=fp8, exchange=exchange,
        experts=None if layout.ep == 1 else mesh.experts, first=(mesh.dp * layout.ep + mesh.ep) * micro,
    )  # fmt: skip
    expected = run(apart(table), streams=Serial())
    pairs = sum(isinstance(one, Pair) for one in table.steps[mesh.pp])
    for gate, load_E in expected[2].items():  # every token once, though backward runs gates again in FP8
        tokens = 2 * (13 if gate.startswith("mtp") else 14) * table.per_lane
        assert load_E.sum() == tokens * cfg.n_activated_experts, gate
    return (
        pairs,
        different(run(table, streams=Serial()), expected),
        different(run(table, streams=Jittery(rank)), expected),
    )


DENSE = CFG.model_copy(update={"n_layers": 5, "n_dense_layers": 3})


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
@pytest.mark.parametrize(
    ("name", "layout", "micro", "cfg"),
    [("dualpipe", Layout(2, 1, 1), 4, CFG), ("dualpipe-v", Layout(2, 1, 1), 5, DENSE),
     ("dualpipe-v", Layout(1, 1, 2), 3, CFG), ("dualpipe", Layout(2, 1, 2), 6, DENSE)],
    ids=["dualpipe", "v-and-dense", "v-on-one-rank-and-experts", "dualpipe-and-experts"],
)  # fmt: skip
def test_pairs_are_bit_identical_to_forward_then_backward(name, layout, micro, cfg, fp8):
    """Chunks of unequal layers, some of them dense, with MTP at the end. Run in sequence, and truly overlapped with
    exchanges of random length."""
    for pairs, serial, beside in on_ranks(layout.world, on_a_rank, name, layout, micro, cfg, fp8):
        assert pairs > 0 and serial == [] and beside == []


def alone(rank, fp8):
    table = schedule("1f1b", 1, 3)
    _, grads, _ = step(table, [[0]], 0, CFG, fp8, None, None, 0, Serial())
    return {name: grad.numpy() for name, grad in grads.items()}


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_phases_are_bit_identical_to_one_graph(fp8):
    """Except the embedding, where the first layer's and the MTP module's gradients are added in another order."""
    (grads,) = on_ranks(1, alone, fp8)
    _, expected = whole(3, CFG, fp8, False)
    assert grads.keys() == expected.keys()
    assert [name for name in grads if not (grads[name] == expected[name].numpy()).all()] in ([], ["embed.weight"])


def forwarded(model, data, streams):
    """The whole network as one chunk, after its forward."""
    part = Slice(model, 0, 1)

    def phases():
        out = yield from part.phases(data.tokens_BT, data.tokens_BT)
        return None, next_token.of(out, model.head.weight, data, **TERMS).total

    chunk = Chunk(phases(), streams)
    list(chunk.forward())
    return chunk


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_phases_hold_no_more_memory_than_one_graph(fp8):
    model = model_of(preset("tiny"), fp8)
    model.rope_table(64)
    data = Batch(torch.arange(256).view(4, 64), (torch.arange(64) > 0).float().repeat(4, 1), None)
    n_kept = live_bytes(lambda: forwarded(model, data, Serial()))
    assert n_kept <= 1.001 * live_bytes(lambda: next_token(model, data, **TERMS))


class Kinds(Serial):
    """Records the kind of the running phase, and the kind for which the ends of its graph are made."""

    running = made_for = None

    def run(self, exchange, phase, after):
        self.running = exchange
        phase()

    @contextmanager
    def on(self, exchange):
        self.made_for = exchange
        yield
        self.made_for = None


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
def test_gradients_arrive_on_the_stream_of_their_boundary(fp8, monkeypatch):
    """On a GPU, autograd makes a boundary's stream wait for the stream that computes its gradient. If they differed, an
    exchange would hold up the computation that overlaps with it."""
    streams, arrived = Kinds(), []

    class Output(chunk._Output):
        def __init__(self, x):
            self.made_for = streams.made_for
            super().__init__(x)

        def __setattr__(self, name, value):
            if name == "gradient" and value is not None and self.made_for is not None:
                arrived.append((self.made_for, streams.running))
            super().__setattr__(name, value)

    monkeypatch.setattr(chunk, "_Output", Output)
    list(forwarded(model_of(CFG, fp8), batch(0, False), streams).backward(None, nullcontext))
    assert {True, False} == {made_for for made_for, _ in arrived}
    assert all(made_for == running for made_for, running in arrived)


class Noted(Serial):
    """Records what ran, in order."""

    def __init__(self):
        self.ran = []

    def run(self, exchange, phase, after):
        phase()
        self.ran.append(("B" if phase.func is chunk._differentiate else "F", "exchange" if exchange else "compute"))


def noted(rank):
    """Two sparse layers, in which one micro-batch's forward overlaps with another's backward."""
    F, B = partial(Action, "F", 0), partial(Action, "B", 0)
    table = Table("a pair", 1, ((0,),), 2, ((F(0), Pair(F(1), B(0)), B(1)),))
    model = model_of(CFG.model_copy(update={"n_layers": 2, "n_dense_layers": 0, "n_mtp": 0}), False)
    streams = Noted()
    executor = Executor(table, 0, {(0, 0): Slice(model, 0, 1)}, [[0]], streams=streams)
    run = executor.store.run

    def weights(key):
        streams.ran += [("W", "compute")] * bool(executor.store)
        run(key)

    executor.store.run = weights
    executor.run([[work_of(batch(number, False)) for number in range(2)]])
    return streams.ran


def test_pair_order_matches_figure_4():
    """E.4: in each slot the exchange comes first, then what is computed meanwhile."""
    slots = [
        ("B", "exchange"), ("W", "compute"), ("F", "compute"),  # 1: combine B; previous attention W, attention F
        ("F", "exchange"), ("B", "compute"),  # 2: dispatch F; MLP B
        ("B", "exchange"), ("W", "compute"), ("F", "compute"),  # 3: dispatch B; MLP W, MLP F
        ("F", "exchange"), ("B", "compute"),  # 4: combine F; attention B
    ]  # fmt: skip
    through = ["compute", "exchange"] * 4 + ["compute"]
    pair = [("B", "compute"), *slots, *slots, ("F", "compute"), ("W", "compute")]
    expected = [("F", kind) for kind in through] + pair + [("B", kind) for kind in through]
    assert on_ranks(1, noted) == [expected]
