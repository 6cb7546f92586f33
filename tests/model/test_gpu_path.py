"""The network's GPU path, as far as a CPU can check it: grouped products in value and gradient, and, on the meta
device, which holds no numbers that the host could read, that no launch count depends on E and no layer waits."""

import re
import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from model_cases import relative, tiny, tokens
from test_model_experts import COUNTS, case, in_float64, run
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bessemer.addons.accelerate.kernels import attention_gpu, grouped, swiglu
from bessemer.addons.accelerate.kernels import experts as kernel
from bessemer.addons.accelerate.kernels.fused import Fused
from bessemer.addons.accelerate.precision import adapters, backends
from bessemer.addons.accelerate.precision.activations import layer_activation_bytes
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.model import moe
from bessemer.model.config import preset
from bessemer.model.gate import Gate
from bessemer.model.layer import Layer
from bessemer.model.moe import expert_ffn, routed_ffn
from bessemer.model.norm import RMSNorm
from bessemer.model.segments import Packed, first_tokens
from bessemer.model.transformer import Transformer
from bessemer.train.loss import cross_entropy

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
VIEWS = ("view", "transpose", "t", "permute", "slice", "split", "select", "unsqueeze", "squeeze", "expand", "detach",
         "alias", "unbind", "as_strided", "empty", "new_empty", "empty_like", "chunk", "_unsafe_view")  # fmt: skip


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes a CPU take the GPU's path through the experts."""
    monkeypatch.setattr(kernel, "serves", lambda *tensors: False)
    monkeypatch.setattr(grouped, "serves", lambda x, w13, w2: w2.dim() == 3)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_grouped_products_are_the_reference_in_value_and_gradient(on_gpu, counts, dtype):
    exact = run(expert_ffn.equation, in_float64(case(counts, dtype, D=16, inner=8)))
    for actual, expected in zip(run(expert_ffn, case(counts, dtype, D=16, inner=8)), exact, strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
        assert relative(actual, expected) < BOUNDS[dtype] if expected.norm() else not actual.any()


def test_experts_without_rows_get_zero_gradients(monkeypatch):
    """As its grouped product does on Blackwell."""
    cuda, real = torch.device("cuda"), grouped.F.grouped_mm
    for capability, expected in (((9, 0), False), ((10, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert grouped.leaves_unwritten(cuda) is expected and not grouped.leaves_unwritten(torch.device("cpu"))

    def unwritten(first, right, offs):
        out = real(first, right, offs=offs)
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return out

    monkeypatch.setattr(grouped, "leaves_unwritten", lambda device: True)
    rows, right = torch.randn(9, 8), torch.randn(9, 16)
    for counts in ([0, 4, 0, 0, 5, 0], [0, 0, 9], [9]):
        end_E = grouped.ends(torch.tensor(counts))
        monkeypatch.setattr(grouped.F, "grouped_mm", real)
        expected = grouped.weight_gradient(rows, right, end_E)
        monkeypatch.setattr(grouped.F, "grouped_mm", unwritten)
        assert torch.equal(grouped.weight_gradient(rows, right, end_E), expected)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_rows_are_gathered_and_summed_as_by_the_loop(on_gpu, monkeypatch, dtype):
    """From tokens to tokens, with weight gradients added to the float32 gradients that a trainer keeps."""
    generator = torch.Generator().manual_seed(1)
    E, K, N, D, F = 6, 3, 21, 16, 8
    x, w13, w2 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((N, D), (E, 2 * F, D), (E, D, F)))
    expert = torch.rand(N, E, generator=generator).topk(K).indices
    gate = torch.rand(N, K, generator=generator, dtype=torch.float64)
    dy = torch.randn(N, D, generator=generator, dtype=torch.float64)

    exact = [t.to(dtype).double().requires_grad_() for t in (x, gate, w13, w2)]
    order, count = expert.flatten().sort(stable=True).indices, torch.bincount(expert.flatten(), minlength=E)
    rows = expert_ffn.equation(exact[0][order // K], exact[1].flatten()[order], count, *exact[2:])
    (torch.zeros(N, D, dtype=torch.float64).index_add(0, order // K, rows) * dy.to(dtype)).sum().backward()

    own = [torch.nn.Parameter(t.to(dtype)) for t in (x, gate, w13, w2)]
    for weight in own[2:]:
        weight.grad_dtype = torch.float32
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    routed_ffn(own[0], expert, own[1], *own[2:]).backward(dy.to(dtype))
    for actual, expected in zip(own, exact, strict=True):
        added = 1 if actual.grad.dim() == 3 else 0
        assert relative(actual.grad - added, expected.grad) < BOUNDS[dtype]


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
"""Operations that give the host a number, or a tensor whose size depends on one."""


class Launches(TorchDispatchMode):
    """Names of the operations that would start a kernel, those inside our own operations included."""

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
        arguments[0].abs()  # stands for the kernel
        with _disable_current_modes():
            return function(*arguments)

    return one_kernel


def layer_launches(n_experts):
    """Launches in forward and backward of a layer's experts, dispatch and combine included."""
    generator = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(24, n, generator=generator, requires_grad=True) for n in (16, 3))
    w13, w2 = torch.randn(n_experts, 16, 16, requires_grad=True), torch.randn(n_experts, 16, 8, requires_grad=True)
    expert = torch.rand(24, n_experts, generator=generator).topk(3).indices
    with Launches() as launches:
        routed_ffn(x, expert, gate, w13, w2).sum().backward()
    return launches.names


def test_expert_launches_do_not_grow_with_experts_and_never_sync(on_gpu, monkeypatch):
    monkeypatch.setattr(moe.expert_order, "implementations", [])
    for name in ("forward", "backward"):  # one kernel each on a GPU
        monkeypatch.setattr(swiglu, name, fused(getattr(swiglu, f"{name}_reference")))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("the host waits for a tensor"))
    few, large = layer_launches(8), layer_launches(256)
    assert few == large and few.count("_grouped_mm") == 6
    assert few.count("index_select") + few.count("index") == 6, (
        "rows and gates are gathered once forward, once backward"
    )
    assert len(few) <= 45, few


KERNELS = {"expert_order": 0, "expert_ffn": 0, "expert_ffn_backward": 0, "rms_norm_backward": 2, "gate_choice": 5,
           "_varlen_attn": 2, "_varlen_attn_backward": 4}  # fmt: skip
"""Kernels of operations that do not launch exactly one. Experts, dispatch and combine are counted above. A norm's
backward sums its parts. The gate clears its counts and takes the mean, product and factor of the balance term. Varlen
fills a tensor forward; backward it is three kernels and a filled tensor."""


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_layer_is_at_most_150_kernels_for_any_number_of_experts(on_gpu, monkeypatch, packed):
    """Forward and backward of attention, gate, routed and shared experts, norms and residuals, with gradients added to
    a trainer's. On the meta device; our operations count as what they launch on CUDA, and views as nothing."""
    monkeypatch.setattr(moe.expert_order, "implementations", [])
    for name in ("forward", "backward"):
        monkeypatch.setattr(swiglu, name, fused(getattr(swiglu, f"{name}_reference")))
    monkeypatch.setattr(attention_gpu.F, "scaled_dot_product_attention", one_attention)

    def launched(n_experts):
        cfg = tiny(n_routed_experts=n_experts, dim=64, moe_inter_dim=32, n_expert_groups=4, qk_nope_head_dim=16)
        layer = Transformer(cfg).to("meta").to_compute(torch.bfloat16).train().layers[1]
        for parameter in layer.parameters():
            parameter.grad_dtype = torch.float32
            parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
        x = torch.empty(2, 24, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
        segments = Packed.of(torch.arange(24).expand(2, -1) // 7, torch.device("meta")) if packed else None
        dy, dbalance = torch.empty_like(x), torch.empty((), device="meta")
        with Launches() as launches:
            y, balance = layer(x, torch.empty(24, 4, 2, device="meta"), segments)
            torch.autograd.backward((y, balance), (dy, dbalance))
        return launches.names

    names = launched(8)
    assert names == launched(256)
    total = sum(KERNELS.get(name, 1) for name in names) + len(layer_launches(8))
    assert total <= 150, (total, Counter(names))


def one_attention(q, k, v, **settings):
    """Stands for a fused kernel, forward and backward, since on meta tensors torch would decompose the operation."""
    assert settings["attn_mask"] is None, "no mask for rows without segments, none for packed ones"
    return OneAttention.apply(q, k, v)


class OneAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return v.abs()

    @staticmethod
    def backward(ctx, dout):
        return tuple(x.abs() for x in ctx.saved_tensors)  # three kernels: FlashAttention's backward


class FusedAttention(torch.autograd.Function):
    """Stands for a fused kernel in what it saves: its arguments, its output and the softmax denominators."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = v.clone()
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["tiny", "servable", "v2-lite", "v3"])
def test_a_layer_saves_what_the_planner_counts(monkeypatch, name, dtype, packed):
    """On the meta device, to a few bytes a token: the balance term's counts and the segments' ends are not counted.
    The rotary table is shared by all layers."""
    monkeypatch.setattr(
        attention_gpu.F, "scaled_dot_product_attention", lambda q, k, v, **_: FusedAttention.apply(q, k, v)
    )
    cfg, T, meta = preset(name), 400, torch.device("meta")
    ends = Packed.of((torch.arange(T) // 150)[None], meta) if packed else None
    rope = torch.empty(T, cfg.qk_rope_head_dim // 2, 2, device=meta)
    for dense in (False, True):
        with meta:
            layer = Layer(cfg, dense)
        layer = layer.to(dtype)
        for module in layer.modules():
            if isinstance(module, (RMSNorm, Gate)):
                module.float()
        saved = {}

        def pack(tensor, saved=saved):
            if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
                saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        x = torch.empty(1, T, cfg.dim, device=meta, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer.train()(x, rope, ends)
        actual = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - rope.nbytes
        expected = T * layer_activation_bytes(
            cfg, dense, fp8=False, number_bytes=dtype.itemsize, fused=True, whole=True, padded=packed
        )
        assert expected <= actual < 1.001 * expected


def test_training_never_asks_the_device_for_a_number():
    """Forward and backward of a whole network with its MTP module, including segments and balancing."""
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


class Kernels:
    """Stands for Triton kernels: takes grids and arguments as launches do, and counts each as one operation."""

    names: list[str]
    best_config = None

    def __getitem__(self, grid):
        def launch(*arguments, **settings):
            blocks = grid({"BLOCK_M": 64, "BLOCK_N": 128}) if callable(grid) else grid
            assert all(type(blocks_of) is int and blocks_of > 0 for blocks_of in blocks)
            assert all(x.device.type == "meta" for x in arguments if isinstance(x, torch.Tensor))
            self.names.append("kernel")

        return launch


class DeepGEMM(Kernels):
    """Stands for the package of that name and takes its products."""

    def m_grouped_fp8_gemm_nt_contiguous(self, x, w, out, group_M):
        assert group_M.dtype == torch.int32 and len(group_M) == len(x[0]) == len(out) and len(out) % 128 == 0
        self.names.append("deep_gemm")

    def fp8_gemm_nt(self, x, w, out, c=None, recipe=None):
        assert (recipe is None) == (out.dtype == torch.bfloat16) and (c is None or c is out)
        self.names.append("deep_gemm")


@pytest.mark.parametrize("package", ["triton", "deep_gemm"])
def test_fp8_layer_never_syncs_and_its_launches_do_not_grow_with_experts(on_gpu, monkeypatch, package):
    """Forward and backward on the meta device, with the real launchers and kernels that only check their arguments."""
    pytest.importorskip("triton")
    from bessemer.addons.accelerate.precision import triton_e5m6, triton_gemm, triton_quantise, triton_rms_norm

    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(adapters, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(adapters, "_installed", lambda name: name.split(".")[0] in ("triton", package))
    monkeypatch.setattr(torch.version, "cuda", "12.6")  # too old for torch's own product
    monkeypatch.setattr(attention_gpu.F, "scaled_dot_product_attention", one_attention)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("the host waits for a tensor"))

    kernels = DeepGEMM()
    monkeypatch.setitem(sys.modules, "deep_gemm", kernels)
    for module in (triton_e5m6, triton_gemm, triton_quantise, triton_rms_norm):
        for name, value in list(vars(module).items()):
            if name.startswith("_") and hasattr(value, "warmup"):
                monkeypatch.setattr(module, name, kernels)

    def launched(n_experts):
        cfg = tiny(n_routed_experts=n_experts, dim=128, moe_inter_dim=128, n_expert_groups=4, qk_nope_head_dim=16)
        model = Transformer(cfg).to("meta").to_compute(torch.bfloat16).train()
        set_fp8(model, PAPER)
        x = torch.empty(2, 24, 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
        with Launches() as launches:
            kernels.names = launches.names
            y, balance = model.layers[1](x, torch.empty(24, 4, 2, device="meta"))
            torch.autograd.backward((y, balance), (torch.empty_like(x), torch.empty((), device="meta")))
        return launches.names

    names = launched(8)
    print(len(names), Counter(names))
    assert names == launched(256)
    assert "lift_fresh" not in names, "a number of the host is copied to the device"
    assert names.count("kernel") > 20 and ("deep_gemm" in names) == (package == "deep_gemm")


# --- attention -------------------------------------------------------------------------------------------------------


def pieces(q, k, v, packed, scale):
    """What FlashAttention computes for packed rows: each piece between two ends on its own."""
    q, k, v = (x.flatten(0, 1).transpose(0, 1) for x in (q, k, v))
    ends = packed.end_S.tolist()
    assert ends[-1] == q.shape[1]
    out = []
    for low, high in pairwise(ends):
        assert 0 <= high - low <= packed.longest
        own = (x[:, low:high] for x in (q, k, v))
        out.append(torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True, scale=scale))
    return torch.cat(out, 1).transpose(0, 1).unflatten(0, packed.segments_BT.shape)


@pytest.mark.parametrize("kind", ["varlen", "flash", "any"])
def test_attention_of_a_gpu_is_the_equation(monkeypatch, kind):
    """Heads, padding, segment ends and gradients; torch's GPU kernels are replaced by their definitions."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    B, T, H, nope, turned, value = 3, 37, 2, 10, 6, 7
    shapes = (B, T, H, nope + turned), (B, T, H, nope + value), (B, T, turned)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    angle = torch.randn(T, turned // 2, generator=generator, dtype=torch.float64)
    rope = torch.stack((angle.cos(), angle.sin()), -1)
    segments = (torch.rand(B, T, generator=generator) < 0.2).cumsum(1)
    monkeypatch.setattr(attention_gpu, "packed_attention", pieces)
    monkeypatch.setattr(attention_gpu, "KERNELS", {})
    monkeypatch.setattr(attention_gpu, "backend", lambda *_: kind)
    cotangent = torch.randn(B, T, H, value, generator=generator, dtype=torch.float64)
    for packed in (Packed.of(segments, cpu), segments, None):
        if kind == "varlen" and not isinstance(packed, Packed):
            continue
        actual = attention_gpu.latent_attention(*leaves, rope, 0.3, packed)
        turn = torch.view_as_complex(rope)
        q_rope, k_rope = (
            torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)
            for x in (leaves[0][..., nope:].transpose(1, 2), leaves[2])
        )
        q = torch.cat((leaves[0][..., :nope], q_rope.transpose(1, 2)), -1)
        k = torch.cat((leaves[1][..., :nope], k_rope.unsqueeze(2).expand(-1, -1, H, -1)), -1)
        score = torch.einsum("bthx,bshx->bhts", q, k) * 0.3
        mask = attention_gpu.causal_mask(T, None if packed is None else segments, cpu)
        expected = torch.einsum(
            "bhts,bshx->bthx", score.masked_fill(~mask, float("-inf")).softmax(-1), leaves[1][..., nope:]
        )
        assert relative(actual, expected) < 1e-12
        gradients = (torch.autograd.grad(out, leaves, cotangent) for out in (actual, expected))
        assert all(relative(a, b) < 1e-12 for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_packed_segments_know_where_they_end(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = (torch.rand(3, 300, generator=generator) < (0.3, 0.01, 0.0, 1.0)[seed]).cumsum(1) * 5
    packed = Packed.of(segments, torch.device("cpu"))
    for T in (300, 299, 17):
        own = first_tokens(packed, T)
        runs = [run for row in segments[:, :T] for run in torch.unique_consecutive(row, return_counts=True)[1].tolist()]
        expected = torch.tensor([0, *runs]).cumsum(0).tolist()
        ends = own.end_S.tolist()
        assert own.end_S.dtype == torch.int32 and ends[: len(expected)] == expected
        assert set(ends[len(expected) :]) <= {3 * T}
        assert max(runs) <= own.longest and torch.equal(own.segments_BT, segments[:, :T])
    assert len(packed.end_S) - 1 in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), "compiled layers see few shapes"
    assert packed.longest in (128, 256, 300)


def test_attention_is_tried_with_gradients_even_while_sampling():
    with torch.inference_mode():
        attention_gpu._try("math", torch.device("cpu"), torch.float32, 16, 8)
    with pytest.raises(RuntimeError, match=r"No (available kernel|viable backend)"), torch.no_grad():
        attention_gpu._try("cudnn", torch.device("cpu"), torch.float32, 16, 8)


HALF, CUDA = torch.bfloat16, torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "packed", "broken", "kind", "warning"),
    [
        ((9, 0), HALF, (192, 128), False, (), "cudnn", None),
        ((9, 0), HALF, (192, 128), False, ("cudnn",), "flash", None),
        ((8, 0), HALF, (192, 128), False, (), "flash", None),
        ((9, 0), HALF, (192, 128), True, (), "varlen", None),
        ((9, 0), HALF, (192, 128), True, ("varlen",), "efficient", "several times slower.*varlen: no varlen"),
        ((9, 0), torch.float32, (192, 128), False, (), "efficient", None),
        ((9, 0), HALF, (20, 12), False, (), "efficient", None),
        ((9, 0), HALF, (576, 512), True, ("efficient",), "math", "scores go through memory"),
    ],
)
def test_best_working_attention_is_chosen_and_slow_fallbacks_are_reported(
    monkeypatch, recwarn, capability, dtype, widths, packed, broken, kind, warning
):
    def trial(which, *_):
        if which in broken:
            raise RuntimeError(f"no {which}")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention_gpu, "_try", trial)
    attention_gpu._tried.cache_clear()
    assert [attention_gpu.backend(CUDA, dtype, *widths, packed) for _ in range(2)] == [kind] * 2
    texts = [str(caught.message) for caught in recwarn]
    assert len(texts) == (warning is not None) and all(re.search(warning, text) for text in texts)
    attention_gpu._tried.cache_clear()


def test_segments_that_resume_are_not_packed():
    """Tokens see their whole segment, wherever its parts are; only contiguous segments can be packed."""
    resumed = torch.tensor([[0, 0, 1, 1, 0]])
    assert torch.equal(Packed.of(resumed, torch.device("cpu")), resumed)
    empty = Packed.of(torch.zeros(2, 0, dtype=torch.int64), torch.device("cpu"))
    assert empty.end_S.tolist() == [0, 0]


def test_a_layer_on_a_gpu_is_one_graph():
    """torch.compile traces it without a graph break, packed or not."""
    cfg = tiny(dim=64, moe_inter_dim=32)
    layer = Transformer(cfg).to("meta").to_compute(torch.bfloat16).train().layers[1]
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    x = torch.empty(2, 24, 64, device="meta", dtype=torch.bfloat16)
    packed = Packed.of(torch.arange(24).expand(2, -1) // 7, x.device)
    for segments in (packed, None):
        y, _ = compiled(x, torch.empty(24, 4, 2, device="meta"), segments)
        assert y.shape == x.shape


def test_unsupported_shapes_do_not_disable_the_kernel_for_others(monkeypatch):
    """`small` has 36 experts, which the gate's kernel cannot sort; a missing compiler is another matter."""
    gate = Fused("triton_gate", "forward", lambda logit_NE, rule: "plain")
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=(8, 36))
    for error, works in ((NotImplementedError("36 experts in 4 groups"), True), (RuntimeError("no cc"), False)):

        def forward(*_, error=error):
            raise error

        monkeypatch.setitem(
            sys.modules, "bessemer.addons.accelerate.kernels.triton_gate", SimpleNamespace(forward=forward)
        )
        with pytest.warns(UserWarning, match=str(error)) as warnings:
            assert gate(on_gpu, None) == "plain"
        assert gate.works is works and ("gcc" in str(warnings[0].message)) is not works
