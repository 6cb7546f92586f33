"""Triton FP8 GEMMs y = x w^T with one scaling factor per 128 columns of both operands (V3 3.3.2).

    gemm            y = x w^T            two matrices
    grouped_gemm    y_g = x_g w_g^T      rows of x in expert order; forward, and dgrad with w transposed
    grouped_wgrad   dW_g = dy_g^T x_g    both retiled along the tokens, every expert's padded to 128

One step of the inner loop multiplies BLOCK_M x 128 by 128 x BLOCK_N. Its sum starts at zero, so the short accumulator
of Hopper's tensor cores never holds more than 128 products; it is then scaled by the factors of both tiles and added to
the result in float32 registers. While one warp group scales, another of the same or a neighbouring program multiplies,
so configurations prefer two warp groups, or two programs, per multiprocessor. If w's factor is one number, the two
factors are multiplied with each other first: their product overflows float32 only if that of the largest elements does
too.

Tiles of both operands are loaded by tensor descriptors (`tma`: Hopper's TMA, one instruction per tile and no address
registers) or by pointers, the reference; `adapters.by_pointers` says which, and why. A descriptor covers the whole
matrix: a tile that overhangs its group reads rows of the next group, which do not affect any valid row of the result,
and zeros past the matrix. Results are stored by pointers, masked at the end of the group. Both ways give the same bits.

Configurations are tuned per shape of w and size class: the tokens, or an average group's tokens, rounded up to a power
of two, so that a run meets few classes. Routing may move a size into another class in the middle of a step, when
nothing may be tuned (`tuning`); the nearest tuned class then serves it.

Groups may be empty: they have no rows, and their dW is zero. M, N and K may be ragged. Rows that belong to no group
(`DeviceCounts`) become zeros.

Shapes: x [M, K], w [N, K] or [G, N, K], y [M, N]; factors [rows, J], J = ceil(K / 128); P = 128 * sum of ceil(count /
128).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.addons.accelerate.precision import tuning
from bessemer.addons.accelerate.precision.operand import TILE, Counts, Operand
from bessemer.addons.accelerate.precision.triton_quantise import WIDTH, locate, on_device, tiles


def gemm(
    x: Operand, w: Operand, out_dtype: torch.dtype, blocks: bool, tma: bool, add_to: Tensor | None = None
) -> Tensor:
    """y in float32 or bfloat16. `blocks`: w was quantised by blocks of 128 x 128, so 128 of its rows share factors. All
    three products need operands with contiguous values."""
    x_MK, w_NK = x.value_MK, w.value_MK
    (M, K), N = x_MK.shape, len(w_NK)
    if M == 0 or N == 0 or K == 0:
        return torch.zeros(M, N, dtype=out_dtype, device=x_MK.device) if add_to is None else add_to
    y_MN = torch.empty(M, N, dtype=out_dtype, device=x_MK.device) if add_to is None else add_to
    # a weight gradient, the product in float32 of two operands without blocks, sums over the tokens
    tokens, fixed = (K, M) if out_dtype == torch.float32 and not blocks else (M, K)
    size = size_class(tokens)
    launch(
        _gemm, lambda meta: (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),), size,
        (N, fixed, blocks, tma, out_dtype),
        *tiled(tma, x_MK, w_NK), x.scale_MJ, w.scale_MJ, y_MN, M, N, K, *x.scale_MJ.stride(), *w.scale_MJ.stride(),
        size, fixed, tma, blocks, tma or K % TILE == 0, add=add_to is not None,
    )  # fmt: skip
    return y_MN


def grouped_gemm(x: Operand, count: Counts, w: Operand, out_dtype: torch.dtype, blocks: bool, tma: bool) -> Tensor:
    """y [M, N] from x [M, K] and stacked w: values [G, N, K], factors [G, N, J]; count[g] rows belong to group g."""
    x_MK, w_GNK = x.value_MK, w.value_MK
    (M, K), (G, N, _) = x_MK.shape, w_GNK.shape
    y_MN = torch.empty(M, N, dtype=out_dtype, device=x_MK.device)
    if M == 0 or N == 0 or K == 0:
        return y_MN.zero_()

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (tiles(count, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)

    size = size_class(M, G)
    launch(
        _grouped, grid, size, (N, K, G, blocks, tma, out_dtype),
        *tiled(tma, x_MK, w_GNK.flatten(0, 1)), x.scale_MJ, w.scale_MJ, y_MN, on_device(count, x_MK.device), M, N, K,
        *x.scale_MJ.stride(), *w.scale_MJ.stride(), size,
        G, triton.next_power_of_2(G), tma, blocks, tma or K % TILE == 0,
    )  # fmt: skip
    return y_MN


def grouped_wgrad(
    dy: Operand, x: Operand, count: Counts, out_dtype: torch.dtype, tma: bool, add_to: Tensor | None = None
) -> Tensor:
    """dW [G, N, K] from dy [N, P] and x [K, P], both as `retile` returns them."""
    dy_NP, x_KP = dy.value_MK, x.value_MK
    N, K, G = len(dy_NP), len(x_KP), len(count)
    if 0 in (G, N, K) or dy_NP.shape[1] == 0:
        return torch.zeros(G, N, K, dtype=out_dtype, device=dy_NP.device) if add_to is None else add_to
    dw_GNK = torch.empty(G, N, K, dtype=out_dtype, device=dy_NP.device) if add_to is None else add_to
    size = size_class(dy_NP.shape[1], G)
    launch(
        _wgrad, lambda meta: (triton.cdiv(N, meta["BLOCK_M"]) * triton.cdiv(K, meta["BLOCK_N"]), G), size,
        (N, K, G, tma, out_dtype),
        *tiled(tma, dy_NP, x_KP), dy.scale_MJ, x.scale_MJ, dw_GNK, on_device(count, dy_NP.device), N, K,
        dy_NP.shape[1] // TILE, *dy.scale_MJ.stride(), *x.scale_MJ.stride(), size,
        G, triton.next_power_of_2(G), tma, add=add_to is not None,
    )  # fmt: skip
    return dw_GNK


def tiled(tma: bool, *matrices: Tensor) -> tuple[Any, ...]:
    """The two operands as kernel arguments: as they are, or as descriptors, which `boxes` completes."""
    if not tma:
        return matrices
    from triton.tools.tensor_descriptor import TensorDescriptor  # missing in old versions of Triton

    return tuple(TensorDescriptor.from_tensor(matrix, [64, TILE]) for matrix in matrices)


def boxes(arguments: dict[str, Any]) -> None:
    """Gives the operands' descriptors, a kernel's first two arguments, the tile shapes of a configuration."""
    if arguments["TMA"]:
        left, right, *_ = arguments.values()
        left.block_shape, right.block_shape = ([arguments[n], TILE] for n in ("BLOCK_M", "BLOCK_N"))


def size_class(rows: int, groups: int = 1) -> int:
    """The size class for tuning: an average group's tokens rounded up to a power of two, from 64 to 8,192. Fewer rows
    fit one tile; more fill the card."""
    return min(max(triton.next_power_of_2(triton.cdiv(rows, groups)), 64), 8192)


_tuned: dict[tuple[Any, ...], dict[int, triton.Config]] = {}
"""The fastest configuration of a kernel and shape, by size class."""


def launch(
    kernel: Any, grid: Callable[..., tuple[int, ...]], size: int, shape: tuple[Any, ...], *arguments: Any,
    add: bool | None = None,
) -> None:  # fmt: skip
    """Runs a kernel, tuned for its shape and size class. If it must not be tuned now, it runs with the configuration of
    the nearest class, or else the first, a safe default. `add`: whether to add to the contents of the result, its fifth
    argument; None for a kernel that cannot."""
    last = [] if add is None else [add]
    tuned = _tuned.setdefault((id(kernel), *shape, *last), {})
    if (size in tuned and not add) or (size not in tuned and tuning.allowed()):
        tried = list(arguments)
        if add:
            tried[4] = torch.empty_like(tried[4])  # tuning would add to the result many times
        kernel[grid](*tried, *last)
        tuned.setdefault(size, kernel.best_config)
        if not add:
            return
    nearest = min(tuned, key=lambda other: max(other / size, size / other), default=None)
    config = kernel.configs[0] if nearest is None else tuned[nearest]
    config.pre_hook(dict(zip(kernel.arg_names, arguments, strict=False)) | config.kwargs)
    kernel.fn[grid](*arguments, *last, **config.all_kwargs())


def configurations(narrow: bool) -> list[triton.Config]:
    """Configurations to try; the first is a safe default. BLOCK_N divides 128, so that a program reads one block of w
    at a time; `narrow` adds tiles for few rows. Triton's interpreter gets one small configuration."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64}, pre_hook=boxes)]
    sizes = [(64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4)]
    if narrow:
        sizes += [(64, 64, 4, 5), (64, 32, 4, 6)]
    sizes += [(128, 128, 8, 3), (128, 128, 8, 4)]
    configs = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s, pre_hook=boxes) for m, n, w, s in sizes
    ]
    # With at most 168 registers per thread, three such programs fit on a Hopper multiprocessor instead of two.
    limit = {"num_warps": 4, "num_stages": 3, "maxnreg": 168}
    return [*configs, triton.Config({"BLOCK_M": 64, "BLOCK_N": 128}, **limit, pre_hook=boxes)]


def without_spills(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """The configurations without register spills, by NVIDIA's assembler (bench/gpu/ptxas.py). With descriptors none
    spills, and three fit without a limit; with pointers the largest spills unless w has one factor per block."""
    if arguments["TMA"]:
        return [c for c in configs if c.maxnreg is None]
    if arguments.get("BLOCKS"):
        return configs
    return [c for c in configs if c.kwargs["BLOCK_M"] * c.kwargs["BLOCK_N"] < 128 * 128 and c.maxnreg is None]


PRUNE = {"early_config_prune": without_spills}


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def place(program, rows, columns, BAND: tl.constexpr):
    """Row and column of a program's tile among `rows` x `columns` tiles: down BAND rows first, then to the right, so
    that programs that run at the same time share reads through L2."""
    band = BAND * columns
    top = program // band * BAND
    height = tl.minimum(rows - top, BAND)
    inside = program % band
    return top + inside % height, inside // height


@triton.jit
def product(
    x, w, scale_x, scale_w, row, column, x_row, w_row, sx_row, sx_column, sw_row, sw_column, block_first, block_last,
    K, x_first, w_first, k_first, TMA: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x w^T for rows `row` of x and `column` of w, all in range, float32 [BLOCK_M, BLOCK_N]. TMA: x and w are
    descriptors whose tiles begin at rows `x_first` and `w_first` and column `k_first`.

    Sums over K columns in steps of 128, the last one ragged unless EVEN. BLOCKS: w's factor is the same in rows
    `block_first` to `block_last`, which include all of `column`; both ends are read, and if they differ the result is
    NaN rather than a wrong number.
    """
    k = tl.arange(0, WIDTH)
    if not TMA:
        x_at = x + row[:, None] * x_row + k[None, :]
        w_at = w + column[None, :] * w_row + k[:, None]
    sx_at = scale_x + row * sx_row
    sw_at = scale_w + column * sw_row
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j in range(0, tl.cdiv(K, WIDTH)):
        sx_M = tl.load(sx_at)  # before the product, which hides the latency
        if BLOCKS:
            first = tl.load(scale_w + block_first * sw_row + j * sw_column)
            last = tl.load(scale_w + block_last * sw_row + j * sw_column)
            factor_M = sx_M * tl.where(first == last, first, float("nan"))
        else:
            sw_N = tl.load(sw_at)
        if TMA:
            at = k_first + j * WIDTH
            part = tl.dot(x.load([x_first, at]), w.load([w_first, at]).T)
        elif EVEN:
            part = tl.dot(tl.load(x_at), tl.load(w_at))
        else:
            remaining = K - j * WIDTH
            x_MK = tl.load(x_at, mask=(k < remaining)[None, :], other=0.0)
            part = tl.dot(x_MK, tl.load(w_at, mask=(k < remaining)[:, None], other=0.0))
        if BLOCKS:
            y = tl.fma(part, tl.broadcast_to(factor_M[:, None], part.shape), y)
        else:
            part = part * sx_M[:, None]
            y = tl.fma(part, tl.broadcast_to(sw_N[None, :], part.shape), y)
        if not TMA:
            x_at += WIDTH
            w_at += WIDTH
        sx_at += sx_column
        sw_at += sw_column
    return y


@triton.autotune(configs=configurations(True), key=["SIZE", "N", "DIM", "TMA", "BLOCKS", "ADD"], prune_configs_by=PRUNE)
@triton.jit(do_not_specialize=["M", "sx_column", "SIZE", "DIM"])
def _gemm(
    x, w, scale_x, scale_w, y, M, N, K, sx_row, sx_column, sw_row, sw_column, SIZE, DIM,
    TMA: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y. SIZE is `size_class`, DIM M or K, whichever is not tokens. ADD: add to y."""
    m, n = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    row = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = n.to(tl.int64) * BLOCK_N // 128 * 128
    y_MN = product(
        x, w, scale_x, scale_w, tl.minimum(row, M - 1), tl.minimum(column, N - 1), K, K,
        sx_row, sx_column, sw_row, sw_column, block, tl.minimum(block + 127, N - 1),
        K, m * BLOCK_M, n * BLOCK_N, 0, TMA, BLOCKS, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < M)[:, None] & (column < N)[None, :]
    at = y + row[:, None] * N + column[None, :]
    if ADD:
        y_MN += tl.load(at, mask=inside, other=0.0)
    tl.store(at, y_MN.to(y.dtype.element_ty), mask=inside)


@triton.autotune(
    configs=configurations(True), key=["SIZE", "N", "K", "GROUPS", "TMA", "BLOCKS"], prune_configs_by=PRUNE
)
@triton.jit(do_not_specialize=["M", "sx_column", "SIZE"])
def _grouped(
    x, w, scale_x, scale_w, y, count, M, N, K, sx_row, sx_column, sw_group, sw_row, sw_column, SIZE,
    GROUPS: tl.constexpr, ROOM: tl.constexpr, TMA: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of y, with rows of one group, or of the rest, for which it only writes zeros."""
    columns = tl.cdiv(N, BLOCK_N)
    m, n = place(tl.program_id(0), tl.num_programs(0) // columns, columns, 8)
    group, first, end, number = locate(m, count, GROUPS, ROOM, BLOCK_M)
    length = tl.where(group < GROUPS, K, 0)
    end = tl.where(group < GROUPS, end, M)
    group = tl.minimum(group, GROUPS - 1)
    top = first + number * BLOCK_M
    row = top + tl.arange(0, BLOCK_M)
    column = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = n.to(tl.int64) * BLOCK_N // 128 * 128
    if not TMA:
        w += group.to(tl.int64) * N * K
    y_MN = product(
        x, w, scale_x, scale_w + group.to(tl.int64) * sw_group,
        tl.minimum(row, end - 1), tl.minimum(column, N - 1), K, K,
        sx_row, sx_column, sw_row, sw_column, block, tl.minimum(block + 127, N - 1),
        length, top.to(tl.int32), group * N + n * BLOCK_N, 0, TMA, BLOCKS, EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < end)[:, None] & (column < N)[None, :]
    tl.store(y + row[:, None] * N + column[None, :], y_MN.to(y.dtype.element_ty), mask=inside)


@triton.autotune(configs=configurations(False), key=["SIZE", "N", "K", "GROUPS", "TMA", "ADD"], prune_configs_by=PRUNE)
@triton.jit(do_not_specialize=["SIZE", "TILES"])
def _wgrad(
    dy, x, scale_dy, scale_x, dw, count, N, K, TILES, sdy_row, sdy_column, sx_row, sx_column, SIZE,
    GROUPS: tl.constexpr, ROOM: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one group's dW, over that group's columns."""
    n, k = place(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    P = TILES * WIDTH  # tells the compiler that rows begin at multiples of 128
    g = tl.arange(0, ROOM)
    tiles_G = (tl.load(count + g, mask=g < GROUPS, other=0) + WIDTH - 1) // WIDTH
    before = tl.sum(tl.where(g < tl.program_id(1), tiles_G, 0).to(tl.int64), 0)
    own = tl.sum(tl.where(g == tl.program_id(1), tiles_G, 0), 0)
    row = n.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = k.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if not TMA:
        dy += before * WIDTH
        x += before * WIDTH
    dw_NK = product(
        dy, x, scale_dy + before * sdy_column, scale_x + before * sx_column,
        tl.minimum(row, N - 1), tl.minimum(column, K - 1), P, P, sdy_row, sdy_column, sx_row, sx_column, 0, 0,
        own * WIDTH, n * BLOCK_M, k * BLOCK_N, (before * WIDTH).to(tl.int32), TMA, False, True, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < N)[:, None] & (column < K)[None, :]
    at = dw + tl.program_id(1).to(tl.int64) * N * K + row[:, None] * K + column[None, :]
    if ADD:
        dw_NK += tl.load(at, mask=inside, other=0.0)
    tl.store(at, dw_NK.to(dw.dtype.element_ty), mask=inside)
