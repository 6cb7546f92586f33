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

from bessemer.precision.block_fp8 import E4M3_MAX, factor

TILE = 128
Group = Literal["tile", "block", "tensor"]


class Operand(NamedTuple):
    """A quantised matrix: the value at (m, k) is value[m, k] * scale[m, k // 128], whatever the groups were."""

    value_MK: Tensor
    """float8_e4m3fn."""
    scale_MJ: Tensor
    """float32."""

    def dequantise(self) -> Tensor:
        """float32 [M, K]."""
        columns = self.value_MK.shape[1]
        return self.value_MK.float() * self.scale_MJ.repeat_interleave(TILE, 1)[:, :columns]


def quantise(x_MK: Tensor, group: Group = "tile", power_of_two: bool = False) -> Operand:
    """The operand; `power_of_two` rounds every factor up to one, so that scaling itself never rounds."""
    if x_MK.dim() != 2:
        raise ValueError(f"an FP8 operand is a matrix, got shape {list(x_MK.shape)}")
    M, K = x_MK.shape
    J = -(-K // TILE)
    tiled_MJT = F.pad(x_MK.detach().float(), (0, J * TILE - K)).view(M, J, TILE)
    scale_MJ = factor(_shared(tiled_MJT.abs().amax(-1), group), power_of_two)
    scaled = (tiled_MJT / scale_MJ.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    return Operand(scaled.flatten(1)[:, :K].to(torch.float8_e4m3fn), scale_MJ)


def transpose(block: Operand) -> Operand:
    """A matrix quantised by blocks (or as a whole) the other way round: its factors move, nothing is rounded again."""
    value_KM = block.value_MK.t().contiguous()
    first_JB = block.scale_MJ[::TILE].t()  # the factor of every block
    return Operand(value_KM, first_JB.repeat_interleave(TILE, 0)[: len(value_KM)].contiguous())


def _shared(amax_MJ: Tensor, group: Group) -> Tensor:
    """Every group's largest magnitude at each of its rows."""
    if group == "tile":
        return amax_MJ
    if group == "tensor":
        return amax_MJ.amax().expand_as(amax_MJ)
    M, J = amax_MJ.shape
    rows = -(-M // TILE)
    padded = F.pad(amax_MJ, (0, 0, 0, rows * TILE - M)).view(rows, TILE, J)
    return padded.amax(1).repeat_interleave(TILE, 0)[:M]


E5M6_MAX = 65024.0
"""(2 - 2^-6) * 2^15, with the highest exponent kept for infinities and NaN as in IEEE formats."""


def e5m6(x: Tensor) -> Tensor:
    """x rounded to the 12-bit format of the one activation that attention's backward needs too (V3 3.3.3; reference
    D.5): 6 bits of mantissa, 5 of exponent, in float32. Larger magnitudes saturate; infinities and NaN stay."""
    x = x.float()
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), exponent.clamp(min=-13) - 7)
    rounded = ((x / step).round() * step).clamp(-E5M6_MAX, E5M6_MAX)
    return torch.where(torch.isfinite(x), rounded, x)
