"""A rank's part of a network, however it is created; forward alone; gathering the whole network again."""

import pytest
import torch
from ranks import on_ranks
from test_executor import CFG, batch, model_of

from bessemer.addons.distributed import model_shard
from bessemer.addons.distributed.mesh import Layout, Mesh
from bessemer.addons.distributed.model_shard import ModelShard, rows_of
from bessemer.addons.distributed.whole import gather_into
from bessemer.errors import UserError
from bessemer.model import transformer
from bessemer.model.transformer import Transformer
from bessemer.train import loss

ODD = CFG.model_copy(update={"moe_inter_dim": 9})  # experts that cannot be drawn one by one


def made(rank, cfg, layout, schedule, folder):
    """Checks that three ways to make the part give the same names and values; returns the whole network."""
    mesh = Mesh(layout, cfg)
    cut = ModelShard(Transformer(cfg).initialise(5), mesh, schedule).model.state_dict()
    fresh = ModelShard.fresh(cfg, mesh, schedule, 5, torch.device("cpu"))
    read = ModelShard.read(folder, mesh, schedule, torch.device("cpu"))
    for part in (fresh, read):
        state = part.model.state_dict()
        assert list(state) == list(cut)
        assert all(torch.equal(state[n], t) or n.endswith("bias_E") for n, t in cut.items())
        assert not any(t.is_meta for t in [*part.model.parameters(), *part.model.buffers()])
    biases = [t for n, t in read.model.state_dict().items() if n.endswith("bias_E")]
    assert all(t.abs().sum() > 0 for t in biases), "a directory has routing biases, too"
    into = Transformer(cfg) if rank != 1 else None
    gather_into(read, into, [number for number in range(layout.world) if number != 1])
    return None if into is None else {n: t.numpy() for n, t in into.state_dict().items()}


@pytest.mark.parametrize(
    ("cfg", "layout", "schedule"),
    [(CFG, Layout(2, 1, 2), "1f1b"), (CFG, Layout(2, 1, 1), "dualpipe"), (ODD, Layout(1, 1, 2), "gpipe")],
    ids=["1f1b", "dualpipe", "odd experts"],
)
def test_fresh_read_and_cut_shards_are_equal(cfg, layout, schedule, tmp_path):
    complete = Transformer(cfg).initialise(5)
    with torch.no_grad():
        for gate in complete.gates().values():
            gate.bias_E.uniform_(-1, 1)
    complete.save(tmp_path)
    for actual in on_ranks(layout.world, made, cfg, layout, schedule, tmp_path):
        for name, value in (actual or {}).items():
            assert torch.equal(torch.from_numpy(value), complete.state_dict()[name]), name


def drawn(rank, cfg, layout):
    """Whether a rank draws exactly the numbers that it holds."""
    transformer.APART, count = 0, []
    normal = torch.Tensor.normal_
    torch.Tensor.normal_ = lambda x, *arguments, **named: (count.append(x.numel()), normal(x, *arguments, **named))[1]
    part = ModelShard.fresh(cfg, Mesh(layout, cfg), "1f1b", 5, torch.device("cpu"))
    n_held = sum(p.numel() for p in part.model.parameters() if p.dim() >= 2)
    state = {name: value.numpy() for name, value in part.model.state_dict().items()}
    return sum(count) == n_held, state, (part.mesh.experts.start, part.mesh.experts.stop)


def test_rank_draws_only_its_own_weights(monkeypatch):
    """They are the weights of one process, with experts of any width."""
    monkeypatch.setattr(transformer, "APART", 0)
    layout = Layout(2, 1, 2)
    complete = Transformer(ODD).initialise(5).state_dict()
    assert not torch.equal(complete["layers.1.ffn.experts.w2"][0], complete["layers.1.ffn.experts.w2"][1])
    for only_its_own, state, experts in on_ranks(layout.world, drawn, ODD, layout):
        assert only_its_own
        for name, value in state.items():
            expected = complete[name][slice(*experts)] if ".experts." in name else complete[name]
            assert torch.equal(torch.from_numpy(value), expected), name


def held_out(rank, layout, schedule, n, segmented):
    part = ModelShard(model_of(CFG, False), Mesh(layout, CFG), schedule)
    actual = model_shard.heldout_nats(part, [batch(i, segmented) for i in range(n)])
    return actual, part.model.training, max(float(gate.load_E.sum()) for gate in part.gates.values())


@pytest.mark.parametrize(
    ("layout", "schedule", "n", "segmented"),
    [(Layout(2, 1, 1), "1f1b", 3, False), (Layout(2, 1, 2), "dualpipe", 3, True), (Layout(2, 1, 1), "zbv", 2, False),
     (Layout(1, 4, 1), "gpipe", 2, True)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_heldout_loss_matches_one_process(layout, schedule, n, segmented):
    nats, tokens = loss.heldout_nats(model_of(CFG, False), [batch(i, segmented) for i in range(n)])
    across, _ = loss.heldout_nats(model_of(CFG, False), [batch(i, False) for i in range(n)])
    assert (abs(across - nats) > 1e-4 * nats) == segmented, "segments do not see each other"
    for (on_rank, count), training, load in on_ranks(layout.world, held_out, layout, schedule, n, segmented):
        assert on_rank == pytest.approx(nats, rel=1e-6) and count == tokens
        assert training and load == 0, "validation leaves no trace"


def test_rows_are_dealt_evenly_without_overlap():
    for rows, lots, micro in ((8, 2, 3), (7, 3, 2), (64, 4, 4), (3, 2, 4)):
        dealt = [rows_of(rows, lots, lot, micro) for lot in range(lots)]
        assert [row for lot in dealt for micro_rows in lot for row in micro_rows] == list(range(rows))
        sizes = [len(micro_rows) for lot in dealt for micro_rows in lot]
        assert max(sizes) - min(sizes) <= 1 and all(len(lot) == micro for lot in dealt)


def too_many_slices(rank):
    try:
        Mesh(Layout(2), CFG, slices=4)
    except UserError as error:
        return str(error)


def test_too_few_layers_for_the_slices_is_refused():
    for message in on_ranks(2, too_many_slices):
        assert "4 slices each" in message and "pp 1 x dp" in message
