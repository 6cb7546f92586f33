"""Experts with uneven counts reach DeepGEMM: rows padded to its multiples of 128, in the layouts and dtypes it takes.

The package needs a Hopper card, so a stand-in with its signatures takes its place. It computes with the emulation and
refuses whatever DeepGEMM's contiguous layout would refuse.
"""

import sys

import pytest
import torch
from model_cases import relative, tiny
from ranks import on_ranks

from bessemer.addons.accelerate.precision import adapters, backends, emulation
from bessemer.addons.accelerate.precision import fp8_layers as fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER, weight_gradient
from bessemer.addons.accelerate.precision.operand import TILE, DeviceCounts, Operand, quantise
from bessemer.addons.distributed.expert_parallel import AllToAll, Hop
from bessemer.model import moe
from bessemer.model.gate import Routing

torch.set_num_threads(1)


class DeepGEMM:
    """m_grouped_fp8_gemm_nt_contiguous((x, sx), (w, sw), out, group of every row), out = x w^T; the dense form; and the
    weight-gradient forms, which add to a float32 d. Argument names and assertions are those of release 2.1.1.post3 and
    later (csrc/apis/gemm.hpp, csrc/jit_kernels/impls/sm90_fp8_gemm_1d1d.hpp)."""

    def __init__(self):
        self.groups, self.columns, self.products = [], [], []

    def m_grouped_fp8_gemm_nt_contiguous(self, x, w, out, group_M):
        assert group_M.dtype == torch.int32 and group_M.is_contiguous() and len(group_M) == len(x[0])
        rows = group_M.view(-1, TILE)
        assert (rows == rows[:, :1]).all(), "a block of 128 rows has one expert"
        used = int((group_M >= 0).sum())
        assert (group_M[:used].diff() >= 0).all() and (group_M[used:] == -1).all() and group_M.max() < len(w[0])
        count = torch.bincount(group_M[:used], minlength=len(w[0])).tolist()
        out.copy_(emulation.grouped_gemm(self.checked(x), count, self.blocks(w), out.dtype, "block"))
        out[used:] = float("nan")  # DeepGEMM skips these rows
        self.groups.append(count)

    def fp8_gemm_nt(self, a, b, d, c=None, recipe=None):
        self.products.append(recipe)
        if recipe is None:
            d.copy_(emulation.gemm(self.checked(a), self.blocks(b), d.dtype, "block"))
        else:
            assert recipe == (1, 1, 128) and d.dtype == torch.float32 and c is d and d.is_contiguous()
            d += emulation.gemm(self.checked(a), self.checked(b), torch.float32, "tile")

    def k_grouped_fp8_gemm_nt_contiguous(self, a, b, d, ks, ks_tensor, c=None, recipe=(1, 1, 128)):
        """a and b hold one group after another, each as [m, k] or [n, k]; their factors are [m, sum / 128]."""
        (groups, m, n), total = d.shape, sum(ks)
        assert recipe == (1, 1, 128) and c is d and d.dtype == torch.float32 and d.is_contiguous()
        assert type(ks) is list and len(ks) == groups and all(type(k) is int and k % 128 == 0 for k in ks) and total
        assert ks_tensor.dtype == torch.int32 and ks_tensor.is_contiguous() and ks_tensor.tolist() == ks
        for (value, scale), rows in ((a, m), (b, n)):
            assert value.dtype == torch.float8_e4m3fn and value.is_contiguous() and value.numel() == total * rows
            assert scale.dtype == torch.float32 and scale.shape == (rows, total // 128)
        self.columns.append(ks)
        done = 0
        for g, k in enumerate(ks):
            sides = []
            for (value, scale), rows in ((a, m), (b, n)):
                own = value.flatten()[done * rows : (done + k) * rows].view(rows, k)
                sides.append(Operand(own, scale[:, done // 128 : (done + k) // 128]))
            d[g] += emulation.gemm(*sides, torch.float32, "tile") if k else 0
            done += k

    @staticmethod
    def checked(x):
        value, scale = x
        assert value.dtype == torch.float8_e4m3fn and value.is_contiguous() and scale.dtype == torch.float32
        assert scale.shape == (len(value), value.shape[1] // TILE) and value.shape[1] % TILE == 0
        return Operand(value, scale)

    @staticmethod
    def blocks(w):
        value, scale = w
        assert value.dtype == torch.float8_e4m3fn and value.is_contiguous() and scale.dtype == torch.float32
        assert scale.shape == (*value.shape[:-2], -(-value.shape[-2] // TILE), value.shape[-1] // TILE)
        return Operand(value, scale.repeat_interleave(TILE, -2)[..., : value.shape[-2], :])


@pytest.fixture
def hopper(monkeypatch):
    """Makes this CPU appear as a Hopper card with that package."""
    for module, names in card().items():
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGEMM())
    return sys.modules["deep_gemm"]


def card():
    facts = {"_capability": lambda device: (9, 0), "_installed": lambda package: package == "deep_gemm"}
    return {backends: {"ORDER": ("deep_gemm", "emulation")}, adapters: facts}


CFG = tiny(dim=256, moe_inter_dim=128, n_routed_experts=6, n_activated_experts=2, n_expert_groups=1, n_limited_groups=1)


def case(dtype=torch.bfloat16, tokens=90, seed=0):
    """Layer, tokens and routing: one expert has no rows, and no count is a multiple of 128."""
    draw = torch.Generator().manual_seed(seed)
    experts = moe.Experts(CFG)
    experts.fp8 = PAPER
    for weight in experts.parameters():
        weight.data = (torch.randn(weight.shape, generator=draw) * 0.1).to(dtype)
    x = torch.randn(tokens, CFG.dim, generator=draw).to(dtype).requires_grad_()
    choice = torch.rand(tokens, 5, generator=draw).argsort(1)[:, :2]
    weight = torch.rand(tokens, 2, generator=draw).requires_grad_()
    dy = torch.randn(tokens, CFG.dim, generator=draw).to(dtype)
    return experts, x, Routing(choice, weight, None), dy


def run(experts, x, routing, dy):
    sent = moe.dispatch(x, routing, experts)
    y = moe.combine(experts(sent), sent.slot_NK)
    y.backward(dy)
    return sent, [y.detach(), x.grad, routing.weight_NK.grad, experts.w13.grad, experts.w2.grad]


def test_experts_with_real_counts_reach_deep_gemm(hopper):
    sent, _ = run(*case())
    count = torch.bincount(case()[2].expert_NK.flatten(), minlength=6).tolist()
    assert count[5] == 0 and all(c % TILE for c in count[:5])
    assert hopper.groups == [[-(-c // TILE) * TILE for c in count]] * 4, "two products forward, two backward"
    filled = sent.count_E.sum()
    assert sent.filled and len(sent.rows_MD) == (180 + 6 * 127) // TILE * TILE > filled


def test_filled_rows_change_nothing(hopper, monkeypatch):
    """Output and gradients are bit for bit those without padding: tiles along the tokens were always filled up with
    zeros. Only the gradient of the tokens differs: it is summed in float32 as on a GPU, and without padding in BF16."""
    _, actual = run(*case())
    monkeypatch.setattr(backends, "ORDER", ("emulation",))
    monkeypatch.setattr(adapters, "_capability", lambda device: (0, 0))
    sent, expected = run(*case())
    assert not sent.filled
    for name, a, b in zip(("y", "x", "gates", "w13", "w2"), actual, expected, strict=True):
        assert relative(a, b) < 1e-2 if name == "x" else torch.equal(a, b), (name, relative(a, b))


@pytest.mark.parametrize("count", [[70, 0, 300, 128], [0, 500, 0], [130], [0, 0]])
def test_weight_gradients_of_groups(hopper, count):
    """The values equal the emulation's, in a new result and added to a given one; groups without rows add nothing."""
    draw = torch.Generator().manual_seed(1)
    dy, x = (quantise(torch.randn(sum(count), columns, generator=draw)) for columns in (64, 192))
    sides = [emulation.retile(side, count, False) for side in (dy, x)]
    expected = emulation.grouped_wgrad(*sides, count, torch.float32)
    before = torch.randn(expected.shape, generator=draw)
    into = before.clone()
    torch.testing.assert_close(backends.grouped_wgrad(*sides, count), expected)
    assert backends.grouped_wgrad(*sides, count, add_to=into) is into
    torch.testing.assert_close(into, before + expected)
    assert hopper.columns == [[-(-c // TILE) * TILE for c in count]] * 2 * any(count)
    unknown = DeviceCounts(torch.tensor(count, dtype=torch.int32), sum(count))
    long = [emulation.retile(side, unknown, False) for side in (dy, x)]
    torch.testing.assert_close(backends.grouped_wgrad(*long, unknown), expected)
    assert len(hopper.columns) == 2 * any(count), "counts that the host does not know are left to others"


def test_weight_gradients_of_one_matrix(hopper):
    draw = torch.Generator().manual_seed(1)
    dy, x = (quantise(torch.randn(256, columns, generator=draw)) for columns in (100, 192))
    expected = weight_gradient(dy, x, PAPER)
    into = torch.ones_like(expected)
    assert weight_gradient(dy, x, PAPER, add_to=into) is into and hopper.products == [(1, 1, 128)] * 2
    exact = dy.dequantise().double().t() @ x.dequantise().double()
    assert relative(expected, exact) < 0.05 and torch.equal(into, 1 + expected)
    weight_gradient(dy, quantise(torch.randn(256, 100, generator=draw)), PAPER)  # a width of 100 does not fit
    assert len(hopper.products) == 2


def test_what_does_not_fit_in_the_order_of_rows():
    position, count, total = filled = fp8.filled(torch.tensor([0, 130, 128, 0, 1]), 259)
    assert count.tolist() == [0, 256, 128, 0, 128] and total == (259 + 5 * 127) // TILE * TILE
    assert torch.equal(position, torch.cat([torch.arange(130), torch.arange(256, 384), torch.tensor([384])]))
    none = fp8.filled(torch.tensor([0, 0]), 0)
    assert none.rows_E.tolist() == [0, 0] and len(none.place_M) == none.total == 0
    assert filled.spread(torch.ones(259, dtype=torch.int64), 7).sum() == 259 + 7 * (total - 259)


def on_a_rank(rank, full):
    """Output and gradients of this rank's tokens and experts."""
    if full:
        for module, names in card().items():
            vars(module).update(names)
        sys.modules["deep_gemm"] = DeepGEMM()
    experts, x, routing, dy = case(seed=0)
    own_experts = slice(3 * rank, 3 * rank + 3)
    experts.w13, experts.w2 = (torch.nn.Parameter(w.data[own_experts].clone()) for w in (experts.w13, experts.w2))
    import torch.distributed as dist

    hop = Hop(dist.group.WORLD, 2, rank, 0, 3, "node")
    exchange = AllToAll((hop,), 3 * rank, 3, 2)
    half = slice(45 * rank, 45 * rank + 45)
    x = x.detach()[half].requires_grad_()
    weight = routing.weight_NK.detach()[half].requires_grad_()
    sent = exchange.dispatch(x, Routing(routing.expert_NK[half], weight, None), PAPER)
    y = exchange.combine(experts(sent), sent)
    y.backward(dy[half])
    groups = sys.modules["deep_gemm"].groups if full else None
    return groups, [t.float() for t in (y.detach(), x.grad, weight.grad, experts.w13.grad, experts.w2.grad)]


def test_experts_on_two_ranks():
    for (groups, actual), (_, expected) in zip(
        on_ranks(2, on_a_rank, True), on_ranks(2, on_a_rank, False), strict=True
    ):
        assert len(groups) == 4 and all(c % TILE == 0 for c in groups[0])
        for a, b in zip(actual, expected, strict=True):
            assert relative(a, b) < 1e-2


def test_only_deep_gemm_is_filled_for(hopper, monkeypatch):
    assert backends.fills_tiles(torch.device("cpu"))
    monkeypatch.setenv(backends.VARIABLE, "emulation")
    assert not backends.fills_tiles(torch.device("cpu"))
    monkeypatch.delenv(backends.VARIABLE)
    monkeypatch.setattr(adapters, "_installed", lambda package: False)
    assert not backends.fills_tiles(torch.device("cpu"))
