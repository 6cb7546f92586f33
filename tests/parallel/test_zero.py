"""Training steps with pipeline, experts, data and optimizer state in parallel against the same steps on one process."""

import pytest
import torch
from ranks import on_ranks
from test_execute import CFG, TERMS, batch, model_of

from bessemer.parallel.execute import Executor, Work
from bessemer.parallel.mesh import Layout, Mesh
from bessemer.parallel.schedules import schedule
from bessemer.parallel.stage import Slice, keep, keep_experts
from bessemer.train.objective import balance_weight, next_token, next_token_of
from bessemer.train.optim import Optimizer
from bessemer.train.zero import Zero1

STEPS, CLIP, LR = 4, 0.05, 3e-3
OPTIONS = {"moments_dtype": torch.float32, "weight_decay": 0.1}


def batches(step, lot, micro):
    return [batch(1000 * step + lot * micro + number, False) for number in range(micro)]


def work_of(table, found):
    def one(b):
        return Work(b.tokens_BT, None, lambda out, head: next_token_of(out, head, b, **TERMS).total,
                    balance_weight(b, TERMS["balance_alpha"]))  # fmt: skip

    per = table.per_lane
    return [[one(b) for b in found[lane * per : (lane + 1) * per]] for lane in range(table.lanes)]


def on_a_rank(rank, name, layout, micro, dtype):
    model, mesh = model_of(CFG, False), Mesh(layout, CFG)
    table = schedule(name, layout.pp, micro)
    keep_experts(model, mesh.experts)
    slices = {(lane, stage): Slice(model, stage, table.stages, mesh.exchange()) for lane, stage in table.held(mesh.pp)}
    keep(model, slices.values())
    held = [{stage for _, stage in table.held(p)} for p in range(layout.pp)]
    part = next(iter(slices.values()))
    shared = {n for n, _ in model.named_parameters() if sum(bool(part.owners(n) & stages) for stages in held) == 2}
    optimizer = Zero1(model, mesh, shared, compute_dtype=dtype, **OPTIONS)
    peers = [layout.rank(p, mesh.dp, mesh.ep) for p in range(layout.pp)]
    executor = Executor(table, mesh.pp, slices, peers)
    norms = []
    for step in range(STEPS):
        executor.run(work_of(table, batches(step, mesh.dp * layout.ep + mesh.ep, micro)))
        executor.sum_shared()
        norms.append(float(optimizer.grad_norm()))
        optimizer.step(LR, 100.0, norms[-1], CLIP)
    bytes_held = sum(t.nbytes for g in optimizer.groups for t in g.moments.values())
    weights = {name: value.clone().numpy() for name, value in optimizer.masters().items()}
    state = {name: value.clone().numpy() for name, value in optimizer.state_dict().items()}
    return norms, weights, state, (mesh.experts.start, mesh.experts.stop), bytes_held


def at_home(lots, micro, dtype):
    model = model_of(CFG, False)
    optimizer, norms = Optimizer(model, compute_dtype=dtype, **OPTIONS), []
    for step in range(STEPS):
        for lot in range(lots):
            for b in batches(step, lot, micro):
                next_token(model, b, **TERMS).total.backward()
        norms.append(float(optimizer.grad_norm()))
        optimizer.step(LR, 100.0, norms[-1], CLIP)
    return norms, optimizer.masters(), optimizer.state_dict()


@pytest.mark.parametrize(
    ("name", "layout", "micro"),
    [("1f1b", Layout(2, 1, 2), 3), ("dualpipe", Layout(2, 1, 2), 4), ("gpipe", Layout(1, 2, 2), 2),
     ("zbv", Layout(2, 2, 1), 4)],
    ids=str,
)  # fmt: skip
def test_steps_across_ranks_are_steps_on_one(name, layout, micro):
    """Norms to 1e-5, weights within a tenth of a step of AdamW's first (which divides by its own gradient), and every
    rank holds no more moments than its share."""
    found = on_ranks(layout.world, on_a_rank, name, layout, micro, torch.float32)
    norms, weights, state = at_home(layout.dp * layout.ep, micro, torch.float32)
    held = set()
    for theirs_norms, theirs, theirs_state, (begin, end), _ in found:
        assert theirs_norms == pytest.approx(norms, rel=1e-4)
        held |= theirs.keys()
        for parameter, value in theirs.items():
            mine = slice(begin, end) if ".experts." in parameter else slice(None)
            moved = (torch.from_numpy(value) - weights[parameter][mine]).abs().max()
            assert moved < 0.1 * LR, (parameter, float(moved))
            m = torch.from_numpy(theirs_state[f"m/{parameter}"])
            assert (m - state[f"m/{parameter}"][mine]).norm() <= 1e-3 * m.norm() + 1e-9, parameter
    assert held == weights.keys()


def test_moments_are_shared_out():
    """dp 4: each rank holds a quarter of the moments that one process holds, up to the filling."""
    found = on_ranks(4, on_a_rank, "gpipe", Layout(1, 4, 1), 1, torch.float32)
    optimizer = Optimizer(model_of(CFG, False), **OPTIONS)
    whole = sum(t.nbytes for g in optimizer.groups for t in g.moments.values())
    assert all(whole / 4 <= held < whole / 4 + 200_000 for *_, held in found)
    assert found[0][4] == found[3][4]


def test_in_bfloat16_all_ranks_read_the_same_weights():
    found = on_ranks(2, on_a_rank, "gpipe", Layout(1, 2, 1), 1, torch.bfloat16)
    norms, weights, _ = at_home(2, 1, torch.bfloat16)
    for theirs_norms, theirs, *_ in found:
        assert theirs_norms == pytest.approx(norms, rel=2e-2)
        for parameter, value in theirs.items():
            assert (torch.from_numpy(value) - weights[parameter]).abs().max() < 2.5 * LR * STEPS
    assert all((found[0][1][n] == found[1][1][n]).all() for n in found[0][1])


def test_muon_is_refused():
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        Zero1(model_of(CFG, False), None, set(), stacked={"x": 1})
