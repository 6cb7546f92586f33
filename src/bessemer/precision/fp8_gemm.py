"""What an FP8 GEMM of DeepSeek-V3 computes, to the last step, on any machine (V3 3.3.2, reference D.3).

    y[m, n] = sum over blocks j of 128 columns: s_x[m, j] * s_w[n, j] * <x_q, w_q>_j

Inside a block the products are summed by the tensor core, between blocks in float32 with the factors multiplied in:
that is the promotion to CUDA cores. Hopper's tensor cores keep about 14 bits while they sum. With `bits` their loss is
shown: every MMA instruction adds 32 columns and what no longer fits is cut off. Without promotion (`promote=None`) the
loss grows over the whole of K, and one factor per row is all that can be applied: groups must be of the whole tensor.

This is the reference. What training computes with is in `backends`.

Shapes: M and N rows of the operands, K columns summed over, J blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.precision.tiles import TILE, Operand

MMA = 32
"""Columns that one FP8 instruction of Hopper adds."""


def gemm(x: Operand, w: Operand, bits: int | None = None, promote: int | None = TILE) -> Tensor:
    """x w^T, float32 [M, N]. `bits`: significant bits of the accumulator inside a block (None: float32); `promote`:
    columns after which the sum moves to float32 (a multiple of MMA that divides 128; None: never)."""
    x_MK, w_NK, K = x.value_MK.float(), w.value_MK.float(), x.value_MK.shape[1]
    if w.value_MK.shape[1] != K:
        raise ValueError(f"operands of {K} and {w.value_MK.shape[1]} columns do not fit together")
    if promote is None:
        return _summed(x_MK, w_NK, bits) * _single(x)[:, None] * _single(w)
    if promote % MMA or TILE % promote:
        raise ValueError(f"promote must be a multiple of {MMA} that divides {TILE}, is {promote}")
    y_MN = x_MK.new_zeros(len(x_MK), len(w_NK))
    for start in range(0, K, promote):
        part_MN = _summed(x_MK[:, start : start + promote], w_NK[:, start : start + promote], bits)
        j = start // TILE
        y_MN += part_MN * x.scale_MJ[:, j, None] * w.scale_MJ[:, j]
    return y_MN


def _summed(x_MK: Tensor, w_NK: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return x_MK @ w_NK.t()
    total_MN = x_MK.new_zeros(len(x_MK), len(w_NK))
    for start in range(0, x_MK.shape[1], MMA):
        here = slice(start, start + MMA)
        total_MN = _cut(total_MN + x_MK[:, here] @ w_NK[:, here].t(), bits)
    return total_MN


def _cut(x: Tensor, bits: int) -> Tensor:
    """x with so many significant bits; the rest is dropped, as the hardware does."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).trunc(), exponent - bits)


def _single(operand: Operand) -> Tensor:
    """The one factor of every row, [M]."""
    first_M = operand.scale_MJ[:, 0]
    if bool((operand.scale_MJ != first_M[:, None]).any()):
        raise ValueError("without promotion there can be one factor per row only; quantise by tensor")
    return first_M
