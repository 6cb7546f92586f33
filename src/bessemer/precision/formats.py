"""Two storage formats: block-scaled E4M3 checkpoint weights, and 12-bit activations for attention's backward.

Block FP8 (V3 3.3.2; README_WEIGHTS.md of the release) has one scaling factor per 128 x 128 tile:

    W[128p : 128p+128, 128q : 128q+128] = F8 tile * S[p, q]

- `scale_inv` is the factor to MULTIPLY by, despite its name.
- A matrix of R rows has ceil(R / 128) rows of tiles; the last one is cut off at the edge, never padded on disk.
- scale_fmt "ue8m0" (V3.1) only promises that every factor is a power of two. Whether stored as F32 or as E8M0 bytes, it
  is read as the float it stands for.

E5M6 (V3 3.3.3) holds the attention output, which both the output projection's wgrad and attention's own backward need.
It has 6 mantissa bits and 5 exponent bits with float16's bias: every value is a float16 whose last 4 bits are 0, and
two values take three bytes. Before rounding, a tile of 1 x 128 is divided by the power-of-two factor of its E4M3 form,
so that requantising it along the tokens adds no second rounding of the scale.

Shapes: weight [R, C] float8_e4m3fn with scale_inv [ceil(R / block), ceil(C / block)];
M rows, K columns, J = ceil(K / 128).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.errors import UserError
from bessemer.precision.operand import E4M3_MAX, by_tile, factor

E5M6_MAX = 65024.0
"""(2 - 2^-6) * 2^15; the highest exponent is reserved for infinities and NaN as in IEEE formats."""
SMALLEST_NORMAL = 2.0**-14


def scale_shape(shape: tuple[int, ...] | torch.Size, block: int = 128) -> tuple[int, int]:
    """Shape of `scale_inv` for a weight of this shape."""
    rows, columns = shape
    return -(-rows // block), -(-columns // block)


def dequantise_blocks(
    weight: Tensor, scale_inv: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The weight in `dtype`; the product is formed in float32 and rounded once.

    Works on one row of tiles at a time, so only 128 rows exist in float32. Raises UserError if the shapes do not match.
    """
    if weight.dim() != 2 or tuple(scale_inv.shape) != scale_shape(weight.shape, block):
        wanted = list(scale_shape(weight.shape, block)) if weight.dim() == 2 else "none (not a matrix)"
        raise UserError(
            f"scales {list(scale_inv.shape)} do not fit an FP8 weight {list(weight.shape)} in tiles of {block}: "
            f"expected {wanted}; the checkpoint is damaged or was quantised with another block size"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    columns = weight.shape[1]
    for p, factors in enumerate(scale_inv.float()):
        rows = slice(p * block, (p + 1) * block)
        out[rows] = weight[rows].float() * factors.repeat_interleave(block)[:columns]
    return out


def quantise_blocks(weight: Tensor, block: int = 128, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(F8 weight, float32 scale_inv): S = amax / 448 per tile, rounded UP to a power of two for ue8m0.

    The scale is rounded before the weights are divided by it; the reverse order gives finite but wrong values.
    """
    rows, columns = weight.shape
    p, q = scale_shape(weight.shape, block)
    padded = weight.new_zeros(p * block, q * block, dtype=torch.float32)
    padded[:rows, :columns] = weight
    tiled = padded.view(p, block, q, block)
    amax = tiled.abs().amax(dim=(1, 3))
    scale = factor(amax, ue8m0)
    scaled = (tiled / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def round_mantissa(x: Tensor, kept: int) -> Tensor:
    """x rounded to `kept` bits after the leading one, ties to even, as float32; exponents are not limited."""
    bits, dropped = x.float().view(torch.int32), 23 - kept
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
