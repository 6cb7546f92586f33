"""FP8 GEMMs of many experts in one launch.

    grouped_gemm     y_g = x_g w_g^T     rows of x in the order of their experts; forward, and dgrad with w turned
    grouped_wgrad    dW_g = dy_g^T x_g   both turned, tiles along the tokens, every expert's filled up to 128

Groups may be empty: their rows do not exist, their dW is zero.

Shapes: M rows of all G groups, K columns, N outputs, P = 128 * sum of ceil(count / 128).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.precision.kernels.groups import locate, on_device
from bessemer.precision.kernels.product import STEP, configurations, place, product
from bessemer.precision.tiles import TILE, Operand


def grouped_gemm(x: Operand, count: Sequence[int], w: Operand, out_dtype: torch.dtype, blocks: bool) -> Tensor:
    """[M, N] of x [M, K] and stacked w: values [G, N, K], factors [G, N, J]; count[g] rows belong to group g."""
    x_MK, w_GNK = x.value_MK.contiguous(), w.value_MK.contiguous()
    (M, K), (G, N, _) = x_MK.shape, w_GNK.shape
    y_MN = torch.empty(M, N, dtype=out_dtype, device=x_MK.device)
    if M == 0 or N == 0 or K == 0:
        return y_MN.zero_()

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (sum(triton.cdiv(c, meta["BLOCK_M"]) for c in count) * triton.cdiv(N, meta["BLOCK_N"]),)

    _grouped[grid](
        x_MK, w_GNK, x.scale_MJ, w.scale_MJ, y_MN, on_device(count, x_MK.device), N, K,
        *x.scale_MJ.stride(), *w.scale_MJ.stride(), triton.next_power_of_2(M),
        G, triton.next_power_of_2(G), blocks, K % TILE == 0,
    )  # fmt: skip
    return y_MN


def grouped_wgrad(dy: Operand, x: Operand, count: Sequence[int], out_dtype: torch.dtype) -> Tensor:
    """[G, N, K] of dy [N, P] and x [K, P], both as `quantise.turn` leaves them."""
    dy_NP, x_KP = dy.value_MK.contiguous(), x.value_MK.contiguous()
    N, K, G = len(dy_NP), len(x_KP), len(count)
    dw_GNK = torch.empty(G, N, K, dtype=out_dtype, device=dy_NP.device)
    if dw_GNK.numel() == 0 or dy_NP.shape[1] == 0:
        return dw_GNK.zero_()
    _wgrad[lambda meta: (triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(K, meta["BLOCK_N"]), G)](
        dy_NP, x_KP, dy.scale_MJ, x.scale_MJ, dw_GNK, on_device(count, dy_NP.device), N, K, dy_NP.shape[1] // TILE,
        *dy.scale_MJ.stride(), *x.scale_MJ.stride(), triton.next_power_of_2(dy_NP.shape[1]),
        G, triton.next_power_of_2(G),
    )  # fmt: skip
    return dw_GNK


@triton.autotune(configs=configurations(narrow=True), key=["SIZE", "N", "K", "GROUPS", "BLOCKS"])
@triton.jit(do_not_specialize=["SIZE"])
def _grouped(
    x, w, scale_x, scale_w, y, count, N, K, sx_row, sx_column, sw_group, sw_row, sw_column, SIZE,
    GROUPS: tl.constexpr, ROOM: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y, of rows of one group."""
    columns = tl.cdiv(N, BLOCK_N)
    m, n = place(tl.program_id(0), tl.num_programs(0) // columns, columns, 8)
    group, first, end, number = locate(m, count, GROUPS, ROOM, BLOCK_M)
    row = first + number * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = n.to(tl.int64) * BLOCK_N // 128 * 128
    y_MN = product(
        x, w + group.to(tl.int64) * N * K, scale_x, scale_w + group.to(tl.int64) * sw_group,
        tl.minimum(row, end - 1), tl.minimum(column, N - 1), K, K,
        sx_row, sx_column, sw_row, sw_column, block, tl.minimum(block + 127, N - 1),
        K, BLOCKS, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < end)[:, None] & (column < N)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], y_MN.to(y.dtype.element_ty), mask=inside)


@triton.autotune(configs=configurations(narrow=False), key=["SIZE", "N", "K", "GROUPS"])
@triton.jit(do_not_specialize=["SIZE", "TILES"])
def _wgrad(
    dy, x, scale_dy, scale_x, dw, count, N, K, TILES, sdy_row, sdy_column, sx_row, sx_column, SIZE,
    GROUPS: tl.constexpr, ROOM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one group's dW, over that group's columns."""
    n, k = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    P = TILES * STEP  # so the compiler knows that rows begin at multiples of 128
    g = tl.arange(0, ROOM)
    tiles_G = (tl.load(count + g, mask=g < GROUPS, other=0) + STEP - 1) // STEP
    before = tl.sum(tl.where(g < tl.program_id(1), tiles_G, 0).to(tl.int64), 0)
    own = tl.sum(tl.where(g == tl.program_id(1), tiles_G, 0), 0)
    row = n.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = k.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw_NK = product(
        dy + before * STEP, x + before * STEP, scale_dy + before * sdy_column, scale_x + before * sx_column,
        tl.minimum(row, N - 1), tl.minimum(column, K - 1), P, P, sdy_row, sdy_column, sx_row, sx_column, 0, 0,
        own * STEP, False, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < N)[:, None] & (column < K)[None, :]
    at = dw + tl.program_id(1).to(tl.int64) * N * K + row[:, None] * K + column[None, :]
    tl.store(at, dw_NK.to(dw.dtype.element_ty), mask=inside)
