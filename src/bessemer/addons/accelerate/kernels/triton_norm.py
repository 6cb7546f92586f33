"""RMSNorm in Triton: one pass over the rows forward, one backward; sums are float32 and in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PARTS = 264
"""Number of programs in backward: two per multiprocessor of a Hopper card. Each writes its sum for the gain."""
WIDEST = 16384


def forward(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`model.norm.normalise`."""
    rows, D = _rows(x), x.shape[-1]
    y = x.new_empty(x.shape)
    if y.numel():
        block = triton.next_power_of_2(D)
        _forward[(len(rows),)](rows, weight_D, y, rows.stride(0), D, eps, block, num_warps=_warps(block))
    return y


def backward(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`model.norm.normalise_backward`: gradients of x and of the gain."""
    rows, dy_rows, D = _rows(x), _rows(dy), x.shape[-1]
    dx = x.new_empty(x.shape)
    parts = max(min(PARTS, len(rows)), 1)
    dweight = weight_D.new_empty(parts, D) if x.numel() else weight_D.new_zeros(1, D)
    if dx.numel():
        block = triton.next_power_of_2(D)
        _backward[(parts,)](
            dy_rows, rows, weight_D, dx, dweight, dy_rows.stride(0), rows.stride(0), len(rows), D,
            parts, triton.cdiv(len(rows), parts), eps, block,
            num_warps=_warps(block),
        )  # fmt: skip
    return dx, dweight.sum(0)


def _rows(x: Tensor) -> Tensor:
    if x.shape[-1] > WIDEST:
        raise NotImplementedError(f"rows of {x.shape[-1]} numbers")
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _forward(x, weight, y, step, D, eps, BLOCK: tl.constexpr):
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * step + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(y + row * D + column, (value * scale * gain).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(dy, x, weight, dx, dweight, dy_step, step, N, D, parts, turns, eps, BLOCK: tl.constexpr):
    """One program: every PARTS-th row, and its rows' sum for the gain's gradient."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    gain = tl.load(weight + column, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        row = part + turn * parts
        is_inside = column < tl.where(row < N, D, 0)
        value = tl.load(x + row * step + column, mask=is_inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_step + column, mask=is_inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
        unit = value * scale
        total += grad * unit
        grad = grad * gain
        grad = (grad - unit * (tl.sum(grad * unit, 0) / D)) * scale
        tl.store(dx + row * D + column, grad.to(dx.dtype.element_ty), mask=is_inside)
    tl.store(dweight + part * D + column, total, mask=inside)
