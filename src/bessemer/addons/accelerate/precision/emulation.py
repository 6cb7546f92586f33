"""The FP8 calls in plain torch, on any device: the backend on a CPU, and the reference for the kernels.

`reference_gemm` is what an FP8 GEMM of DeepSeek-V3 computes, up to the sums inside a block (V3 3.3.2):

    y[m, n] = sum over blocks j of 128 columns: s_x[m, j] * s_w[n, j] * <x_q, w_q>_j

Inside a block the tensor core sums the products; between blocks the sum is float32 with the factors multiplied in
(promotion to CUDA cores). Here a block is summed in float32. Hopper's tensor cores keep about 14 bits, which `bits`
models: every MMA instruction adds 32 columns and truncates the total. How the hardware aligns the 32 products is not
published. Without promotion (`promote=None`) the loss grows over all of K, and only one factor per row can be applied,
so the operands must be quantised by tensor. The other functions multiply the factors in first, so that each product is
one float32 GEMM; they are the emulation's entries in `adapters.BACKENDS`.

Shapes: T tokens or M rows, K columns, N outputs, G groups; P columns, every group padded to a multiple of 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.precision.operand import (
    TILE,
    Counts,
    DeviceCounts,
    Group,
    Operand,
    block_factors,
    quantise,
)

MMA = 32
"""Columns that one of Hopper's FP8 instructions adds."""


def reference_gemm(x: Operand, w: Operand, bits: int | None = None, promote: int | None = TILE) -> Tensor:
    """x w^T, float32 [M, N]. `bits`: significant bits of the accumulator inside a block (None: float32); `promote`:
    columns after which the sum is promoted to float32 (a multiple of MMA that divides 128; None: never)."""
    x_MK, w_NK, K = x.value_MK.float(), w.value_MK.float(), x.value_MK.shape[1]
    if w.value_MK.shape[1] != K:
        raise ValueError(f"operands of {K} and {w.value_MK.shape[1]} columns do not fit together")
    if promote is None:
        return _sum(x_MK, w_NK, bits) * _row_factor(x)[:, None] * _row_factor(w)
    if promote % MMA or TILE % promote:
        raise ValueError(f"promote must be a multiple of {MMA} that divides {TILE}, not {promote}")
    y_MN = x_MK.new_zeros(len(x_MK), len(w_NK))
    for start in range(0, K, promote):
        part_MN = _sum(x_MK[:, start : start + promote], w_NK[:, start : start + promote], bits)
        j = start // TILE
        y_MN += part_MN * x.scale_MJ[:, j, None] * w.scale_MJ[:, j]
    return y_MN


def _sum(x_MK: Tensor, w_NK: Tensor, bits: int | None) -> Tensor:
    if bits is None:
        return x_MK @ w_NK.t()
    total_MN = x_MK.new_zeros(len(x_MK), len(w_NK))
    for start in range(0, x_MK.shape[1], MMA):
        step = slice(start, start + MMA)
        total_MN = _truncate(total_MN + x_MK[:, step] @ w_NK[:, step].t(), bits)
    return total_MN


def _truncate(x: Tensor, bits: int) -> Tensor:
    """x truncated to `bits` significant bits, as the hardware does."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).trunc(), exponent - bits)


def _row_factor(operand: Operand) -> Tensor:
    """The single factor of each row, [M]."""
    first_M = operand.scale_MJ[:, 0]
    if bool((operand.scale_MJ != first_M[:, None]).any()):
        raise ValueError("without promotion every row can have only one factor; quantise by tensor")
    return first_M


def retile(operand: Operand, count: Counts | None, power_of_two: bool) -> Operand:
    """Turns [T, K] in tiles of 1 x 128 into [K, T] in tiles along the tokens, or with a count into [K, P]."""
    return quantise(pad_groups(operand.dequantise(), count).t(), "tile", power_of_two)


def pad_groups(x_TK: Tensor, count: Counts | None) -> Tensor:
    """[P, K]: each group's rows padded with zeros to a multiple of 128; unchanged without a count."""
    if count is None:
        return x_TK
    if isinstance(count, DeviceCounts):
        return _pad_on_device(x_TK, count)
    sizes = [-(-tokens // TILE) * TILE for tokens in count]
    out, start = x_TK.new_zeros(sum(sizes), x_TK.shape[1]), 0
    for part, size in zip(x_TK.split(list(count)), sizes, strict=True):
        out[start : start + len(part)] = part
        start += size
    return out


def _pad_on_device(x_TK: Tensor, count: DeviceCounts) -> Tensor:
    rows_G = count.rows_G.long()
    whole_G = (rows_G + TILE - 1) // TILE * TILE
    end_G = whole_G.cumsum(0)
    place_P = torch.arange(count.columns, device=x_TK.device)
    group_P = torch.searchsorted(end_G, place_P, right=True).clamp_(max=len(count) - 1)
    inside_P = place_P - (end_G - whole_G)[group_P]  # its index within its group
    token_P = (rows_G.cumsum(0) - rows_G)[group_P] + inside_P
    token_P = token_P.where(inside_P < rows_G[group_P], len(x_TK))
    return F.pad(x_TK, (0, 0, 0, 1)).index_select(0, token_P)


def _on_host(count: Counts) -> Sequence[int]:
    """The counts as host integers, which one GEMM per group needs; the host waits for a GPU."""
    return count.rows_G.tolist() if isinstance(count, DeviceCounts) else count


def swiglu(h_MF: Tensor, weight_M: Tensor | None, power_of_two: bool) -> Operand:
    """silu(gate) * up * weight in float32, then quantised by tiles."""
    gate, up = h_MF.detach().float().chunk(2, 1)
    act = F.silu(gate) * up
    return quantise(act if weight_M is None else act * weight_M.detach().float()[:, None], "tile", power_of_two)


def swiglu_gradients(
    dact: Tensor, gate: Tensor, up: Tensor, weight_M: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the activation times the row's weight, the gradients of gate and up side by side, and the weights'."""
    sig = torch.sigmoid(gate)
    silu = gate * sig
    act, dweight = silu * up, None
    if weight_M is not None:
        dweight = torch.linalg.vecdot(dact, act).to(weight_M.dtype)
        act = act * weight_M[:, None]
        dact = dact * weight_M[:, None]
    # d silu(g) = sig (1 + g (1 - sig)) = sig + silu (1 - sig)
    dgate = (dact * up).mul_((1 - sig).mul_(silu).add_(sig))
    return act, torch.cat((dgate, dact.mul_(silu)), -1), dweight


def swiglu_backward(
    dact_MF: Tensor, h: Operand, weight_M: Tensor | None, count: Counts | None, power_of_two: bool
) -> tuple[Operand, Operand, Operand, Tensor | None]:
    """`swiglu_gradients` in float32, then quantised: the activation in tiles along the tokens, dh in tiles, that dh
    retiled along the tokens (`retile`), and the gradient of the weights."""
    gate, up = h.dequantise().chunk(2, -1)
    act, dh_MH, dweight = swiglu_gradients(dact_MF.float(), gate, up, weight_M)
    turned = quantise(pad_groups(act, count).t(), "tile", power_of_two)
    dh = quantise(dh_MH, "tile", power_of_two)
    return turned, dh, retile(dh, count, power_of_two), dweight


def gemm(x: Operand, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """`reference_gemm` as one float32 GEMM. ValueError if w was not quantised by `w_group`."""
    _check_blocks(w, w_group)
    return (x.dequantise() @ w.dequantise().t()).to(out_dtype)


def grouped_gemm(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, w_group: Group) -> Tensor:
    """One GEMM per group."""
    _check_blocks(w, w_group)
    x_MK, w_GNK, start = x.dequantise(), w.dequantise(), 0
    y_MN = x_MK.new_empty(len(x_MK), w_GNK.shape[1])
    for w_NK, rows in zip(w_GNK, _on_host(count), strict=True):
        torch.mm(x_MK[start : start + rows], w_NK.t(), out=y_MN[start : start + rows])
        start += rows
    y_MN[start:].zero_()
    return y_MN.to(out_dtype)


def grouped_wgrad(dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype) -> Tensor:
    """One GEMM per group, over its own columns."""
    dy_NP, x_KP, start = dy.dequantise(), x.dequantise(), 0
    dw_GNK = dy_NP.new_empty(len(count), len(dy_NP), len(x_KP))
    for g, tokens in enumerate(_on_host(count)):
        end = start + -(-tokens // TILE) * TILE
        torch.mm(dy_NP[:, start:end], x_KP[:, start:end].t(), out=dw_GNK[g])
        start = end
    return dw_GNK.to(out_dtype)


def _check_blocks(w: Operand, w_group: Group) -> None:
    if w_group != "block":
        return
    expected = block_factors(w).repeat_interleave(TILE, -2)[..., : w.scale_MJ.shape[-2], :]
    if not bool(((expected == w.scale_MJ) | (expected.isnan() & w.scale_MJ.isnan())).all()):
        raise ValueError('w_group="block", but the factors of w differ within a block of 128 rows')
