"""SwiGLU into FP8 in one pass: silu(gate) * up * weight, then tiles of 1 x 128 for the down projection.

All of it in float32: neither the activation nor its product with the routing weight is rounded before E4M3.

Shapes: M rows, F features; h is [M, 2F] with the gate in its first half.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bessemer.precision.kernels.e4m3 import factor, magnitude, to_e4m3
from bessemer.precision.kernels.quantise import WIDTH, empty_operand
from bessemer.precision.tiles import TILE, Operand


def swiglu(h_MF: Tensor, weight_M: Tensor | None = None, power_of_two: bool = False) -> Operand:
    """The operand [M, F] of h [M, 2F], float32 or bfloat16, and one weight per row (none: 1)."""
    h_MF = h_MF.detach().contiguous()
    M, F = h_MF.shape[0], h_MF.shape[1] // 2
    out = empty_operand((M, F), h_MF)
    rows = 32
    if out.value_MK.numel():
        weight = h_MF if weight_M is None else weight_M.detach().contiguous()
        _swiglu[(triton.cdiv(M, rows), triton.cdiv(F, TILE))](
            h_MF, weight, out.value_MK, out.scale_MJ, M, F, weight_M is not None, power_of_two, rows
        )
    return out


@triton.jit
def _swiglu(
    h, weight, value, scale, M, F, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: ROWS tiles below one another."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        act = act * tl.load(weight + row, mask=row < M, other=0.0).to(tl.float32)[:, None]
    act = tl.where(inside, act, 0.0)
    scale_R = factor(magnitude(act, 1), POWER_OF_TWO)
    tl.store(value + row[:, None] * F + column[None, :], to_e4m3(act, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)
