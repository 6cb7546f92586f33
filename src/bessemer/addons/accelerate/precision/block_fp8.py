"""Scaling factors of E4M3, and weights quantised in blocks as in the release (V3 3.3.2; README_WEIGHTS.md): one factor
per 128 x 128 tile. `hf.safetensors_reader.dequantise_blocks` is the reverse.

Shapes: weight [R, C] float8_e4m3fn with scale_inv [ceil(R / block), ceil(C / block)].
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.hf.safetensors_reader import scale_shape

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
