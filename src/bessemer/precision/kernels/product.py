"""The inner loop of every FP8 GEMM here: 128 columns on the tensor cores, then the promotion to float32.

A step multiplies BLOCK_M x 128 by 128 x BLOCK_N. Its sum starts at zero, so the short accumulator of Hopper's tensor
cores never holds more than 128 products; scaled by the factors of both tiles it is added to the result in float32
registers (V3 3.3.2, reference D.3). While one warp group scales, another of the same or of a neighbouring program
multiplies; that is why configurations prefer two warp groups, or two programs, on a multiprocessor.

Both factors are multiplied with each other first where w's is one number: their product leaves float32 only when that
of the largest elements does too.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from bessemer.precision.tiles import TILE

STEP = tl.constexpr(TILE)


def configurations(narrow: bool) -> list[triton.Config]:
    """What is tried once per shape. BLOCK_N divides 128, so that a program meets one block of w at a time; `narrow`
    adds tiles for few rows. Triton's interpreter gets one small configuration."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64})]
    sizes = [(128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4)]
    if narrow:
        sizes += [(64, 64, 4, 5), (64, 32, 4, 6)]
    found = [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in sizes]
    # With no more than 168 registers a thread, three such programs fit on a multiprocessor of Hopper instead of two.
    return [*found, triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, num_warps=4, num_stages=3, maxnreg=168)]


@triton.jit
def place(program, rows, columns, BAND: tl.constexpr):
    """Row and column of a program's tile, of `rows` x `columns`: down BAND rows first, then to the right, so that
    programs running at the same time share what they read through L2."""
    band = BAND * columns
    top = program // band * BAND
    height = tl.minimum(rows - top, BAND)
    inside = program % band
    return top + inside % height, inside // height


@triton.jit
def product(
    x, w, scale_x, scale_w, row, column, x_row, w_row, sx_row, sx_column, sw_row, sw_column, block_first, block_last,
    K, BLOCKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x w^T for rows `row` of x and `column` of w, all of them existing ones, float32 [BLOCK_M, BLOCK_N].

    K columns are summed over, in steps of 128, a ragged last one unless EVEN. BLOCKS: w's factor is the same in rows
    `block_first` to `block_last`, which hold all of `column`; both ends are looked at, and if they differ the result
    is NaN rather than a wrong number.
    """
    k = tl.arange(0, STEP)
    x_at = x + row[:, None] * x_row + k[None, :]
    w_at = w + column[None, :] * w_row + k[:, None]
    sx_at = scale_x + row * sx_row
    sw_at = scale_w + column * sw_row
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, tl.cdiv(K, STEP)):
        sx_M = tl.load(sx_at)  # before the product, which hides the time they take to arrive
        if BLOCKS:
            first = tl.load(scale_w + block_first * sw_row + j * sw_column)
            last = tl.load(scale_w + block_last * sw_row + j * sw_column)
            factor_M = sx_M * tl.where(first == last, first, float("nan"))
        else:
            sw_N = tl.load(sw_at)
        if EVEN:
            part = tl.dot(tl.load(x_at), tl.load(w_at))
        else:
            left = K - j * STEP
            x_MK = tl.load(x_at, mask=(k < left)[None, :], other=0.0)
            part = tl.dot(x_MK, tl.load(w_at, mask=(k < left)[:, None], other=0.0))
        if BLOCKS:
            y = tl.fma(part, tl.broadcast_to(factor_M[:, None], part.shape), y)
        else:
            part = part * sx_M[:, None]
            y = tl.fma(part, tl.broadcast_to(sw_N[None, :], part.shape), y)
        x_at += STEP
        w_at += STEP
        sx_at += sx_column
        sw_at += sw_column
    return y
