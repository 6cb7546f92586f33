"""FP8 GEMM of two operands, y = x w^T, with a factor for every 128 columns of both (reference D.3).

Shapes: x [M, K], w [N, K], y [M, N]; factors [rows, J], J = ceil(K / 128). M, N and K may be ragged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.precision.kernels.product import configurations, place, product
from bessemer.precision.tiles import TILE, Operand


def gemm(x: Operand, w: Operand, out_dtype: torch.dtype, blocks: bool) -> Tensor:
    """y in float32 or bfloat16. `blocks`: w was quantised by blocks of 128 x 128, so 128 of its rows share factors."""
    x_MK, w_NK = x.value_MK.contiguous(), w.value_MK.contiguous()
    (M, K), N = x_MK.shape, len(w_NK)
    y_MN = torch.empty(M, N, dtype=out_dtype, device=x_MK.device)
    if M == 0 or N == 0 or K == 0:
        return y_MN.zero_()
    _gemm[lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)](
        x_MK, w_NK, x.scale_MJ, w.scale_MJ, y_MN, M, N, K, *x.scale_MJ.stride(), *w.scale_MJ.stride(),
        triton.next_power_of_2(M), blocks, K % TILE == 0,
    )  # fmt: skip
    return y_MN


@triton.autotune(configs=configurations(narrow=True), key=["SIZE", "N", "K", "BLOCKS"])
@triton.jit(do_not_specialize=["M", "SIZE"])
def _gemm(
    x, w, scale_x, scale_w, y, M, N, K, sx_row, sx_column, sw_row, sw_column, SIZE,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y. SIZE is M's order of magnitude, for which a configuration is found once."""
    m, n = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    row = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = n.to(tl.int64) * BLOCK_N // 128 * 128
    y_MN = product(
        x, w, scale_x, scale_w, tl.minimum(row, M - 1), tl.minimum(column, N - 1), K, K,
        sx_row, sx_column, sw_row, sw_column, block, tl.minimum(block + 127, N - 1),
        K, BLOCKS, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], y_MN.to(y.dtype.element_ty), mask=inside)
