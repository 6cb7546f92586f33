"""Layouts: every rank once in each kind of group, refusals that name what fits, and a model layer across ranks."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard

from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.addons.distributed.mesh import Layout, Mesh, check, describe, nearest, refusal
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer

TINY = preset("tiny")
LAYOUTS = [Layout(1, 1, 4), Layout(1, 2, 2), Layout(1, 1, 4, node=2), Layout(1, 4, 1)]
KINDS = ("pp", "ep", "cp", "expert", "dense", "network", "within")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
)  # fmt: skip
def test_groups_of_each_kind_partition_the_ranks(pp, dp, ep, node, cp):
    layout = Layout(pp, dp, ep, node, cp)
    for kind in KINDS:
        assert sorted(rank for group in layout.groups(kind) for rank in group) == list(range(layout.world)), kind
    places = [layout.place(rank) for rank in range(layout.world)]
    assert [layout.rank(*place) for place in places] == list(range(layout.world))
    for kind, vary in (("pp", {0}), ("ep", {2}), ("cp", {3}), ("expert", {1, 3}), ("dense", {1, 2, 3})):
        for group in layout.groups(kind):
            others = {tuple(v for i, v in enumerate(places[rank]) if i not in vary) for rank in group}
            assert len(others) == 1


def test_v3_layout():
    """E.1: 16 pipeline ranks, experts over 64 ranks on 8 nodes; 128 ranks share dense weights and 2 share experts."""
    layout, cfg = Layout(pp=16, dp=2, ep=64), preset("v3")
    check(layout, cfg, 2048)
    assert {kind: len(layout.groups(kind)[0]) for kind in KINDS} == {
        "pp": 16, "ep": 64, "cp": 1, "expert": 2, "dense": 128, "network": 8, "within": 8,
    }  # fmt: skip
    assert layout.groups("network")[3] == [3 + 8 * n for n in range(8)]
    text = describe(layout).splitlines()
    assert text[0] == "2048 ranks: pp 16 x dp 2 x ep 64, groups of experts on 8 nodes"
    assert text[2] == "pipeline 0, copy 1: 64 to 127" and len(text) == 33


@pytest.mark.parametrize(
    ("layout", "world", "words"),
    [
        (Layout(2, 1, 2), 8, "it makes 4 ranks"),
        (Layout(1, 1, 3), 3, "16 experts cannot be divided evenly among 3 ranks"),
        (Layout(8, 1, 1), 8, "8 pipeline ranks for 5 layers, counting MTP as one"),
        (Layout(1, 0, 1), 1, "at least 1"), (Layout(1, 1, 8, node=3), 8, "does not fill nodes of 3"),
        (Layout(1, 1, 32), 32, "16 experts cannot be divided evenly among 32"),
        (Layout(1, 1, 16, node=2), 16, "4 groups of experts do not divide evenly among 8 nodes, so a token of 2"),
    ],
)  # fmt: skip
def test_unfit_layout_is_refused_with_alternatives(layout, world, words):
    with pytest.raises(UserError, match=words) as caught:
        check(layout, TINY, world)
    near = nearest(layout, TINY, world)
    assert all(refusal(other, TINY, world) is None for other in near)
    assert near and all(str(other) in str(caught.value) for other in near)


def test_nearest_layouts_are_near():
    assert nearest(Layout(2, 1, 2), TINY, 8)[0] in (Layout(4, 1, 2), Layout(2, 2, 2), Layout(2, 1, 4))
    with pytest.raises(UserError, match="no layout fits 0 ranks"):
        check(Layout(), TINY, 0)


# --- a layer of the model, its experts on several ranks ---------------------------------------------------------------


def layer_on_a_rank(rank, layout, fp8):
    """The second layer of the same random model on every rank, with only this rank's experts and rows."""
    torch.manual_seed(0)
    model = set_fp8(Transformer(TINY).initialise(3), PAPER if fp8 else None)
    model.train()
    layer, mesh = model.layers[1], Mesh(layout, TINY)
    own = slice(mesh.experts.start, mesh.experts.stop)
    for name in ("w13", "w2"):
        full = getattr(layer.ffn.experts, name)
        setattr(layer.ffn.experts, name, torch.nn.Parameter(full.detach()[own].clone()))
    x = rows_of(rank, layout).requires_grad_()
    exchange = mesh.exchange()
    attended = layer.attend(x, model.rope_table(x.shape[1]))
    if exchange is None:
        y = layer.feed_forward(attended)
    else:
        sent = exchange.dispatch(attended.u_ND, attended.routing, layer.fp8)
        y = layer.finish(attended, exchange.combine(layer.ffn.experts(sent), sent))
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        dist.all_reduce(parameter.grad, group=mesh.group["expert" if ".experts." in name else "dense"])
    grads = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    return y.detach().numpy(), x.grad.numpy(), grads, (own.start, own.stop)


def rows_of(rank, layout):
    return torch.randn(2, 12, TINY.dim, generator=torch.Generator().manual_seed(rank))


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("fp8", [False, True], ids=["float32", "fp8"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layer_on_ranks_matches_one_process(layout, fp8):
    """Experts over ep, data over dp, one node or two: output and gradients of the input and of every weight."""
    actual = on_ranks(layout.world, layer_on_a_rank, layout, fp8)
    model = set_fp8(Transformer(TINY).initialise(3), PAPER if fp8 else None)
    model.train()
    layer = model.layers[1]
    x = torch.cat([rows_of(rank, layout) for rank in range(layout.world)]).requires_grad_()
    y, _ = layer(x, model.rope_table(12))
    y.square().sum().backward()
    exact, loose = (2e-2, 8e-2) if fp8 else (1e-6, 5e-6)
    assert relative(torch.cat([torch.from_numpy(f[0]) for f in actual]), y.detach()) < exact
    assert relative(torch.cat([torch.from_numpy(f[1]) for f in actual]), x.grad) < loose
    for name, parameter in layer.named_parameters():
        for _, _, grads, (first, last) in actual:
            expected = parameter.grad[first:last] if ".experts." in name else parameter.grad
            if expected.norm() > 0:
                assert relative(torch.from_numpy(grads[name]), expected) < loose, name


def named(rank):
    """For every layout of four ranks: names and members of the dimensions, and how many new groups were created."""
    reports = []
    for layout in (*LAYOUTS, Layout(2, 1, 2), Layout(1, 2, 1, cp=2), Layout(1, 1, 2, cp=2), Layout(2, 2, 1)):
        mesh = Mesh(layout, TINY)
        n_before = len(dist.distributed_c10d._world.pg_map)
        actual = mesh.device_mesh()
        dims = {name: dist.get_process_group_ranks(actual[name].get_group()) for name in actual.mesh_dim_names}
        is_equal = {name: actual.get_local_rank(name) == ranks.index(rank) for name, ranks in dims.items()}
        reports.append((dims, all(is_equal.values()), len(dist.distributed_c10d._world.pg_map) - n_before))
    mesh = Mesh(Layout(2, 2, 1), TINY)
    complete = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(complete.weight, 1.0 + rank % 2)
    fully_shard(complete, mesh=mesh.device_mesh()["dp"])
    complete(torch.ones(1, 4)).sum().backward()
    return reports, tuple(complete.weight.to_local().shape)


def test_device_mesh_has_named_dimensions():
    """A DeviceMesh over the existing groups; FSDP shards a module over one of its dimensions."""
    actual = on_ranks(4, named)
    assert all(shape == (2, 4) for _, shape in actual)
    for rank, (reports, _) in enumerate(actual):
        assert all(right and n_made == 0 for _, right, n_made in reports)
        other = rank ^ 1
        pair, across = sorted((rank, other)), sorted((rank, rank ^ 2))
        assert [dims for dims, *_ in reports] == [
            {"ep": [0, 1, 2, 3]}, {"dp": across, "ep": pair}, {"ep_network": across, "ep_node": pair},
            {"dp": [0, 1, 2, 3]}, {"pp": across, "ep": pair}, {"dp_cp": [0, 1, 2, 3]}, {"cp": across, "ep": pair},
            {"pp": across, "dp": pair},
        ]  # fmt: skip
