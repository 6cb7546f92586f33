"""Block-scaled FP8 weights as released (V3 3.3.2; README_WEIGHTS): one factor per 128 x 128 tile.

    W[128p : 128p+128, 128q : 128q+128] = F8 tile * S[p, q]

Invariants
- `scale_inv` is the factor to MULTIPLY by, despite its name.
- Edges are ragged: a matrix of R rows has ceil(R / 128) rows of tiles; the last is cut off, never padded on disk.
- scale_fmt "ue8m0" (V3.1) only promises that every factor is a power of two. Stored as F32 or as E8M0 bytes, it is
  read as the float it stands for.

Shapes: weight [R, C] float8_e4m3fn, scale_inv [ceil(R / block), ceil(C / block)].
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.errors import UserError

E4M3_MAX = 448.0
SMALLEST = torch.finfo(torch.float32).tiny


def tiles(shape: tuple[int, ...] | torch.Size, block: int = 128) -> tuple[int, int]:
    """Shape of `scale_inv` for a weight of this shape."""
    rows, columns = shape
    return -(-rows // block), -(-columns // block)


def dequantise(weight: Tensor, scale_inv: Tensor, block: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight in `dtype`; the product is formed in float32 and rounded once.

    Works one row of tiles at a time, so only 128 rows exist in float32. UserError when the shapes do not fit.
    """
    if weight.dim() != 2 or tuple(scale_inv.shape) != tiles(weight.shape, block):
        wanted = list(tiles(weight.shape, block)) if weight.dim() == 2 else "none (not a matrix)"
        raise UserError(
            f"scales {list(scale_inv.shape)} do not fit an FP8 weight {list(weight.shape)} in tiles of {block}: "
            f"expected {wanted}; the checkpoint is damaged or was quantised in another block size"
        )
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    columns = weight.shape[1]
    for p, factors in enumerate(scale_inv.float()):
        rows = slice(p * block, (p + 1) * block)
        out[rows] = weight[rows].float() * factors.repeat_interleave(block)[:columns]
    return out


def quantise(weight: Tensor, block: int = 128, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(F8 weight, float32 scale_inv): S = amax / 448 per tile, rounded UP to a power of two for ue8m0.

    Rounding the scale happens before the weights are divided by it; the reverse order is finite and wrong.
    """
    rows, columns = weight.shape
    p, q = tiles(weight.shape, block)
    padded = weight.new_zeros(p * block, q * block, dtype=torch.float32)
    padded[:rows, :columns] = weight
    tiled = padded.view(p, block, q, block)
    amax = tiled.abs().amax(dim=(1, 3))
    scale = factor(amax, ue8m0)
    scaled = (tiled / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.view_as(padded)[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def factor(amax: Tensor, power_of_two: bool = False) -> Tensor:
    """What a group whose largest magnitude is `amax` is divided by: amax / 448, rounded up to a power of two if asked
    for; 1 for zeros, never below the smallest normal float32, and NaN for a group that is not finite."""
    # by a tensor: CUDA divides by a number through its reciprocal, a last bit off now and then
    found = torch.where(amax == 0, 1.0, (amax / amax.new_tensor(E4M3_MAX)).clamp_(min=SMALLEST))
    if power_of_two:
        mantissa, exponent = torch.frexp(found)  # log2 would be off by one now and then
        found = torch.ldexp(torch.ones_like(found), exponent - (mantissa == 0.5).to(exponent.dtype))
    return found.masked_fill_(~torch.isfinite(amax), float("nan"))
