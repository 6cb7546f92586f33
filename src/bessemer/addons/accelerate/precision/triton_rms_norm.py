"""RMSNorm whose result goes straight into an FP8 product, in Triton: it normalises and quantises by tiles in one pass,
and its backward returns a quantised gradient.

Both round to the dtype of x before they quantise, as the plain norm does: in the interpreter they equal
`kernels.triton_norm` followed by `triton_quantise` bit for bit. Sums are float32, in a fixed order that is not torch's,
so factors may differ from the emulation's in their last two bits.

Shapes: M rows, D columns, J = ceil(D / 128).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bessemer.addons.accelerate.precision.operand import TILE, Operand
from bessemer.addons.accelerate.precision.triton_quantise import (
    WIDTH,
    empty_operand,
    factor,
    magnitude,
    rows_in_memory,
    to_e4m3,
)

PARTS = 264
"""Number of programs in backward, as in `kernels.triton_norm`."""


def rms_norm(x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool) -> Operand:
    """The norm of float32 or bfloat16 rows, as an operand."""
    rows, (M, D) = rows_in_memory(x_MD), x_MD.shape
    out = empty_operand((M, D), rows)
    if rows.numel():
        block = _block(D)
        _forward_quantised[(M,)](
            rows, gain_D, *out, M, D, rows.stride(0), eps, power_of_two, block, num_warps=warps(block)
        )
    return out


def rms_norm_backward(
    dy_MD: Tensor, x_MD: Tensor, gain_D: Tensor, eps: float, power_of_two: bool
) -> tuple[Operand, Tensor]:
    """Returns the gradient of x as an operand, and that of the gain in float32."""
    rows, dy, (M, D) = rows_in_memory(x_MD), rows_in_memory(dy_MD), x_MD.shape
    dx, parts = empty_operand((M, D), rows), max(min(PARTS, M), 1)
    dgain = gain_D.new_empty(parts, D) if rows.numel() else gain_D.new_zeros(1, D)
    if rows.numel():
        block = _block(D)
        _backward_quantised[(parts,)](
            dy, rows, gain_D, *dx, dgain, dy.stride(0), rows.stride(0), M, D, parts, triton.cdiv(M, parts), eps,
            power_of_two, block, num_warps=warps(block),
        )  # fmt: skip
    return dx, dgain.sum(0)


def _block(D: int) -> int:
    return max(triton.next_power_of_2(D), TILE)


def warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@triton.jit
def _forward_quantised(
    x, gain, value, scale, M, D, step, eps, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    number = tl.load(x + row * step + column, mask=inside, other=0.0).to(tl.float32)
    size = 1.0 / tl.sqrt(tl.sum(number * number, 0) / D + eps)
    weight = tl.load(gain + column, mask=inside, other=0.0)
    y = (number * size * weight).to(x.dtype.element_ty).to(tl.float32)
    store_tiles(y, value, scale, row, M, D, D, POWER_OF_TWO, BLOCK)


@triton.jit
def _backward_quantised(
    dy, x, gain, value, scale, dgain, dy_step, step, M, D, parts, turns, eps,
    POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: every PARTS-th row, and its rows' sum for the gain's gradient."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(gain + column, mask=inside, other=0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(turns):
        row = part + turn * parts
        wide = tl.where(row < M, D, 0)
        is_inside = column < wide
        number = tl.load(x + row * step + column, mask=is_inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_step + column, mask=is_inside, other=0.0).to(tl.float32)
        size = 1.0 / tl.sqrt(tl.sum(number * number, 0) / D + eps)
        unit = number * size
        total += grad * unit
        grad = grad * weight
        grad = (grad - unit * (tl.sum(grad * unit, 0) / D)) * size
        grad = grad.to(x.dtype.element_ty).to(tl.float32)
        store_tiles(grad, value, scale, row, M, D, wide, POWER_OF_TWO, BLOCK)
    tl.store(dgain + part * D + column, total, mask=inside)


@triton.jit
def store_tiles(y, value, scale, row, M, D, wide, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr):
    """Quantises a row of D numbers and stores the first `wide`."""
    tiles = tl.reshape(y, (BLOCK // WIDTH, WIDTH))
    scale_J = factor(magnitude(tiles, 1), POWER_OF_TWO)
    j = tl.arange(0, BLOCK // WIDTH)
    column = j[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(value + row * D + column, to_e4m3(tiles, scale_J[:, None], POWER_OF_TWO), mask=column < wide)
    tl.store(scale + j.to(tl.int64) * M + row, scale_J, mask=j * WIDTH < wide)
