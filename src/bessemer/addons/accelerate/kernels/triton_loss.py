"""Losses of the head in Triton: one program reads a row of logits twice, sums in float32, and overwrites the row with
its gradient.

Torch needs some ten passes over float32 copies of all logits for the same. Shapes as in `train.loss`: C tokens of a
chunk, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 4096
"""Logits that a program reads at once."""


def cross_entropy(logits_CV: Tensor, target_C1: Tensor, loss_C: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
    """(log p(target) [C], the logits, which hold loss_c (p - onehot) if `with_grad`)."""
    assert logits_CV.is_contiguous()
    logp_C = loss_C.new_empty(len(loss_C))
    if len(loss_C):
        V = logits_CV.shape[1]
        _cross_entropy[(len(loss_C),)](
            logits_CV, target_C1.contiguous(), loss_C.contiguous(), logp_C, V, WIDTH, with_grad, num_warps=8
        )
    return logp_C, logits_CV


def logprobs(logits_CV: Tensor, target_C: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), log of the softmax denominators, entropy or zeros), float32 [C]."""
    assert logits_CV.is_contiguous()
    logp_C, lse_C, entropy_C = (logits_CV.new_empty(len(logits_CV), dtype=torch.float32) for _ in range(3))
    if len(logits_CV):
        _logprobs[(len(logits_CV),)](
            logits_CV, target_C.contiguous(), logp_C, lse_C, entropy_C, 1 / temperature, logits_CV.shape[1], WIDTH,
            entropy, num_warps=8,
        )  # fmt: skip
    return logp_C, lse_C, entropy_C


def logprobs_backward(
    logits_CV: Tensor, target_C: Tensor, temperature: float, lse_C: Tensor, entropy_C: Tensor, grad_logp_C: Tensor,
    grad_entropy_C: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of the logits, written over them."""
    assert logits_CV.is_contiguous()
    if len(logits_CV):
        grad_entropy = lse_C if grad_entropy_C is None else grad_entropy_C.contiguous()
        _logprobs_backward[(len(logits_CV),)](
            logits_CV, target_C.contiguous(), lse_C.contiguous(), entropy_C.contiguous(), grad_logp_C.contiguous(),
            grad_entropy, 1 / temperature, logits_CV.shape[1], WIDTH, grad_entropy_C is not None, num_warps=8,
        )  # fmt: skip
    return logits_CV


@triton.jit
def _cross_entropy(logits, target, loss, logp, V, WIDTH: tl.constexpr, GRAD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(target + row)
    at = tl.load(logits + row * V + chosen).to(tl.float32)
    column = tl.arange(0, WIDTH)
    highest, total = float("-inf"), 0.0
    for first in range(0, V, WIDTH):
        z = tl.load(logits + row * V + first + column, mask=first + column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new), 0)
        highest = new
    lse = highest + tl.log(total)
    tl.store(logp + row, at - lse)
    if GRAD:
        weight = tl.load(loss + row).to(tl.float32)
        for first in range(0, V, WIDTH):
            index = first + column
            z = tl.load(logits + row * V + index, mask=index < V, other=float("-inf")).to(tl.float32)
            grad = tl.exp(z - lse) - tl.where(index == chosen, 1.0, 0.0)
            tl.store(logits + row * V + index, (grad * weight).to(logits.dtype.element_ty), mask=index < V)


@triton.jit
def _logprobs(logits, target, logp, lse, entropy, rate, V, WIDTH: tl.constexpr, ENTROPY: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(logits + row * V + tl.load(target + row)).to(tl.float32) * rate
    column = tl.arange(0, WIDTH)
    highest, total, weighted = float("-inf"), 0.0, 0.0
    for first in range(0, V, WIDTH):
        inside = first + column < V
        z = tl.load(logits + row * V + first + column, mask=inside, other=float("-inf")).to(tl.float32) * rate
        new = tl.maximum(highest, tl.max(z, 0))
        power = tl.exp(z - new)
        shrunk = tl.exp(highest - new)
        total = total * shrunk + tl.sum(power, 0)
        if ENTROPY:
            weighted = weighted * shrunk + tl.sum(tl.where(inside, power * z, 0.0), 0)
        highest = new
    denominator = highest + tl.log(total)
    tl.store(logp + row, at - denominator)
    tl.store(lse + row, denominator)
    if ENTROPY:
        tl.store(entropy + row, denominator - weighted / total)
    else:
        tl.store(entropy + row, 0.0)


@triton.jit
def _logprobs_backward(
    logits, target, lse, entropy, grad_logp, grad_entropy, rate, V, WIDTH: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chosen, denominator = tl.load(target + row), tl.load(lse + row)
    g = tl.load(grad_logp + row).to(tl.float32)
    column = tl.arange(0, WIDTH)
    for first in range(0, V, WIDTH):
        index = first + column
        z = tl.load(logits + row * V + index, mask=index < V, other=0.0).to(tl.float32)
        logp = z * rate - denominator
        pull = g
        if ENTROPY:
            pull += tl.load(grad_entropy + row).to(tl.float32) * (logp + tl.load(entropy + row))
        grad = tl.where(index == chosen, g, 0.0) - tl.exp(logp) * pull
        tl.store(logits + row * V + index, (grad * rate).to(logits.dtype.element_ty), mask=index < V)
