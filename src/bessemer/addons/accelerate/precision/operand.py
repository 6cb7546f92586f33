"""FP8 operands with fine-grained scaling factors, computed online (V3 3.3.2).

A GEMM operand is a matrix whose last dimension is summed over. It is stored as E4M3 values and one factor per group of
them, computed from the data at every call: factor = largest magnitude / 448, value = x / factor.

    tile     1 x 128: one row, 128 columns              activations, their gradients, both operands of wgrad
    block    128 x 128                                  weights
    tensor   the whole tensor                           coarse scaling, for comparison

Ragged edges form smaller groups. A group of zeros has factor 1. A group with a NaN or an infinity becomes NaN
throughout, so it cannot go unnoticed. Magnitudes below the smallest normal float32 times 448 become 0.

Shapes: M and N rows, K columns, J = ceil(K / 128), G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.precision.block_fp8 import E4M3_MAX, factor

TILE = 128
Group = Literal["tile", "block", "tensor"]


class Operand(NamedTuple):
    """A quantised matrix, or a stack of them: element (m, k) is value[m, k] * scale[m, k // 128], whatever the groups
    were. Values may have any memory layout (`transpose` does not copy them)."""

    value_MK: Tensor
    """float8_e4m3fn, [..., M, K]."""
    scale_MJ: Tensor
    """float32, [..., M, J]."""

    def dequantise(self) -> Tensor:
        """The matrix in float32, [..., M, K]."""
        out = as_float32(self.value_MK)
        for part, scale in by_tile(out, self.scale_MJ):
            part.mul_(scale)
        return out


@dataclass(frozen=True, eq=False)
class DeviceCounts:
    """Rows per group that only the device knows, so that the host need not wait. Sizes follow from an upper bound, so
    after the last group comes a rest that belongs to no group. Products leave zeros there."""

    rows_G: Tensor
    """int32."""
    total: int
    """Rows of all groups and of the rest."""
    whole: bool = False
    """Whether the rows of every group are a multiple of 128."""

    def __len__(self) -> int:
        return len(self.rows_G)

    @property
    def columns(self) -> int:
        """Upper bound on the columns of `retile`'s result, where each group is padded to a multiple of 128."""
        return self.total if self.whole else padded(self.total, len(self))

    @property
    def most_rest(self) -> int:
        """Upper bound on the rest, if the rows of each group were padded to a multiple of 128."""
        return (TILE - 1) * len(self)

    @functools.cached_property
    def group_M(self) -> Tensor:
        """The group of each row, int32; -1 in the rest."""
        end_G = self.rows_G.cumsum(0)
        row_M = torch.arange(self.total, device=end_G.device)
        group_M = torch.searchsorted(end_G, row_M, right=True, out_int32=True)
        return group_M.masked_fill_(group_M == len(self), -1)


Counts = Sequence[int] | DeviceCounts
"""Rows per group."""


def padded(rows: int, groups: int) -> int:
    """The most rows that `rows` can become if each of `groups` groups is padded to a multiple of 128."""
    return (rows + (TILE - 1) * min(rows, groups)) // TILE * TILE


def as_float32(value: Tensor) -> Tensor:
    """E4M3 values as float32, except NaN, which the factor carries. Shifts exponent and mantissa into place and
    corrects the bias with one multiplication: four times as fast as torch's conversion on a CPU."""
    bits = value.view(torch.int8).to(torch.int32)  # s sss... seeeemmm
    bits.bitwise_left_shift_(20).bitwise_and_(-0x78000001)  # s 0000eeee mmm0...
    return bits.view(torch.float32).mul_(2.0**120)


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """Quantises a matrix, or a stack [..., M, K]; groups never span two matrices. `power_of_two` rounds every factor up
    to a power of two, so that scaling itself never rounds."""
    if x_MK.dim() < 2 or not x_MK.is_floating_point():
        raise ValueError(f"an FP8 operand is a matrix of floats, got {x_MK.dtype} {list(x_MK.shape)}")
    out = x_MK.detach().to(torch.float32, copy=True)
    scale_MJ = factor(_group_maximum(_magnitudes(out), group), power_of_two)
    for part, scale in by_tile(out, scale_MJ):
        part.div_(scale)
    # no clamp: the factor follows the largest magnitude, so no ratio exceeds 448 by more than a rounding error
    return Operand(out.to(torch.float8_e4m3fn), scale_MJ)


def quantise_by(x_MK: Tensor, scale: Tensor) -> Operand:
    """Quantises a matrix with one given factor, or a stack [..., M, K] with one per matrix; values larger than 448
    factors saturate at 448."""
    scale_MJ = scale[..., None, None].expand(*x_MK.shape[:-1], -(-x_MK.shape[-1] // TILE)).contiguous()
    ratio = (x_MK.detach().float() / scale[..., None, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    return Operand(ratio.to(torch.float8_e4m3fn), scale_MJ)


def by_tile(x_MK: Tensor, scale_MJ: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(columns, their factors) as broadcastable views: all whole tiles, then the ragged last one."""
    n_whole = x_MK.shape[-1] // TILE
    pairs = (
        [(x_MK[..., : n_whole * TILE].unflatten(-1, (n_whole, TILE)), scale_MJ[..., :n_whole, None])] if n_whole else []
    )
    return pairs + ([(x_MK[..., n_whole * TILE :], scale_MJ[..., n_whole:])] if x_MK.shape[-1] % TILE else [])


def _magnitudes(x_MK: Tensor) -> Tensor:
    """Largest magnitude of each row's tiles, [..., M, J]."""
    columns_first = x_MK.stride(-1) > x_MK.stride(-2)  # 6x as fast when read in memory order
    at, x = (-2, x_MK.transpose(-1, -2)) if columns_first else (-1, x_MK)
    K = x.shape[at]
    n_whole = K // TILE
    main, rest = x.split([n_whole * TILE, K - n_whole * TILE], at)
    parts = [main.unflatten(at, (n_whole, TILE)).abs().amax(at)] if n_whole else []
    parts += [rest.abs().amax(at, keepdim=True)] if K % TILE else []
    amax = torch.cat(parts, at) if parts else x.abs()  # no columns, no tiles
    return amax.transpose(-1, -2) if columns_first else amax


def transpose(block: Operand) -> Operand:
    """Transposes matrices quantised by blocks (or by tensor) without rounding again."""
    value_KM = block.value_MK.transpose(-1, -2)
    first_JB = block.scale_MJ[..., ::TILE, :].transpose(-1, -2)  # the factor of every block
    return Operand(value_KM, first_JB.repeat_interleave(TILE, -2)[..., : value_KM.shape[-2], :])


def _group_maximum(amax_MJ: Tensor, group: Group) -> Tensor:
    """The largest magnitude of each group, repeated for each of its rows."""
    if group == "tile":
        return amax_MJ
    if group == "tensor":
        return amax_MJ.amax((-2, -1), keepdim=True).expand_as(amax_MJ) if amax_MJ.numel() else amax_MJ
    M = amax_MJ.shape[-2]
    rows = -(-M // TILE)
    padded = F.pad(amax_MJ, (0, 0, 0, rows * TILE - M)).unflatten(-2, (rows, TILE))
    return padded.amax(-2).repeat_interleave(TILE, -2)[..., :M, :]


def check_matrix(x: Tensor, stacked: bool = False) -> None:
    """Raises an error unless x is a float32 or bfloat16 matrix, or with `stacked` a stack of them."""
    if x.dim() < 2 or (x.dim() > 2 and not stacked):
        raise ValueError(f"an FP8 operand is a matrix, got shape {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"float32 and bfloat16 are quantised, got {x.dtype}; convert it first")


def check_operand(name: str, operand: Operand, stacked: bool = False) -> None:
    """Raises an error unless values are E4M3 and factors float32, of matching shapes, on one device."""
    if not isinstance(operand, Operand):
        raise ValueError(f"{name} must be an Operand, as quantise() returns it, got {type(operand).__name__}")
    value, scale = operand
    if value.dim() != 2 + stacked:
        raise ValueError(f"{name} needs values of {2 + stacked} dimensions, got shape {list(value.shape)}")
    if value.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"{name} needs float8_e4m3fn and float32 factors, got {value.dtype} and {scale.dtype}")
    expected = [*value.shape[:-1], -(-value.shape[-1] // TILE)]
    if list(scale.shape) != expected:
        raise ValueError(f"{name} of {list(value.shape)} needs factors {expected}, got {list(scale.shape)}")
    if value.device != scale.device:
        raise ValueError(f"{name} has values on {value.device} and factors on {scale.device}")


def check_pair(x: Operand, w: Operand, out_dtype: torch.dtype, stacked: bool = False) -> None:
    """Checks the two operands of a GEMM and the dtype of its result; `stacked`: w has a matrix per group."""
    check_operand("x", x)
    check_operand("w", w, stacked)
    if x.value_MK.shape[-1] != w.value_MK.shape[-1]:
        raise ValueError(f"operands of {x.value_MK.shape[-1]} and {w.value_MK.shape[-1]} columns do not fit together")
    if x.value_MK.device != w.value_MK.device:
        raise ValueError(f"x is on {x.value_MK.device}, w on {w.value_MK.device}")
    if out_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a GEMM's result is float32 or bfloat16, not {out_dtype}")


def check_counts(count: Counts, rows: int | None = None, groups: int | None = None) -> tuple[int, ...] | DeviceCounts:
    """Checks the rows per group and returns them as host integers, or `DeviceCounts` unread. A tensor is copied to the
    host, which waits for its device."""
    if isinstance(count, DeviceCounts):
        if rows not in (None, count.total) or groups not in (None, len(count)):
            raise ValueError(f"counts of {len(count)} groups and {count.total} rows do not fit {groups} and {rows}")
        return count
    sizes = tuple(map(int, count.tolist() if isinstance(count, Tensor) else count))
    if min(sizes, default=0) < 0 or rows not in (None, sum(sizes)) or groups not in (None, len(sizes)):
        of = "" if groups is None else f" and {groups} matrices"
        raise ValueError(f"{len(sizes)} groups of {list(sizes)} rows do not fit {rows} rows{of}")
    return sizes


def block_factors(w: Operand) -> Tensor:
    """The factor of each block, [..., ceil(N / 128), J], of an operand quantised by blocks. NaN if a block's first and
    last rows have different factors, since the operand was then not quantised by blocks."""
    first, last = w.scale_MJ[..., ::TILE, :], w.scale_MJ[..., TILE - 1 :: TILE, :]
    if w.scale_MJ.shape[-2] % TILE:
        last = torch.cat([last, w.scale_MJ[..., -1:, :]], -2)
    return torch.where(first == last, first, float("nan")).contiguous()
