"""Triton kernels that quantise: by tiles of 1 x 128, by blocks of 128 x 128, from row to column tiles, and after SwiGLU
and its backward.

Values and factors equal those of `operand.quantise` bit for bit. Factors are stored column by column, [J, M] in memory
and viewed as [M, J]: a GEMM reads the factors of many rows at one j, which are then adjacent. Matrices may come in a
stack [..., M, K]; no block spans two of them.

Three things that a plain kernel would get wrong are done by hand:

    division    `/` of float32 is approximate in Triton's CUDA code; `div_rn` rounds to nearest, as torch does
    NaN         `max` drops it; magnitudes compared as integers keep it, since NaN sorts above infinity there
    rounding    to the E4M3 grid in float32 before the cast. Hardware rounds the cast to nearest even, Triton's
                interpreter does not (nor does it keep NaN); after this the cast is exact in both

Groups of rows of different sizes (experts) are stored one after another. Each group has its own tiles: c rows have
ceil(c / BLOCK). Every program finds its group with a running sum over the counts, which are copied to the device
without synchronising, or never leave it (`DeviceCounts`). In that case as many programs are launched as there may be
tiles, and those after the last group's process the rest.

Kernels are not specialised for numbers that depend on routing: a variant for multiples of 16 would be compiled and
loaded in the middle of a step.

Shapes: M rows (tokens T), K columns, F features, J = ceil(K / 128) tiles of a row, P columns of a retiled matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.addons.accelerate.precision.block_fp8 import E4M3_MAX, SMALLEST
from bessemer.addons.accelerate.precision.operand import TILE, Counts, DeviceCounts, Operand

WIDTH = tl.constexpr(TILE)
LARGEST = tl.constexpr(E4M3_MAX)
TINY = tl.constexpr(SMALLEST)


def empty_operand(shape: Sequence[int], like: Tensor) -> Operand:
    """Uninitialised values [..., M, K] and factors, the latter stored column by column."""
    *stack, M, K = shape
    value = torch.empty(shape, dtype=torch.float8_e4m3fn, device=like.device)
    scale = torch.empty(*stack, -(-K // TILE), M, dtype=torch.float32, device=like.device)
    return Operand(value, scale.transpose(-1, -2))


def quantise_tiles(x_MK: Tensor, power_of_two: bool = False) -> Operand:
    """Quantises a float32 or bfloat16 matrix, or a stack of them, in tiles of 1 x 128."""
    rows_MK = rows_in_memory(x_MK.flatten(0, -2))
    M, K = rows_MK.shape
    value_MK, scale_MJ = empty_operand((M, K), rows_MK)
    rows = 32
    if rows_MK.numel():
        _tiles[(triton.cdiv(M, rows), triton.cdiv(K, TILE))](
            rows_MK, value_MK, scale_MJ, M, K, rows_MK.stride(0), power_of_two, rows
        )
    return Operand(value_MK.unflatten(0, x_MK.shape[:-1]), scale_MJ.unflatten(0, x_MK.shape[:-1]))


def quantise_blocks(x_MK: Tensor, power_of_two: bool = False) -> Operand:
    """Quantises float32 or bfloat16 matrices in blocks of 128 x 128; every row repeats its block's factor."""
    x_MK = x_MK.detach().contiguous()
    M, K = x_MK.shape[-2:]
    out = empty_operand(x_MK.shape, x_MK)
    if x_MK.numel():
        _blocks[(triton.cdiv(M, TILE), triton.cdiv(K, TILE), x_MK.numel() // (M * K))](
            x_MK, out.value_MK, out.scale_MJ, M, K, power_of_two, num_warps=8
        )
    return out


def retile(operand: Operand, count: Counts | None = None, power_of_two: bool = False) -> Operand:
    """Turns [T, K] in tiles of 1 x 128 into [K, T] in tiles along the tokens.

    With `count` (tokens per group), no tile spans two groups: each group's columns are padded with zeros to a multiple
    of 128, [K, P] with P = 128 * sum of ceil(count / 128), or `DeviceCounts.columns`. Later columns are zero.
    """
    value_TK = operand.value_MK.contiguous()
    T, K = value_TK.shape
    numbers = _columns(count, T)
    out = empty_operand((K, T if count is None else numbers * TILE), value_TK)
    if numbers and K:
        _retile[(numbers, triton.cdiv(K, 64))](
            value_TK, operand.scale_MJ, *_groups(count, value_TK), out.value_MK, out.scale_MJ,
            K, out.value_MK.shape[1], *operand.scale_MJ.stride(), power_of_two, count is not None, 64, num_warps=4,
        )  # fmt: skip
    return out


def swiglu(h_MF: Tensor, weight_M: Tensor | None = None, power_of_two: bool = False) -> Operand:
    """silu(gate) * up * weight in tiles of 1 x 128: the operand [M, F] from h [M, 2F], float32 or bfloat16, with the
    gate in its first half, and one weight per row (None: 1). One pass in float32: neither the activation nor its
    product with the routing weight is rounded before E4M3."""
    h_MF = h_MF.detach().contiguous()
    M, F = h_MF.shape[0], h_MF.shape[1] // 2
    out = empty_operand((M, F), h_MF)
    rows = 32
    if out.value_MK.numel():
        weight = h_MF if weight_M is None else weight_M.detach().contiguous()
        _swiglu[(triton.cdiv(M, rows), triton.cdiv(F, TILE))](
            h_MF, weight, out.value_MK, out.scale_MJ, M, F, weight_M is not None, power_of_two, rows
        )
    return out


def swiglu_backward(
    dact_MF: Tensor, h: Operand, weight_M: Tensor | None, count: Counts | None, power_of_two: bool
) -> tuple[Operand, Operand, Operand, Tensor | None]:
    """`emulation.swiglu_backward` in one pass over h and the gradient; sums for the weights have a fixed order."""
    dact_MF, value = dact_MF.contiguous(), h.value_MK.contiguous()
    M, F = dact_MF.shape
    blocks = _columns(count, M)
    P = M if count is None else blocks * TILE
    act, dh, turned = empty_operand((F, P), value), empty_operand((M, 2 * F), value), empty_operand((2 * F, P), value)
    weight = dact_MF if weight_M is None else weight_M.detach().contiguous()
    parts = torch.zeros(M, triton.cdiv(F, TILE), dtype=torch.float32, device=value.device)
    if blocks and F:
        _swiglu_backward[(blocks, triton.cdiv(F, TILE))](
            dact_MF, value, h.scale_MJ, weight, *act, *dh, *turned, parts, *_groups(count, value), M, F, P,
            *h.scale_MJ.stride(), weight_M is not None, power_of_two, count is not None, 32, num_warps=8,
        )  # fmt: skip
    return act, dh, turned, None if weight_M is None else parts.sum(1).to(weight_M.dtype)


def tiles(count: Counts, block: int) -> int:
    """Tiles of `block` rows in all groups. For `DeviceCounts` an upper bound, with the rest as one more group."""
    if not isinstance(count, DeviceCounts):
        return sum(triton.cdiv(rows, block) for rows in count)
    return (count.total + (block - 1) * min(count.total, len(count) + 1)) // block


def _columns(count: Counts | None, rows: int) -> int:
    """Number of tiles along the tokens of a matrix."""
    if count is None:
        return int(triton.cdiv(rows, TILE))
    return count.columns // TILE if isinstance(count, DeviceCounts) else tiles(count, TILE)


def _groups(count: Counts | None, like: Tensor) -> tuple[Tensor, int, int]:
    """Counts, GROUPS and ROOM as kernel arguments; without groups a kernel reads no counts."""
    if count is None:
        return like, 1, 1
    return on_device(count, like.device), len(count), triton.next_power_of_2(len(count))


def on_device(count: Counts, device: torch.device) -> Tensor:
    """The counts as int32 [G], copied from pinned memory: a pageable copy would wait for the device's queue."""
    if isinstance(count, DeviceCounts):
        return count.rows_G
    counts = torch.tensor(count, dtype=torch.int32)
    return counts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else counts.to(device)


def rows_in_memory(x_MK: Tensor) -> Tensor:
    """x, detached, with contiguous rows."""
    x_MK = x_MK.detach()
    return x_MK if x_MK.stride(1) == 1 or x_MK.shape[1] == 1 else x_MK.contiguous()


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def magnitude(x, axis: tl.constexpr):
    """Largest |x| along the axis; NaN if x has one."""
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    return tl.max(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def factor(amax, POWER_OF_TWO: tl.constexpr):
    """The scaling factor of a group with this largest magnitude: `operand.factor`."""
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    scale = tl.where(scale < TINY, TINY, scale)  # NaN compares false and stays
    scale = tl.where(amax == 0, 1.0, scale)
    if POWER_OF_TWO:
        # Positive floats sort like their bits: adding a full mantissa and clearing it rounds up and keeps exact powers.
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def to_e4m3(x, scale, POWER_OF_TWO: tl.constexpr):
    """x / scale, rounded to nearest even and clamped to 448; NaN is kept. `scale` has one value per row or column of x,
    with shape [M, 1] or [1, K]."""
    if POWER_OF_TWO:
        # Just as exact, with one division per group of elements.
        ratio = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    else:
        ratio = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    size = tl.abs(ratio)
    size = tl.where(size > LARGEST, LARGEST, size)
    # Grid steps are 2^(exponent - 3), or 2^-9 below 2^-6. The last bit of the float32 1.5 * 2^(exponent + 20) is worth
    # one step: adding that number rounds, and subtracting it again is exact.
    exponent = size.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(exponent < 121, 121, exponent)
    anchor = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
    size = (size + anchor) - anchor
    sign = ratio.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    code = rounded.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(ratio == ratio, code, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def locate(tile, count, GROUPS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's group, the group's first row and the one after its last, and the tile's index in the group. For a tile
    of the rest: a group that does not exist, the rest's first row twice, and the index within the rest. ROOM: GROUPS
    rounded up to a power of two."""
    g = tl.arange(0, ROOM)
    rows_G = tl.load(count + g, mask=g < GROUPS, other=0)
    tiles_G = (rows_G + BLOCK - 1) // BLOCK
    group = tl.sum((tl.cumsum(tiles_G, 0) <= tile).to(tl.int32), 0)  # groups that end before it, including empty ones
    before = g < group
    first = tl.sum(tl.where(before, rows_G, 0).to(tl.int64), 0)
    rows = tl.sum(tl.where(g == group, rows_G, 0), 0)
    return group, first, first + rows, tile - tl.sum(tl.where(before, tiles_G, 0), 0)


@triton.jit(do_not_specialize=["M"])
def _tiles(x, value, scale, M, K, x_row, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS tiles of one column of tiles."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    x_RT = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_R = factor(magnitude(x_RT, 1), POWER_OF_TWO)
    tl.store(value + row[:, None] * K + column[None, :], to_e4m3(x_RT, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)


@triton.jit
def _blocks(x, value, scale, M, K, POWER_OF_TWO: tl.constexpr):
    """One program: one block of one matrix of the stack."""
    above = tl.program_id(2).to(tl.int64) * M  # rows of the preceding matrices
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    at = (above + row)[:, None] * K + column[None, :]
    x_RT = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(magnitude(x_RT, 1).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale_R = factor(tl.full((WIDTH,), 0.0, tl.float32) + largest, POWER_OF_TWO)
    tl.store(value + at, to_e4m3(x_RT, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + above * tl.num_programs(1) + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)


@triton.jit(do_not_specialize=["scale_column"])
def _retile(
    value, scale, count, GROUPS: tl.constexpr, ROOM: tl.constexpr, out, out_scale, K, P, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, FILL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: 128 tokens of one group, COLUMNS columns that share their tiles. FILL: there are groups, and they
    are padded."""
    tile = tl.program_id(0)
    if FILL:
        _group, first, end, number = locate(tile, count, GROUPS, ROOM, WIDTH)
        token = first + number * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
    else:
        end = P
        token = tile.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < end)[:, None] & (column < K)[None, :]
    x_TC = tl.load(value + token[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    j = tl.program_id(1) * COLUMNS // WIDTH
    scale_T = tl.load(scale + token * scale_row + j * scale_column, mask=token < end, other=0.0)
    x_TC = x_TC * scale_T[:, None]
    scale_C = factor(magnitude(x_TC, 0), POWER_OF_TWO)
    row = tile.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    written = (column < K)[None, :] & ((row < P)[:, None] if FILL else inside)
    # The addresses are transposed rather than the FP8 tile.
    tl.store(out + column[None, :] * P + row[:, None], to_e4m3(x_TC, scale_C[None, :], POWER_OF_TWO), mask=written)
    tl.store(out_scale + tile.to(tl.int64) * K + column, scale_C, mask=column < K)


@triton.jit(do_not_specialize=["M"])
def _swiglu(
    h, weight, value, scale, M, F, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program: ROWS tiles of one column of tiles."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < F)[None, :]
    at = row[:, None] * (2 * F) + column[None, :]
    gate = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=inside, other=0.0).to(tl.float32)
    act = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        act = act * tl.load(weight + row, mask=row < M, other=0.0).to(tl.float32)[:, None]
    act = tl.where(inside, act, 0.0)
    scale_R = factor(magnitude(act, 1), POWER_OF_TWO)
    tl.store(value + row[:, None] * F + column[None, :], to_e4m3(act, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)


@triton.jit(do_not_specialize=["M", "scale_column"])
def _swiglu_backward(
    dact, h, h_scale, weight, act, act_scale, dh, dh_scale, turned, turned_scale, parts, count, GROUPS: tl.constexpr,
    ROOM: tl.constexpr, M, F, P, scale_row, scale_column, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    FILL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: 128 tokens of one group and 128 features, so that tiles in both directions are whole. It takes ROWS
    tokens at a time, so that they fit in registers. The first pass writes the tiles along the features and finds the
    largest magnitudes along the tokens; the second recomputes the values and writes the tiles along the tokens."""
    tile, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if FILL:
        group, first, end, number = locate(tile, count, GROUPS, ROOM, WIDTH)
        end = tl.where(group < GROUPS, end, M)  # the gradient of the rest has to be written too
        first += number * WIDTH
    else:
        end = M
        first = tile.to(tl.int64) * WIDTH
    column = j * WIDTH + tl.arange(0, WIDTH)
    most_act = tl.zeros((WIDTH,), tl.int32)
    most_gate, most_up = most_act, most_act
    for start in range(0, WIDTH, ROWS):
        token = first + start + tl.arange(0, ROWS)
        value, dgate, dup, total = swiglu_gradients(
            dact, h, h_scale, weight, token, end, column, j, F, scale_row, scale_column, WEIGHTED
        )
        if WEIGHTED:
            tl.store(parts + token * tl.num_programs(1) + j, total, mask=token < end)
        at = token[:, None] * (2 * F) + column[None, :]
        scale_R, code, dequantised = by_rows(dgate, POWER_OF_TWO)
        tl.store(dh + at, code, mask=(token < end)[:, None])
        tl.store(dh_scale + j * M + token, scale_R, mask=token < end)
        most_gate = tl.maximum(most_gate, magnitude(dequantised, 0).to(tl.int32, bitcast=True))
        scale_R, code, dequantised = by_rows(dup, POWER_OF_TWO)
        tl.store(dh + at + F, code, mask=(token < end)[:, None])
        tl.store(dh_scale + (j + F // WIDTH) * M + token, scale_R, mask=token < end)
        most_up = tl.maximum(most_up, magnitude(dequantised, 0).to(tl.int32, bitcast=True))
        most_act = tl.maximum(most_act, magnitude(value, 0).to(tl.int32, bitcast=True))
    of_act = factor(most_act.to(tl.float32, bitcast=True), POWER_OF_TWO)
    of_gate = factor(most_gate.to(tl.float32, bitcast=True), POWER_OF_TWO)
    of_up = factor(most_up.to(tl.float32, bitcast=True), POWER_OF_TWO)
    tl.store(act_scale + tile.to(tl.int64) * F + column, of_act)
    tl.store(turned_scale + tile.to(tl.int64) * 2 * F + column, of_gate)
    tl.store(turned_scale + tile.to(tl.int64) * 2 * F + F + column, of_up)
    for start in range(0, WIDTH, ROWS):
        token = first + start + tl.arange(0, ROWS)
        value, dgate, dup, total = swiglu_gradients(
            dact, h, h_scale, weight, token, end, column, j, F, scale_row, scale_column, WEIGHTED
        )
        row = tile.to(tl.int64) * WIDTH + start + tl.arange(0, ROWS)
        written = ((row < P) if FILL else (token < end))[:, None]
        at = column[None, :] * P + row[:, None]  # addresses are transposed rather than the tile
        tl.store(act + at, to_e4m3(value, of_act[None, :], POWER_OF_TWO), mask=written)
        scale_R, code, dequantised = by_rows(dgate, POWER_OF_TWO)
        tl.store(turned + at, to_e4m3(dequantised, of_gate[None, :], POWER_OF_TWO), mask=written)
        scale_R, code, dequantised = by_rows(dup, POWER_OF_TWO)
        tl.store(turned + at + F.to(tl.int64) * P, to_e4m3(dequantised, of_up[None, :], POWER_OF_TWO), mask=written)


@triton.jit
def swiglu_gradients(
    dact, h, h_scale, weight, token, end, column, j, F, scale_row, scale_column, WEIGHTED: tl.constexpr
):  # fmt: skip
    """`emulation.swiglu_gradients` for some tokens and 128 features; zeros for tokens from `end` on."""
    inside = token < end
    at = token[:, None] * (2 * F) + column[None, :]
    own = h_scale + token * scale_row + j * scale_column
    gate = tl.load(h + at, mask=inside[:, None], other=0.0).to(tl.float32)
    gate = gate * tl.load(own, mask=inside, other=0.0)[:, None]
    up = tl.load(h + at + F, mask=inside[:, None], other=0.0).to(tl.float32)
    up = up * tl.load(own + F // WIDTH * scale_column, mask=inside, other=0.0)[:, None]
    grad = tl.load(dact + token[:, None] * F + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    sig = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sig
    value = silu * up
    total = tl.sum(grad * value, 1)
    if WEIGHTED:
        gain = tl.load(weight + token, mask=inside, other=0.0).to(tl.float32)[:, None]
        value = value * gain
        grad = grad * gain
    return value, grad * up * ((1.0 - sig) * silu + sig), grad * silu, total


@triton.jit
def by_rows(x, POWER_OF_TWO: tl.constexpr):
    """Factors and values of x in tiles along its rows, and x as it will be read back."""
    scale_R = factor(magnitude(x, 1), POWER_OF_TWO)
    code = to_e4m3(x, scale_R[:, None], POWER_OF_TWO)
    return scale_R, code, code.to(tl.float32) * scale_R[:, None]
