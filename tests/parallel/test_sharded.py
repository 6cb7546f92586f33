"""Checkpoints of many ranks: saved under one layout, gone on with under another, and again; damage and refusals."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_execute import CFG, model_of
from test_zero import CLIP, LR, OPTIONS, at_home, batches, work_of

from bessemer.errors import UserError
from bessemer.parallel.execute import Executor
from bessemer.parallel.mesh import Layout, Mesh
from bessemer.parallel.schedules import schedule
from bessemer.parallel.stage import Slice, keep, keep_experts
from bessemer.train import checkpoint, sharded
from bessemer.train.zero import Zero1

ALL = 8
"""Micro-batches of a step, of all ranks together."""


def steps_of(rank, name, layout, first, last, folder):
    """Steps `first` to `last` under a layout, from the checkpoint of step `first` unless that is 0; saved at the end."""
    model, mesh = model_of(CFG, False), Mesh(layout, CFG)
    micro = ALL // (layout.dp * layout.ep)
    table = schedule(name, layout.pp, micro)
    keep_experts(model, mesh.experts)
    slices = {(lane, stage): Slice(model, stage, table.stages, mesh.exchange()) for lane, stage in table.held(mesh.pp)}
    keep(model, slices.values())
    held = [{stage for _, stage in table.held(p)} for p in range(layout.pp)]
    part = next(iter(slices.values()))
    shared = {n for n, _ in model.named_parameters() if sum(bool(part.owners(n) & stages) for stages in held) == 2}
    optimizer = Zero1(model, mesh, shared, **OPTIONS)
    if first:
        path = folder / f"step-{first:08d}"
        optimizer.load_pieces(path)
        optimizer.steps = sharded.load(path, [])[1]["steps"]
    executor = Executor(table, mesh.pp, slices, [layout.rank(p, mesh.dp, mesh.ep) for p in range(layout.pp)])
    norms = []
    for step in range(first, last):
        executor.run(work_of(table, batches(step, mesh.dp * layout.ep + mesh.ep, micro)))
        executor.sum_shared()
        norms.append(float(optimizer.grad_norm()))
        optimizer.step(LR, 100.0, norms[-1], CLIP)
    sharded.save(folder, last, optimizer.pieces(), {"steps": optimizer.steps}, {"layout": str(layout)})
    return norms


def test_saved_under_one_layout_and_gone_on_with_under_others(tmp_path):
    """Pipeline and experts, then DualPipe, then data alone: the norms and weights of one process that never stopped."""
    parts = [
        ("1f1b", Layout(2, 1, 2), 0, 2), ("dualpipe", Layout(2, 1, 1), 2, 3), ("gpipe", Layout(1, 2, 2), 3, 4),
    ]  # fmt: skip
    found = []
    for name, layout, first, last in parts:
        norms = on_ranks(layout.world, steps_of, name, layout, first, last, tmp_path)
        assert all(theirs == norms[0] for theirs in norms)
        found += norms[0]
    # the same micro-batches in another order: 8 lots of one are those of 4 of two and 1 of eight
    norms, weights, state = at_home(1, ALL, torch.float32)
    assert found == pytest.approx(norms, rel=1e-4)
    last = tmp_path / "step-00000004"
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000003", "step-00000004"]
    saved = sharded.whole(last)
    assert saved.keys() == weights.keys()
    for name, value in saved.items():
        assert value.shape == weights[name].shape and (value - weights[name]).abs().max() < 0.1 * LR, name
    for name, value in sharded.whole(last, "m/").items():
        assert (value - state[f"m/{name}"]).norm() <= 1e-3 * value.norm() + 1e-9, name


def some(rank, folder, names):
    tensors = {name: torch.full((2, 3), float(len(name))) for name in names[rank]}
    return str(sharded.save(folder, 1, tensors, {"step": 1}, {}))


def test_what_several_hold_is_written_once(tmp_path):
    names = [["model/a", "model/b", "model/e.experts.w/0"], ["model/a", "model/c", "model/e.experts.w/1"]]
    on_ranks(2, some, tmp_path, names)
    path = tmp_path / "step-00000001"
    assert sharded.names(path) == sorted({*names[0], *names[1]})
    size = sum(file.stat().st_size for file in path.glob("rank-*"))
    assert size < 5 * 24 + 2 * 500
    whole = sharded.whole(path)
    assert whole["e.experts.w"].shape == (2, 2, 3) and whole["a"].shape == (2, 3)
    with pytest.raises(UserError, match="has no model/z; it belongs to another model"):
        sharded.load(path, ["model/z"])


def test_a_damaged_file_is_named(tmp_path):
    on_ranks(2, some, tmp_path, [["model/a"], ["model/b"]])
    path = tmp_path / "step-00000001"
    file = next(file for file in path.glob("rank-*") if b"model/b" in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert sharded.load(path, ["model/a"])[0]["model/a"].shape == (2, 3), "what it does not need it does not read"
    with pytest.raises(checkpoint.Damaged, match=rf"{file.name} does not match its checksum"):
        sharded.load(path, ["model/b"])
    (path / "manifest.json").write_text("{}")
    with pytest.raises(checkpoint.Damaged, match=r"manifest.json"):
        sharded.names(path)


def failing(rank, folder):
    """Rank 1 alone finds its file in the way."""
    on_ranks_write = sharded.write_tensors

    def full(path, tensors):
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return on_ranks_write(path, tensors)

    sharded.write_tensors = full
    try:
        sharded.save(folder, 2, {f"model/{rank}": torch.ones(3)}, {}, {})
    except UserError as error:
        return str(error)
    return "saved"


def test_a_rank_that_cannot_write_makes_it_fail_on_all(tmp_path):
    on_ranks(2, some, tmp_path, [["model/a"], ["model/b"]])
    said = on_ranks(2, failing, tmp_path)
    assert said[0] == said[1] and "rank 1 cannot write: No space left on device" in said[0]
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000001"]
    on_ranks(2, some, tmp_path, [["model/a"], ["model/b"]])  # what was left behind is swept away
    assert not list(tmp_path.glob(".tmp-*"))
