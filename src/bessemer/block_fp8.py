"""Weights in block-scaled E4M3, as released (V3 3.3.2; README_WEIGHTS.md): one scaling factor per 128 x 128 tile,

    W[128p : 128p+128, 128q : 128q+128] = F8 tile * S[p, q]

- `scale_inv` is the factor to MULTIPLY by, despite its name.
- A matrix of R rows has ceil(R / 128) rows of tiles; the last one is cut off at the edge, never padded on disk.
- scale_fmt "ue8m0" (V3.1) only promises that every factor is a power of two. Whether stored as F32 or as E8M0 bytes, it
  is read as the float it stands for.

Shapes: weight [R, C] float8_e4m3fn with scale_inv [ceil(R / block), ceil(C / block)].
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.errors import UserError

E4M3_MAX = 448.0
SMALLEST = torch.finfo(torch.float32).tiny


def factor(amax: Tensor, power_of_two: bool = False) -> Tensor:
    """The scaling factor of a group whose largest magnitude is `amax`: amax / 448, optionally rounded up to a power of
    two; 1 for zeros, never below the smallest normal float32, and NaN if the group is not finite."""
    # divide by a tensor: CUDA multiplies by the reciprocal of a scalar, which is sometimes off in the last bit
    scale = torch.where(amax == 0, 1.0, (amax / amax.new_tensor(E4M3_MAX)).clamp_(min=SMALLEST))
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # log2 is sometimes off by one
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return scale.masked_fill_(~torch.isfinite(amax), float("nan"))


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
