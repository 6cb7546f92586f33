"""Factors and E4M3 rounding inside a Triton kernel, bit for bit those of `tiles.quantise`.

Three things that a plain kernel gets wrong are done by hand here:

    division    `/` of float32 is approximate in Triton's CUDA code; `div_rn` rounds to nearest, as torch does
    NaN         `max` drops it; magnitudes compared as integers keep it, since NaN lies above infinity there
    rounding    to the E4M3 grid in float32 before the cast. Hardware casts to nearest even by itself, Triton's
                interpreter does not (nor does it keep NaN); after this the cast is exact in both
"""

from __future__ import annotations

import triton
import triton.language as tl

from bessemer.precision.block_fp8 import E4M3_MAX, SMALLEST

LARGEST = tl.constexpr(E4M3_MAX)
TINY = tl.constexpr(SMALLEST)


@triton.jit
def magnitude(x, axis: tl.constexpr):
    """Largest |x| along the axis; NaN where one is there."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def factor(amax, POWER_OF_TWO: tl.constexpr):
    """What a group of this largest magnitude is divided by: `block_fp8.factor`."""
    found = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    found = tl.where(found < TINY, TINY, found)  # a NaN compares false and stays
    found = tl.where(amax == 0, 1.0, found)
    if POWER_OF_TWO:
        # Positive floats are ordered as their bits: add all of the mantissa, cut it off, and an exact power stays.
        bits = found.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        found = tl.where(bits < 0x7F800000, rounded, found)
    return tl.where(amax < float("inf"), found, float("nan"))


@triton.jit
def to_e4m3(x, scale, POWER_OF_TWO: tl.constexpr):
    """x / scale, rounded to nearest even, no larger than 448; NaN stays. `scale` has one value per row or column of x
    and is kept as a matrix, [M, 1] or [1, K]."""
    if POWER_OF_TWO:
        # Exact all the same, and one division for a whole group of elements.
        ratio = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    else:
        ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    size = tl.abs(ratio)
    size = tl.where(size > LARGEST, LARGEST, size)
    # Steps of the grid are 2^(exponent - 3), those below 2^-6 are 2^-9. In a float32 of 1.5 * 2^(exponent + 20) the
    # last bit is worth one step: adding it rounds, taking it off again is exact.
    exponent = size.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(exponent < 121, 121, exponent)
    anchor = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    size = (size + anchor) - anchor
    sign = ratio.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(ratio == ratio, code, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
