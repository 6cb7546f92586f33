"""E5M6 in Triton: packs attention's output into 12 bits per number and unpacks it, bit for bit as `formats` does.

A program takes ROWS rows of one tile of 128 columns. Eight numbers fill three 32-bit words, so rows must hold a
multiple of eight numbers, and memory is read and written in whole words. Every scale is a power of two, so multiplying
by its reciprocal is exact.

Shapes: M rows, K columns, J = ceil(K / 128); a row's code is 3 K / 8 words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.addons.accelerate.precision.formats import E5M6_MAX, SMALLEST_NORMAL, PackedE5M6
from bessemer.addons.accelerate.precision.triton_quantise import WIDTH, rows_in_memory

LARGEST = tl.constexpr(E5M6_MAX)
NORMAL = tl.constexpr(SMALLEST_NORMAL)
WORDS = tl.constexpr(16)
"""Groups of three words per tile."""
ROWS = 16


def pack(x_MK: Tensor, scale_MJ: Tensor) -> PackedE5M6:
    """`formats.pack_e5m6` for float32 or bfloat16; K must be a multiple of 8."""
    x_MK = rows_in_memory(x_MK)
    M, K = x_MK.shape
    code = torch.empty(M, K // 2 * 3, dtype=torch.uint8, device=x_MK.device)
    if code.numel():
        _pack[(triton.cdiv(M, ROWS), triton.cdiv(K, 128))](
            x_MK, scale_MJ, code.view(torch.int32), M, K, x_MK.stride(0), *scale_MJ.stride(), ROWS
        )
    return PackedE5M6(code, scale_MJ)


def unpack(packed: PackedE5M6, columns: int, dtype: torch.dtype) -> Tensor:
    """`PackedE5M6.unpack` into float32 or bfloat16; `columns` must be a multiple of 8."""
    code, scale_MJ = packed.code.contiguous(), packed.scale_MJ
    out = torch.empty(len(code), columns, dtype=dtype, device=code.device)
    if out.numel():
        _unpack[(triton.cdiv(len(code), ROWS), triton.cdiv(columns, 128))](
            code.view(torch.int32), scale_MJ, out, len(code), columns, *scale_MJ.stride(), ROWS
        )
    return out


@triton.jit
def _pack(x, scale, code, M, K, x_row, scale_row, scale_column, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_R = tl.load(scale + row * scale_row + tl.program_id(1) * scale_column, mask=row < M, other=1.0)
    value = value * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), scale_R)[:, None]
    low, high = tl.split(tl.reshape(twelve_bits(value), (ROWS, WORDS, 4, 2)))
    pair = low << 12 | high
    # memory holds a pair's three bytes highest first, so the highest is the lowest of a word
    pair = pair >> 16 | pair & 0xFF00 | (pair & 0xFF) << 16
    even, odd = tl.split(tl.reshape(pair, (ROWS, WORDS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    written = (row < M)[:, None] & (word * 8 < K)[None, :]
    at = code + row[:, None] * (K // 8 * 3) + word[None, :] * 3
    tl.store(at, first | second << 24, mask=written)
    tl.store(at + 1, second >> 8 | third << 16, mask=written)
    tl.store(at + 2, third >> 16 | fourth << 8, mask=written)


@triton.jit
def twelve_bits(x):
    """The upper 12 bits of the float16 that x rounds to (`formats.round_e5m6`). NaN becomes the positive quiet one."""
    bits = x.to(tl.int32, bitcast=True)
    kept = bits + 0xFFFF + (bits >> 17 & 1) & -0x20000
    large = kept.to(tl.float32, bitcast=True)
    large = tl.where(large > LARGEST, LARGEST, tl.where(large < -LARGEST, -LARGEST, large))
    size = tl.abs(x)
    # float32 numbers near 12 are 2^-20 apart, as the format's subnormals are
    rounded = tl.where(size < NORMAL, (x + 12.0) - 12.0, large)
    rounded = tl.where(size < float("inf"), rounded, x)
    half = rounded.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(x == x, half >> 4 & 0xFFF, 0x7E0)


@triton.jit
def _unpack(code, scale, out, M, K, scale_row, scale_column, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    is_inside = (row < M)[:, None] & (word * 8 < K)[None, :]
    at = code + row[:, None] * (K // 8 * 3) + word[None, :] * 3
    low = tl.load(at, mask=is_inside, other=0)
    middle = tl.load(at + 1, mask=is_inside, other=0)
    high = tl.load(at + 2, mask=is_inside, other=0)
    first, second = low & 0xFFFFFF, low >> 24 & 0xFF | (middle & 0xFFFF) << 8
    third, fourth = middle >> 16 & 0xFFFF | (high & 0xFF) << 16, high >> 8 & 0xFFFFFF
    pair = tl.join(tl.join(first, third), tl.join(second, fourth))
    pair = pair >> 16 | pair & 0xFF00 | (pair & 0xFF) << 16
    half = tl.join(pair >> 12, pair & 0xFFF) << 4
    value = tl.reshape(half, (ROWS, WIDTH)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    scale_R = tl.load(scale + row * scale_row + tl.program_id(1) * scale_column, mask=row < M, other=1.0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    value = value * scale_R[:, None]
    tl.store(out + row[:, None] * K + column[None, :], value.to(out.dtype.element_ty), mask=inside)
