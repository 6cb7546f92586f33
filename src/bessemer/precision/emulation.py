"""The FP8 calls beside quantise in plain torch, on any device: what serves a CPU, and the oracle of the kernels.

Shapes: T tokens or M rows, K columns, N outputs, G groups; P columns, every group's filled up to a multiple of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.precision.operands import blocks
from bessemer.precision.tiles import TILE, Group, Operand, quantise


def turn(operand: Operand, count: Sequence[int] | None, power_of_two: bool) -> Operand:
    """From tiles of 1 x 128 to tiles of 128 x 1, turned: [T, K] to [K, T], or to [K, P] with a count."""
    return quantise(filled(operand.dequantise(), count).t(), "tile", power_of_two)


def filled(x_TK: Tensor, count: Sequence[int] | None) -> Tensor:
    """[P, K]: the rows of every group filled up with zeros to a multiple of 128; as it is without a count."""
    if count is None:
        return x_TK
    sizes = [-(-tokens // TILE) * TILE for tokens in count]
    out, start = x_TK.new_zeros(sum(sizes), x_TK.shape[1]), 0
    for part, size in zip(x_TK.split(list(count)), sizes, strict=True):
        out[start : start + len(part)] = part
        start += size
    return out


def swiglu(h_MF: Tensor, weight_M: Tensor | None, power_of_two: bool) -> Operand:
    """silu(gate) * up * weight in float32, then tiles."""
    gate, up = h_MF.detach().float().chunk(2, 1)
    act = F.silu(gate) * up
    return quantise(act if weight_M is None else act * weight_M.detach().float()[:, None], "tile", power_of_two)


def gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """The sums of fp8_gemm.gemm with the factors multiplied in first, so that they are one float32 GEMM; what was said
    of w's groups is looked at."""
    _look(w, w_group)
    return (x.dequantise() @ w.dequantise().t()).to(out_dtype)


def grouped_gemm(x: Operand, count: Sequence[int], w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """One GEMM per group."""
    _look(w, w_group)
    x_MK, w_GNK, start = x.dequantise(), w.dequantise(), 0
    y_MN = x_MK.new_empty(len(x_MK), w_GNK.shape[1])
    for w_NK, rows in zip(w_GNK, count, strict=True):
        torch.mm(x_MK[start : start + rows], w_NK.t(), out=y_MN[start : start + rows])
        start += rows
    return y_MN.to(out_dtype)


def grouped_wgrad(dy: Operand, x: Operand, count: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """One GEMM per group, over its own columns."""
    dy_NP, x_KP, start = dy.dequantise(), x.dequantise(), 0
    dw_GNK = dy_NP.new_empty(len(count), len(dy_NP), len(x_KP))
    for g, tokens in enumerate(count):
        end = start + -(-tokens // TILE) * TILE
        torch.mm(dy_NP[:, start:end], x_KP[:, start:end].t(), out=dw_GNK[g])
        start = end
    return dw_GNK.to(out_dtype)


def _look(w: Operand, w_group: Group) -> None:
    if w_group != "block":
        return
    said = blocks(w).repeat_interleave(TILE, -2)[..., : w.scale_MJ.shape[-2], :]
    if not bool(((said == w.scale_MJ) | (said.isnan() & w.scale_MJ.isnan())).all()):
        raise ValueError('w_group="block", but the factors of w differ inside of a block of 128 rows')
