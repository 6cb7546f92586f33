"""Compiled steps: the plain step's numbers, whatever the batch looks like, and nothing compiled twice."""

from functools import partial

import pytest
import torch

from bessemer.engine import compiled, kv_cache
from bessemer.engine.compiled import CompiledSteps
from bessemer.engine.device_runner import DeviceRunner
from bessemer.engine.engine import Engine
from bessemer.engine.kernel_steps import KernelSteps
from bessemer.engine.scheduler import Scheduler
from bessemer.errors import UserError
from bessemer.model.transformer import Transformer

compiles = pytest.mark.skipif(compiled.cpp_compiler() is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """With kernels, they would serve the steps."""
    monkeypatch.setattr(KernelSteps, "of", lambda model: None)


@pytest.fixture
def engine(cfg, tokenizer):
    """Two layers, one of each kind: more would take longer to compile and show nothing new."""
    return Engine(Transformer(cfg.model_copy(update={"n_layers": 2})).initialise(3), tokenizer)


@pytest.fixture
def fast(engine):
    """The same model with compiled steps."""
    return Engine(engine.model, engine.tokenizer, compile=True)


def trace(compile_, function, options):
    return compile_(function, backend="aot_eager")


def agree(plain, fast, prompts, **options):
    options = dict(max_new_tokens=40, stop_ids=[], seed=3) | options
    for (one,), (other,) in zip(plain.generate(prompts, **options), fast.generate(prompts, **options), strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=2e-5)
        assert one.routing is None or torch.equal(one.routing, other.routing)


@compiles
@pytest.mark.timeout(600)
def test_compiled_steps_say_the_same(engine, fast, prompts):
    agree(engine, fast, prompts[:5], record_routing=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # other sizes, the same graph
        agree(engine, fast, prompts, max_new_tokens=70)
        with torch.no_grad():
            engine.model.head.weight.mul_(0.5)  # weights are read in place
        agree(engine, fast, prompts[:3])


def test_one_row_drafts_and_rows_one_by_one_say_the_same(engine, prompts, monkeypatch):
    """Traced, not compiled: the test above covers the compiler, which would take a minute for these seven graphs."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(trace, torch.compile))
        fast = Engine(engine.model, engine.tokenizer, compile=True)
    agree(engine, fast, prompts[:1], temperature=0.0)
    agree(engine, fast, prompts[:1], temperature=0.0, drafts=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        agree(engine, fast, [prompts[2]], max_new_tokens=90)
    monkeypatch.setattr(kv_cache, "GROUP_BYTES", 1)  # no two rows fit together: attention goes row by row
    agree(engine, fast, prompts[:4], record_routing=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        agree(engine, fast, prompts, max_new_tokens=70)


def test_too_many_tokens_take_the_plain_step(engine, fast, prompts, monkeypatch):
    monkeypatch.setattr(fast.compiled, "max_tokens", 1)
    monkeypatch.setattr(CompiledSteps, "__call__", lambda *_: pytest.fail("went through the compiled step"))
    agree(engine, fast, prompts[:2])


def test_what_cannot_be_compiled_is_said(engine, monkeypatch):
    with pytest.raises(UserError, match="the DeepSeek family"):
        CompiledSteps(torch.nn.Linear(1, 1), 300)
    monkeypatch.setattr(compiled, "cpp_compiler", lambda: None)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        Engine(engine.model, engine.tokenizer, compile=True)


def test_kernels_go_before_compiled_steps(engine, monkeypatch):
    monkeypatch.setattr(KernelSteps, "of", lambda model: KernelSteps)
    engine = Engine(engine.model, engine.tokenizer, compile=True)
    assert engine.compiled is None and engine.not_compiled.endswith("faster C++ kernels already run this model")


def test_a_gpu_s_steps_are_not_compiled(engine):
    """They are CUDA graphs: the option says so, looks for no compiler and keeps no rows out of the graphs."""
    on_device = Engine(engine.model.to("meta"), engine.tokenizer, compile=True)
    assert on_device.compiled is None and "CUDA graphs" in on_device.not_compiled
    assert isinstance(Scheduler(on_device, rows=2).runner, DeviceRunner)
