"""What a GPU runs of the network, as far as a CPU can prove it: grouped products in value and gradient, and on the meta
device, which has no numbers to give to the host, that no launch depends on E and no layer waits."""

import pytest
import torch
from model_cases import relative, tiny, tokens
from test_model_experts import COUNTS, case, in_float64, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bessemer.kernels import experts as kernel
from bessemer.kernels import swiglu
from bessemer.model import experts, grouped
from bessemer.model.experts import expert_ffn, expert_ffn_reference, routed_ffn
from bessemer.model.transformer import Transformer
from bessemer.train.loss import cross_entropy

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
VIEWS = ("view", "transpose", "t", "permute", "slice", "split", "select", "unsqueeze", "squeeze", "expand", "detach",
         "alias", "unbind", "as_strided", "empty", "new_empty", "empty_like", "chunk", "_unsafe_view")  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch):
    """A CPU takes the GPU's way through the experts."""
    monkeypatch.setattr(kernel, "serves", lambda *tensors: False)
    monkeypatch.setattr(grouped, "serves", lambda x, w13, w2: w2.dim() == 3)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_grouped_products_are_the_reference_in_value_and_gradient(on_gpu, counts, dtype):
    exact = run(expert_ffn_reference, in_float64(case(counts, dtype, D=16, inner=8)))
    for found, wanted in zip(run(expert_ffn, case(counts, dtype, D=16, inner=8)), exact, strict=True):
        assert found.shape == wanted.shape and found.dtype == dtype
        assert relative(found, wanted) < BOUNDS[dtype] if wanted.norm() else not found.any()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rows_are_gathered_and_summed_as_by_the_loop(on_gpu, monkeypatch, dtype):
    """From tokens to tokens, and weight gradients added to the float32 gradients that a trainer keeps."""
    monkeypatch.setattr(experts, "_combined", grouped.combine)
    generator = torch.Generator().manual_seed(1)
    E, K, N, D, F = 6, 3, 21, 16, 8
    x, w13, w2 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, D), (E, 2 * F, D), (E, D, F)))
    expert = torch.rand(N, E, generator=generator).topk(K).indices
    gate = torch.rand(N, K, generator=generator, dtype=torch.float64)
    dy = torch.randn(N, D, generator=generator, dtype=torch.float64)

    exact = [t.to(dtype).double().requires_grad_() for t in (x, gate, w13, w2)]
    order, count = expert.flatten().sort(stable=True).indices, torch.bincount(expert.flatten(), minlength=E)
    rows = expert_ffn_reference(exact[0][order // K], exact[1].flatten()[order], count, *exact[2:])
    (torch.zeros(N, D, dtype=torch.float64).index_add(0, order // K, rows) * dy.to(dtype)).sum().backward()

    own = [torch.nn.Parameter(t.to(dtype)) for t in (x, gate, w13, w2)]
    for weight in own[2:]:
        weight.grad_dtype = torch.float32
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    routed_ffn(own[0], expert, own[1], *own[2:]).backward(dy.to(dtype))
    for found, wanted in zip(own, exact, strict=True):
        added = 1 if found.grad.dim() == 3 else 0
        assert relative(found.grad - added, wanted.grad) < BOUNDS[dtype]


def test_swiglu_keeps_nan_and_zero_weights():
    h, weight = torch.randn(4, 12), torch.tensor([1.0, 0.0, 2.0, 0.5])
    h[3, 2] = float("nan")
    act = swiglu.forward_reference(h, weight)
    assert not act[1].any() and act[3].isnan().sum() == 1 and act[:3].isfinite().all()
    again, dh, dweight = swiglu.backward_reference(torch.ones_like(act), h, weight)
    torch.testing.assert_close(again, act, equal_nan=True)
    assert not dh[1].any() and dweight[1] != 0
    assert dweight[3].isnan()


WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "unique_consecutive", "equal"}
"""Operations that give the host a number, or a tensor whose size is one."""


class Launches(TorchDispatchMode):
    """Names of the operations that would start a kernel, also inside our own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if function.namespace == "bessemer" and args[0].device.type == "cpu":
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        assert name not in WAITS, name
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def fused(function):
    def one_kernel(*arguments):
        arguments[0].abs()  # stands for it
        with _disable_current_modes():
            return function(*arguments)

    return one_kernel


def layer_launches(n_experts):
    """Of forward and backward of a layer's experts, dispatch and combine included."""
    generator = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(24, n, generator=generator, requires_grad=True) for n in (16, 3))
    w13, w2 = torch.randn(n_experts, 16, 16, requires_grad=True), torch.randn(n_experts, 16, 8, requires_grad=True)
    expert = torch.rand(24, n_experts, generator=generator).topk(3).indices
    with Launches() as launches:
        routed_ffn(x, expert, gate, w13, w2).sum().backward()
    return launches.names


def test_experts_launch_as_many_kernels_for_any_number_of_experts_and_wait_for_none(on_gpu, monkeypatch):
    monkeypatch.setattr(kernel, "sorts", lambda expert_NK: False)
    monkeypatch.setattr(experts, "_combined", grouped.combine)
    for name in ("forward", "backward"):  # one kernel each on a GPU
        monkeypatch.setattr(swiglu, name, fused(getattr(swiglu, f"{name}_reference")))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("the host waits for a tensor"))
    few, many = layer_launches(8), layer_launches(256)
    assert few == many and few.count("_grouped_mm") == 6
    assert len(few) <= 60, few


def test_a_whole_layer_launches_as_many_kernels_for_any_number_of_experts():
    """On the meta device, which leaves the experts out and cuts norms and attention into single operations."""

    def launched(n_experts):
        cfg = tiny(n_routed_experts=n_experts, dim=64, moe_inter_dim=32)
        layer = Transformer(cfg).to("meta").to_compute(torch.bfloat16).train().layers[1]
        x = torch.empty(2, 24, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with Launches() as launches:
            y, balance = layer(x, torch.empty(24, 4, 2, device="meta"))
            (y.float().sum() + balance).backward()
        return launches.names

    assert launched(8) == launched(256)


def test_training_never_asks_the_device_for_a_number():
    """Forward and backward of a whole network with its MTP module; segments and balancing included."""
    cfg = tiny(dim=64, moe_inter_dim=32)
    model = Transformer(cfg).to("meta").to_compute(torch.bfloat16).train()
    ids, segments = tokens(cfg).to("meta"), torch.empty(2, 20, dtype=torch.int64, device="meta")
    outputs = model.train_outputs(ids, segments, mtp=True)
    loss = outputs.balance
    for hidden in (outputs.hidden_BTD, *outputs.mtp_hidden):
        target = ids[:, : hidden.shape[1]]
        loss = loss + cross_entropy(hidden, model.head_weight, target, torch.empty(target.shape, device="meta"))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.layers.parameters())
