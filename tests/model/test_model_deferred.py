"""Backward in two parts, I and W: bit-identical to one part, each product once, and between them only W's inputs
kept."""

import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from allocator import live_bytes
from model_cases import V2, random_model, tiny, tokens
from torch.autograd.profiler import profile

from bessemer.addons.accelerate.kernels import deferred, library
from bessemer.addons.accelerate.kernels.deferred import Store
from bessemer.addons.accelerate.precision import backends
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER
from bessemer.data.batch import Batch
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token
from bessemer.train.optimizer import Optimizer

KINDS = {"float32": (torch.float32, None), "bf16": (torch.bfloat16, None), "fp8": (torch.float32, PAPER),
         "fp8-bf16": (torch.bfloat16, PAPER)}  # fmt: skip


def trained(cfg, dtype, recipe):
    """A model with its gradients in float32 vectors, as in training, and its store."""
    model = set_fp8(random_model(cfg), recipe)
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    Optimizer(model, compute_dtype=dtype)
    store = Store()
    return model, store


def loss_of(model, number, rows=2, length=20):
    weight = torch.ones(rows, length)
    weight[:, 0] = 0
    data = Batch(tokens(model.cfg, rows, length, seed=number), weight, None)
    return next_token(model, data, mtp_lambda=0.3, balance_alpha=1e-3).total


@pytest.mark.parametrize("shape", ["v3", "v2"])
@pytest.mark.parametrize("kind", KINDS)
def test_i_and_w_have_the_bits_of_b(kind, shape):
    cfg = tiny(**(V2 if shape == "v2" else {}))
    at_once, _ = trained(cfg, *KINDS[kind])
    parts, store = trained(cfg, *KINDS[kind])
    store.serve(parts)
    for number in range(2):
        loss_of(at_once, number).backward()
        loss = loss_of(parts, number)
        with store.open(number):
            loss.backward()
    for name, parameter in parts.named_parameters():
        matrix = parameter.dim() > 1 and "gate" not in name and name not in ("embed.weight", "head.weight")
        assert bool(parameter.grad.any()) is not matrix, f"{name}: the matrices wait, and nothing else does"
    for number in range(2):
        store.run(number)
    assert not len(store)
    for (name, expected), actual in zip(at_once.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_store_changes_nothing(kind):
    cfg = tiny()
    (plain, _), (served, store) = trained(cfg, *KINDS[kind]), trained(cfg, *KINDS[kind])
    store.serve(served)
    for model in (plain, served):
        loss_of(model, 0).backward()
    assert not len(store)
    for (name, expected), actual in zip(plain.named_parameters(), served.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad), name


def test_without_gradients_there_before():
    model, store = random_model(tiny()), Store()
    model.train()
    store.serve(model)
    for parameter in model.parameters():
        parameter.grad = None
    with store.open("only"):
        loss_of(model, 0).backward()
    store.run("only")
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("path", ["at once", "deferred"])
def test_in_place_gradient_accumulation_has_the_bits_of_autograd(path, monkeypatch):
    """Two batches; FP8 products accumulate into their weights' gradients themselves."""
    cfg = tiny()
    (plain, _), (adding, store) = trained(cfg, *KINDS["fp8"]), trained(cfg, *KINDS["fp8"])
    calls = []
    for model, own in ((plain, False), (adding, True)):
        with monkeypatch.context() as patch:
            if own:
                for name in ("gemm", "grouped_wgrad"):
                    real = getattr(backends, name)
                    patch.setattr(backends, name, spy(real, calls))
            else:
                patch.setattr(deferred, "own_gradient", lambda weight: None)
            if own and path == "deferred":
                store.serve(model)
            for number in range(2):
                with store.open(number) if own and path == "deferred" else nullcontext():
                    loss_of(model, number).backward()
    for number in range(2):
        store.run(number)
    high = re.compile(r"gate|embed|head|eh_proj")  # matrices whose products are not in FP8
    matrices = sum(p.dim() > 1 and not high.search(name) for name, p in adding.named_parameters())
    assert calls.count(True) == (0 if path == "deferred" else 2 * matrices)
    for (name, expected), actual in zip(plain.named_parameters(), adding.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad), name


def spy(real, calls):
    def call(*arguments, add_to=None, **named):
        calls.append(add_to is not None)
        return real(*arguments, add_to=add_to, **named)

    return call


def counting(real, name, counted):
    def function(*arguments, **named):
        counted[name] += 1
        return real(*arguments, **named)

    return function


def products(function, monkeypatch):
    """Counts the GEMMs that `function` runs, by operation."""
    counted = Counter()
    with monkeypatch.context() as patch:
        for name in ("gemm", "grouped_gemm", "grouped_wgrad"):
            patch.setattr(backends, name, counting(getattr(backends, name), name, counted))
        with profile(use_cpu=True) as profiler:
            function()
    if not counted:  # in FP8 a backend may use as many as it needs
        counted["mm"] = sum(event.name() in ("aten::mm", "aten::addmm") for event in profiler.kineto_results.events())
    return counted


@pytest.fixture
def torch_multiplies(monkeypatch):
    """Plain matrices go through torch, whose products a profiler sees, on every processor."""
    monkeypatch.setattr(library, "SLOW_MKL", ())
    library.beat_mkl.cache_clear()
    yield
    library.beat_mkl.cache_clear()


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_every_product_is_made_once(kind, monkeypatch, torch_multiplies):
    """I + W run as many products as B, and W one for each matrix: nothing is computed twice."""
    cfg = tiny()
    model, store = trained(cfg, *KINDS[kind])
    store.serve(model)
    loss = loss_of(model, 0)
    at_once = products(loss.backward, monkeypatch)

    def inputs():
        with store.open(0):
            loss.backward()

    loss = loss_of(model, 0)
    first, second = products(inputs, monkeypatch), products(lambda: store.run(0), monkeypatch)
    assert first + second == at_once
    layers = [*model.layers, *(module.layer for module in model.mtp)]
    if kind == "fp8":  # 5 of attention, 2 of the dense FFN or the shared expert; 2 of routed experts, grouped
        assert second["gemm"] == 7 * len(layers)
        assert second["grouped_wgrad"] == 2 * sum(not layer.dense for layer in layers)
        assert first["grouped_wgrad"] == 0
    else:
        used = sum(int((layer.ffn.gate.load_E > 0).sum()) for layer in layers if not layer.dense)
        kernels = library.available()  # whose products do not go through torch
        assert second["mm"] == (5 if kernels else 7) * len(layers) + len(model.mtp) + (0 if kernels else 2 * used)


def read_by_gradients(cfg, tokens, sent):
    """Elements of all matrices' inputs and output gradients for one micro-batch; a tensor that two matrices read counts
    once. `sent`: routed experts read copies of the tokens, not the tokens that the shared expert reads."""
    latents = cfg.q_lora_rank + cfg.kv_lora_rank
    heads = cfg.n_heads * (cfg.qk_head_dim + cfg.qk_nope_head_dim + 2 * cfg.v_head_dim)
    attention = 2 * cfg.dim + 2 * latents + cfg.qk_rope_head_dim + heads

    def swiglu(inner):
        return 2 * cfg.dim + 3 * inner

    routed = cfg.n_activated_experts * (swiglu(cfg.moe_inter_dim) if sent else 3 * cfg.moe_inter_dim)
    sparse = swiglu(cfg.n_shared_experts * cfg.moe_inter_dim) + routed
    dense = cfg.n_dense_layers
    layers = (cfg.n_layers + cfg.n_mtp) * attention + dense * swiglu(cfg.inter_dim)
    return tokens * (layers + (cfg.n_layers + cfg.n_mtp - dense) * sparse + cfg.n_mtp * 3 * cfg.dim)


def test_what_waits_holds_what_its_gradients_read():
    """After I, BF16 holds an input and an output gradient of every matrix, and FP8 about half of what those take with
    copies of the rows that are sent; after W nothing is left."""
    cfg, held_bytes = preset("tiny"), {}
    for kind in ("bf16", "fp8-bf16"):
        dtype, recipe = KINDS[kind]
        model = set_fp8(Transformer(cfg).initialise(0), recipe)
        model.train()
        weights_kept = Optimizer(model, compute_dtype=dtype).kept
        store = Store()
        store.serve(model)
        model.rope_table(128)

        def inputs(model=model, store=store):
            loss = loss_of(model, 0, rows=4, length=128)
            with store.open(0):
                loss.backward()

        held_bytes[kind] = live_bytes(inputs) - weights_kept.nbytes  # weights in FP8, kept until the optimizer's step
        assert live_bytes(lambda store=store: store.run(0)) == pytest.approx(-held_bytes[kind], rel=0.01)
    assert held_bytes["bf16"] == pytest.approx(2 * read_by_gradients(cfg, 4 * 128, sent=False), rel=0.05)
    assert held_bytes["fp8-bf16"] < 0.6 * 2 * read_by_gradients(cfg, 4 * 128, sent=True)
