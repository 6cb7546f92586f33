"""Checkpoints of many ranks: saved under one layout, gone on with under another, and again; damage and refusals."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_across import CFG, LR, across, at_home, update

from bessemer.errors import UserError
from bessemer.parallel.mesh import Layout
from bessemer.train import checkpoint, sharded

ALL = 8
"""Micro-batches of a step, of all ranks together."""


def steps_of(rank, name, layout, first, last, folder):
    """Steps `first` to `last` under a layout, saved at the end; from the checkpoint of step `first` if it is not 0."""
    micro = ALL // (layout.dp * layout.ep)
    training = across(layout, name, micro)
    if first:
        training.load(folder / f"step-{first:08d}")
    norms = [update(training, step, micro)["train/grad_norm"] for step in range(first, last)]
    training.save(folder)
    return norms


def test_saved_under_one_layout_and_gone_on_with_under_others(tmp_path):
    """Pipeline and experts, then DualPipe, then data alone: norms, weights, moments and routing biases are those of one
    process that never stopped."""
    parts = [
        ("1f1b", Layout(2, 1, 2), 0, 2), ("dualpipe", Layout(2, 1, 1), 2, 3), ("gpipe", Layout(1, 2, 2), 3, 4),
    ]  # fmt: skip
    found = []
    for name, layout, first, last in parts:
        norms = on_ranks(layout.world, steps_of, name, layout, first, last, tmp_path)
        assert all(theirs == norms[0] for theirs in norms)
        found += norms[0]
    trainer, values = at_home(1, ALL)
    assert found == pytest.approx([v["train/grad_norm"] for v in values], rel=1e-4)
    last = tmp_path / "step-00000004"
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000003", "step-00000004"]
    saved, weights, state = sharded.whole(last), trainer.optimizer.masters(), trainer.optimizer.state_dict()
    assert saved.keys() == weights.keys()
    for name, value in saved.items():
        assert value.shape == weights[name].shape and (value - weights[name]).abs().max() < 0.1 * LR, name
    for name, value in sharded.whole(last, "m/").items():
        assert (value - state[f"m/{name}"]).norm() <= 1e-3 * value.norm() + 1e-9, name
    for name, gate in trainer.gates.items():
        assert torch.equal(sharded.whole(last, "bias/")[name], gate.bias_E), name


def other_model(rank, folder):
    training = across(Layout(), "gpipe", 1, CFG.model_copy(update={"route_scale": 1.0}))
    try:
        training.load(folder)
    except UserError as error:
        return str(error)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    on_ranks(1, steps_of, "gpipe", Layout(), 0, 1, tmp_path)
    (said,) = on_ranks(1, other_model, tmp_path / "step-00000001")
    assert "route_scale is 1.0 in this run but 2.5 in the checkpoint" in said


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
