"""The 12-bit format of the one activation that attention's backward needs too (V3 3.3.3; reference D.1, D.5).

6 bits of mantissa, 5 of exponent with the bias of float16, so every value is a float16 whose last 4 bits are 0; 12 bits
each, two in three bytes. Before rounding a tile of 1 x 128 is divided by a power of two, the one of its E4M3 form, so
that quantising again along the tokens rounds nothing a second time for the sake of scale.

Shapes: M rows, K columns, J = ceil(K / 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.precision.tiles import by_tile

LARGEST = 65024.0
"""(2 - 2^-6) * 2^15, with the highest exponent kept for infinities and NaN as in IEEE formats."""
SMALLEST_NORMAL = 2.0**-14


def round_e5m6(x: Tensor) -> Tensor:
    """x rounded to the format, ties to even, in float32. Larger magnitudes saturate; infinities and NaN stay."""
    x = x.float()
    bits = x.view(torch.int32)
    last = (bits >> 17).bitwise_and_(1)
    normal = (bits + 0xFFFF).add_(last).bitwise_and_(~0x1FFFF).view(torch.float32).clamp_(-LARGEST, LARGEST)
    small = (x + 12.0).sub_(12.0)  # float32 numbers near 12 are 2^-20 apart, as the format's subnormals are
    rounded = torch.where(x.abs() < SMALLEST_NORMAL, small, normal)
    return torch.where(torch.isfinite(x), rounded, x)


class Packed(NamedTuple):
    """A matrix in 12 bits an element."""

    code: Tensor
    """uint8 [M, ceil(K / 2) * 3]."""
    scale_MJ: Tensor
    """float32 powers of two."""

    def unpack(self, columns: int, dtype: torch.dtype) -> Tensor:
        """[M, K] with K = `columns`."""
        b = self.code.unflatten(-1, (-1, 3)).to(torch.int16)
        pairs = torch.stack((b[..., 0] << 4 | b[..., 1] >> 4, (b[..., 1] & 15) << 8 | b[..., 2]), -1)
        out = (pairs.flatten(-2)[..., :columns] << 4).view(torch.float16).float()
        for part, scale in by_tile(out, self.scale_MJ):
            part.mul_(scale)
        return out.to(dtype)


def pack(x_MK: Tensor, scale_MJ: Tensor) -> Packed:
    """x / scale in 12 bits; `scale_MJ` holds powers of two, one for every tile."""
    scaled = x_MK.to(torch.float32, copy=True)
    for part, scale in by_tile(scaled, scale_MJ):
        part.div_(scale)
    code = (round_e5m6(scaled).half().view(torch.int16) >> 4) & 0xFFF
    if code.shape[-1] % 2:
        code = torch.nn.functional.pad(code, (0, 1))
    a, b = code.unflatten(-1, (-1, 2)).unbind(-1)
    return Packed(torch.stack((a >> 4, (a & 15) << 4 | b >> 8, b & 255), -1).to(torch.uint8).flatten(-2), scale_MJ)
