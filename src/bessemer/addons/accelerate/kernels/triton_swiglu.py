"""`swiglu` in Triton: each program takes ROWS rows; backward walks along F, to sum the gradient of their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 128


def forward(h_MH: Tensor, weight_M: Tensor | None) -> Tensor:
    h_MH = h_MH.contiguous()
    M, F = h_MH.shape[0], h_MH.shape[1] // 2
    act_MF = h_MH.new_empty(M, F)
    if act_MF.numel():
        grid = (triton.cdiv(M, 16), triton.cdiv(F, WIDTH))
        weight = h_MH if weight_M is None else weight_M.contiguous()
        _forward[grid](h_MH, weight, act_MF, M, F, 16, WIDTH, weight_M is not None)
    return act_MF


def backward(dact_MF: Tensor, h_MH: Tensor, weight_M: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    h_MH, dact_MF = h_MH.contiguous(), dact_MF.contiguous()
    M, F = dact_MF.shape
    act_MF, dh_MH, weighted = torch.empty_like(dact_MF), torch.empty_like(h_MH), weight_M is not None
    weight_M = h_MH if weight_M is None else weight_M.contiguous()
    dweight_M = weight_M.new_empty(M) if weighted else h_MH
    if act_MF.numel():
        _backward[(triton.cdiv(M, 4),)](
            dact_MF, h_MH, weight_M, act_MF, dh_MH, dweight_M, M, F, 4, WIDTH, weighted
        )  # fmt: skip
    return act_MF, dh_MH, dweight_M if weighted else None


@triton.jit
def _forward(h, weight, act, M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """One program: ROWS rows, COLUMNS columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        value = value * tl.load(weight + row, mask=row < M, other=0.0).to(tl.float32)[:, None]
    tl.store(act + row[:, None] * F + column[None, :], value.to(act.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dact, h, weight, act, dh, dweight, M, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """One program: ROWS rows, all columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        scale = tl.load(weight + row, mask=row < M, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, F, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < F)[None, :]
        at = row[:, None] * (2 * F) + column[None, :]
        flat = row[:, None] * F + column[None, :]
        gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dact + flat, mask=inside, other=0.0).to(tl.float32)
        sig = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sig
        value = silu * up
        total += tl.sum(grad * value, 1)
        grad = grad * scale[:, None]
        tl.store(act + flat, (value * scale[:, None]).to(act.dtype.element_ty), mask=inside)
        tl.store(dh + at, (grad * up * (sig + silu * (1.0 - sig))).to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + at + F, (grad * silu).to(dh.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(dweight + row, total.to(dweight.dtype.element_ty), mask=row < M)
