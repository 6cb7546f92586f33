"""The 12-bit storage format of activations for attention's backward.

E5M6 (V3 3.3.3) holds the attention output, which both the output projection's wgrad and attention's own backward need.
It has 6 mantissa bits and 5 exponent bits with float16's bias: every value is a float16 whose last 4 bits are 0, and
two values take three bytes. Before rounding, a tile of 1 x 128 is divided by the power-of-two factor of its E4M3 form,
so that requantising it along the tokens adds no second rounding of the scale.

Shapes: M rows, K columns, J = ceil(K / 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.addons.accelerate.precision.operand import by_tile

E5M6_MAX = 65024.0
"""(2 - 2^-6) * 2^15; the highest exponent is reserved for infinities and NaN as in IEEE formats."""
SMALLEST_NORMAL = 2.0**-14


def round_mantissa(x: Tensor, kept_bits: int) -> Tensor:
    """x rounded to `kept` bits after the leading one, ties to even, as float32; exponents are not limited."""
    bits, dropped = x.float().view(torch.int32), 23 - kept_bits
    last = (bits >> dropped).bitwise_and_(1)
    half = (1 << dropped - 1) - 1
    return (bits + half).add_(last).bitwise_and_(-1 << dropped).view(torch.float32)


def round_e5m6(x: Tensor) -> Tensor:
    """x rounded to E5M6, ties to even, as float32. Larger magnitudes saturate; infinities and NaN are kept."""
    x = x.float()
    normal = round_mantissa(x, 6).clamp_(-E5M6_MAX, E5M6_MAX)
    small = (x + 12.0).sub_(12.0)  # float32 numbers near 12 are 2^-20 apart, as the format's subnormals are
    rounded = torch.where(x.abs() < SMALLEST_NORMAL, small, normal)
    return torch.where(torch.isfinite(x), rounded, x)


class PackedE5M6(NamedTuple):
    """A matrix in 12 bits per element."""

    code: Tensor
    """uint8 [M, ceil(K / 2) * 3]."""
    scale_MJ: Tensor
    """float32 powers of two."""

    def unpack(self, columns: int, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`, [M, K] with K = `columns`."""
        b = self.code.unflatten(-1, (-1, 3)).to(torch.int16)
        pairs = torch.stack((b[..., 0] << 4 | b[..., 1] >> 4, (b[..., 1] & 15) << 8 | b[..., 2]), -1)
        out = (pairs.flatten(-2)[..., :columns] << 4).view(torch.float16).float()
        for part, scale in by_tile(out, self.scale_MJ):
            part.mul_(scale)
        return out.to(dtype)


def pack_e5m6(x_MK: Tensor, scale_MJ: Tensor) -> PackedE5M6:
    """x / scale in 12 bits; `scale_MJ` holds a power of two for every tile."""
    scaled = x_MK.to(torch.float32, copy=True)
    for part, scale in by_tile(scaled, scale_MJ):
        part.div_(scale)
    code = (round_e5m6(scaled).half().view(torch.int16) >> 4) & 0xFFF
    if code.shape[-1] % 2:
        code = torch.nn.functional.pad(code, (0, 1))
    a, b = code.unflatten(-1, (-1, 2)).unbind(-1)
    return PackedE5M6(torch.stack((a >> 4, (a & 15) << 4 | b >> 8, b & 255), -1).to(torch.uint8).flatten(-2), scale_MJ)
