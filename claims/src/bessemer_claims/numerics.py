"""FP8 on this machine: errors of sums (V3 3.3.2, Fig. 7b), and the bytes that a step keeps for backward (V3 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd.profiler import profile

from bessemer.addons.accelerate.precision.emulation import reference_gemm
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import FP8_RECIPES
from bessemer.addons.accelerate.precision.operand import quantise
from bessemer.data.batch import Batch
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.train.objective import next_token

ROWS = 256
Result = TypeVar("Result")


def errors(k: int, bits: int | None, promote: int | None, seed: int) -> tuple[float, float]:
    """(maximum, mean) error of a product of two random normal matrices of 256 x k, divided by the root mean square of
    the result. They are quantised as in the paper, or by tensor if nothing is promoted, since only one factor can then
    be applied; the reference is float64 on the same E4M3 operands. `bits`, `promote` as in `reference_gemm`."""
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(ROWS, k, generator=generator) for _ in range(2))
    is_exact = promote is None
    a, b = quantise(x, "tensor" if is_exact else "tile"), quantise(w, "tensor" if is_exact else "block")
    exact = a.dequantise().double() @ b.dequantise().double().t()
    error = (reference_gemm(a, b, bits, promote).double() - exact).abs() / exact.square().mean().sqrt()
    return float(error.max()), float(error.mean())


def allocations(function: Callable[[], Result]) -> tuple[Result, list[int]]:
    """A function's result, and the bytes that torch allocated (positive) or freed (negative) meanwhile, in order."""
    with profile(use_cpu=True, profile_memory=True) as profiler:
        result = function()
    return result, [event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]"]


def kept_bytes(cfg: ModelConfig, rows: int, length: int, recipe: str | None, seed: int) -> int:
    """Bytes that a forward in BF16, or by the FP8 recipe of this name, keeps for its backward, from the allocator."""
    model = Transformer(cfg).initialise(seed).to_compute(torch.bfloat16).train()
    set_fp8(model, FP8_RECIPES[recipe] if recipe else None)
    tokens = torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    loss = torch.ones(rows, length)
    loss[:, 0] = 0
    batch, terms = Batch(tokens, loss), {"mtp_lambda": 0.3, "balance_alpha": 1e-4}
    next_token(model, batch, **terms).total.backward()  # what is made only once is now made
    saved, moved = allocations(lambda: next_token(model, batch, **terms))
    assert saved.total.requires_grad
    return sum(moved)
