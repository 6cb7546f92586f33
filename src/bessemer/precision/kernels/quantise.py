"""Matrices into FP8 operands: tiles of 1 x 128, blocks of 128 x 128, and tiles turned from rows to columns.

What is written is bit for bit what `tiles.quantise` gives. Factors are stored column by column, [J, M] in memory and
seen as [M, J]: a GEMM takes those of many rows at one j, which then lie side by side.

Matrices may come in a stack [..., M, K]; no block reaches from one into the next.

Shapes: M rows (tokens T), K columns, J = ceil(K / 128) tiles of a row, P columns of a turned matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bessemer.precision.kernels.e4m3 import factor, magnitude, to_e4m3
from bessemer.precision.kernels.groups import locate, on_device
from bessemer.precision.tiles import TILE, Operand

WIDTH = tl.constexpr(TILE)


def empty_operand(shape: Sequence[int], like: Tensor) -> Operand:
    """Room for values [..., M, K], and for factors stored column by column."""
    *stack, M, K = shape
    value = torch.empty(shape, dtype=torch.float8_e4m3fn, device=like.device)
    scale = torch.empty(*stack, -(-K // TILE), M, dtype=torch.float32, device=like.device)
    return Operand(value, scale.transpose(-1, -2))


def tiles(x_MK: Tensor, power_of_two: bool = False) -> Operand:
    """Tiles of 1 x 128 of a float32 or bfloat16 matrix, or of a stack of them, where every row is on its own."""
    rows_MK = _rows_in_memory(x_MK.flatten(0, -2))
    M, K = rows_MK.shape
    value_MK, scale_MJ = empty_operand((M, K), rows_MK)
    rows = 32
    if rows_MK.numel():
        _tiles[(triton.cdiv(M, rows), triton.cdiv(K, TILE))](
            rows_MK, value_MK, scale_MJ, M, K, rows_MK.stride(0), power_of_two, rows
        )
    return Operand(value_MK.unflatten(0, x_MK.shape[:-1]), scale_MJ.unflatten(0, x_MK.shape[:-1]))


def blocks(x_MK: Tensor, power_of_two: bool = False) -> Operand:
    """Blocks of 128 x 128 of float32 or bfloat16 matrices; every row has its block's factor."""
    x_MK = x_MK.detach().contiguous()
    M, K = x_MK.shape[-2:]
    out = empty_operand(x_MK.shape, x_MK)
    if x_MK.numel():
        _blocks[(triton.cdiv(M, TILE), triton.cdiv(K, TILE), x_MK.numel() // (M * K))](
            x_MK, out.value_MK, out.scale_MJ, M, K, power_of_two, num_warps=8
        )
    return out


def turn(operand: Operand, count: Sequence[int] | None = None, power_of_two: bool = False) -> Operand:
    """From tiles of 1 x 128 to the turned matrix in tiles along its rows, which are the columns of before.

    operand [T, K] becomes [K, T]. With `count`, tokens per group, no tile reaches into the next group: every group's
    columns are filled up with zeros to a multiple of 128, [K, P] with P = 128 * sum of ceil(count / 128).
    """
    value_TK = operand.value_MK.contiguous()
    T, K = value_TK.shape
    groups = [T] if count is None else list(count)
    numbers = triton.cdiv(T, TILE) if count is None else sum(-(-c // TILE) for c in groups)
    out = empty_operand((K, T if count is None else numbers * TILE), value_TK)
    if numbers and K:
        _turn[(numbers, triton.cdiv(K, 64))](
            value_TK, operand.scale_MJ, on_device(groups, value_TK.device), out.value_MK, out.scale_MJ,
            K, out.value_MK.shape[1], *operand.scale_MJ.stride(),
            power_of_two, len(groups), triton.next_power_of_2(len(groups)), count is not None, 64, num_warps=4,
        )  # fmt: skip
    return out


def _rows_in_memory(x_MK: Tensor) -> Tensor:
    """x, detached, with every row's elements side by side."""
    x_MK = x_MK.detach()
    return x_MK if x_MK.stride(1) == 1 or x_MK.shape[1] == 1 else x_MK.contiguous()


@triton.jit
def _tiles(x, value, scale, M, K, x_row, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr):
    """One program: ROWS tiles below one another."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    x_RT = tl.load(x + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale_R = factor(magnitude(x_RT, 1), POWER_OF_TWO)
    tl.store(value + row[:, None] * K + column[None, :], to_e4m3(x_RT, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)


@triton.jit
def _blocks(x, value, scale, M, K, POWER_OF_TWO: tl.constexpr):
    """One program: one block of one matrix."""
    above = tl.program_id(2).to(tl.int64) * M  # rows of the matrices before
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < M)[:, None] & (column < K)[None, :]
    at = (above + row)[:, None] * K + column[None, :]
    x_RT = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(magnitude(x_RT, 1).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    scale_R = factor(tl.full((WIDTH,), 0.0, tl.float32) + largest, POWER_OF_TWO)
    tl.store(value + at, to_e4m3(x_RT, scale_R[:, None], POWER_OF_TWO), mask=inside)
    tl.store(scale + above * tl.num_programs(1) + tl.program_id(1).to(tl.int64) * M + row, scale_R, mask=row < M)


@triton.jit
def _turn(
    value, scale, count, turned, turned_scale, K, P, scale_row, scale_column,
    POWER_OF_TWO: tl.constexpr, GROUPS: tl.constexpr, ROOM: tl.constexpr, FILL: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: 128 tokens of one group, COLUMNS columns that share their tiles."""
    tile = tl.program_id(0)
    _, first, end, number = locate(tile, count, GROUPS, ROOM, WIDTH)
    token = first + number * WIDTH + tl.arange(0, WIDTH).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < end)[:, None] & (column < K)[None, :]
    x_TC = tl.load(value + token[:, None] * K + column[None, :], mask=inside, other=0.0).to(tl.float32)
    j = tl.program_id(1) * COLUMNS // WIDTH
    scale_T = tl.load(scale + token * scale_row + j * scale_column, mask=token < end, other=0.0)
    x_TC = x_TC * scale_T[:, None]
    scale_C = factor(magnitude(x_TC, 0), POWER_OF_TWO)
    place = tile.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    written = (column < K)[None, :] & ((place < P)[:, None] if FILL else inside)
    # Addresses are turned, not the tile: an FP8 tile needs no transposition of its own.
    tl.store(turned + column[None, :] * P + place[:, None], to_e4m3(x_TC, scale_C[None, :], POWER_OF_TWO), mask=written)
    tl.store(turned_scale + tile.to(tl.int64) * K + column, scale_C, mask=column < K)
