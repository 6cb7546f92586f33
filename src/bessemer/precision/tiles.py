"""FP8 operands with fine-grained online scales (V3 3.3.2, reference D.1, D.2).

An operand of a GEMM is a matrix whose last dimension is summed over. It is stored as E4M3 values and one factor per
group of them, found from the values themselves at every call: factor = largest magnitude / 448, value = x / factor.

    tile     1 x 128: one row, 128 columns              activations, their gradients, both operands of wgrad
    block    128 x 128                                  weights
    tensor   all of it                                  what others do; for comparison

Ragged edges belong to a smaller group. A group of zeros has factor 1. A group that holds a NaN or an infinity becomes
NaN throughout, so it cannot pass unnoticed. Magnitudes below the smallest normal float32 times 448 become 0.

Shapes: M rows, K columns, J = ceil(K / 128).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.precision.block_fp8 import factor

TILE = 128
Group = Literal["tile", "block", "tensor"]


class Operand(NamedTuple):
    """A quantised matrix, or a stack of them: the value at (m, k) is value[m, k] * scale[m, k // 128], whatever the
    groups were. Values may be laid out in any order (`transpose` moves nothing)."""

    value_MK: Tensor
    """float8_e4m3fn, [..., M, K]."""
    scale_MJ: Tensor
    """float32, [..., M, J]."""

    def dequantise(self) -> Tensor:
        """float32 [..., M, K]."""
        out = as_float32(self.value_MK)
        for part, scale in by_tile(out, self.scale_MJ):
            part.mul_(scale)
        return out


def as_float32(value: Tensor) -> Tensor:
    """E4M3 values without their NaN, which the factor carries: exponent and mantissa moved to where float32 has them,
    and one multiplication for the different bias. Four times as fast as torch's conversion on a CPU."""
    bits = value.view(torch.int8).to(torch.int32)  # s sss... seeeemmm
    bits.bitwise_left_shift_(20).bitwise_and_(-0x78000001)  # s 0000eeee mmm0...
    return bits.view(torch.float32).mul_(2.0**120)


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """The operand of a matrix, or of a stack [..., M, K] whose groups never reach from one matrix into the next;
    `power_of_two` rounds every factor up to one, so that scaling itself never rounds."""
    if x_MK.dim() < 2 or not x_MK.is_floating_point():
        raise ValueError(f"an FP8 operand is a matrix of floats, got {x_MK.dtype} {list(x_MK.shape)}")
    out = x_MK.detach().to(torch.float32, copy=True)
    scale_MJ = factor(_shared(_largest(out), group), power_of_two)
    for part, scale in by_tile(out, scale_MJ):
        part.div_(scale)
    # no clamp: the factor follows the largest magnitude, so nothing is beyond 448 by more than a rounding
    return Operand(out.to(torch.float8_e4m3fn), scale_MJ)


def by_tile(x_MK: Tensor, scale_MJ: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(columns, their factors) as views that broadcast: all whole tiles, then what is left."""
    whole = x_MK.shape[-1] // TILE
    pairs = [(x_MK[..., : whole * TILE].unflatten(-1, (whole, TILE)), scale_MJ[..., :whole, None])] if whole else []
    return pairs + ([(x_MK[..., whole * TILE :], scale_MJ[..., whole:])] if x_MK.shape[-1] % TILE else [])


def _largest(x_MK: Tensor) -> Tensor:
    """Largest magnitude in each row's tiles, [..., M, J]."""
    columns_first = x_MK.stride(-1) > x_MK.stride(-2)  # 6x as fast read in the order of memory
    at, x = (-2, x_MK.transpose(-1, -2)) if columns_first else (-1, x_MK)
    K = x.shape[at]
    whole = K // TILE
    main, rest = x.split([whole * TILE, K - whole * TILE], at)
    found = [main.unflatten(at, (whole, TILE)).abs().amax(at)] if whole else []
    found += [rest.abs().amax(at, keepdim=True)] if K % TILE else []
    amax = torch.cat(found, at) if found else x.abs()  # no columns, no tiles
    return amax.transpose(-1, -2) if columns_first else amax


def transpose(block: Operand) -> Operand:
    """Matrices quantised by blocks (or as a whole) the other way round: factors move, nothing is rounded again."""
    value_KM = block.value_MK.transpose(-1, -2)
    first_JB = block.scale_MJ[..., ::TILE, :].transpose(-1, -2)  # the factor of every block
    return Operand(value_KM, first_JB.repeat_interleave(TILE, -2)[..., : value_KM.shape[-2], :])


def _shared(amax_MJ: Tensor, group: Group) -> Tensor:
    """Every group's largest magnitude at each of its rows."""
    if group == "tile":
        return amax_MJ
    if group == "tensor":
        return amax_MJ.amax((-2, -1), keepdim=True).expand_as(amax_MJ) if amax_MJ.numel() else amax_MJ
    M = amax_MJ.shape[-2]
    rows = -(-M // TILE)
    padded = F.pad(amax_MJ, (0, 0, 0, rows * TILE - M)).unflatten(-2, (rows, TILE))
    return padded.amax(-2).repeat_interleave(TILE, -2)[..., :M, :]
