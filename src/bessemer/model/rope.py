"""Rotary position embedding, interleaved pairs, with YaRN (V3 4.3; reference equations of the released code).

Pair j of a head is (x_{2j}, x_{2j+1}), rotated as a complex number by position * theta_j. Plain RoPE serves the whole
short-context stage; YaRN is switched on by the config, never by the length of a batch or a cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bessemer.model.config import ModelConfig, yarn_mscale


def correction_range(cfg: ModelConfig) -> tuple[int, int]:
    """First and last pair of the YaRN ramp: pairs turning faster keep their frequency, slower ones are divided by s."""

    def pair(rotations: float) -> float:
        length = cfg.original_seq_len / (rotations * 2 * math.pi)
        return cfg.qk_rope_head_dim * math.log(length) / (2 * math.log(cfg.rope_theta))

    low, high = math.floor(pair(cfg.beta_fast)), math.ceil(pair(cfg.beta_slow))
    return max(low, 0), min(high, cfg.qk_rope_head_dim - 1)


def frequencies(cfg: ModelConfig) -> Tensor:
    """theta_j for each pair, [d_h^R / 2], float32."""
    exponent = torch.arange(0, cfg.qk_rope_head_dim, 2, dtype=torch.float32) / cfg.qk_rope_head_dim
    theta = 1.0 / (cfg.rope_theta**exponent)
    if not cfg.yarn:
        return theta
    low, high = correction_range(cfg)
    pairs = torch.arange(cfg.qk_rope_head_dim // 2, dtype=torch.float32)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return theta * (1 - ramp) + theta / cfg.rope_factor * ramp


def table(cfg: ModelConfig, length: int, device: torch.device | None = None) -> Tensor:
    """cos and sin for positions 0..length-1: [length, d_h^R / 2, 2], float32.

    Multiplied by m(mscale) / m(mscale_all_dim), which is 1 for V3: its temperature sits in the softmax scale.
    """
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequencies(cfg)
    scale = 1.0
    if cfg.yarn:
        scale = yarn_mscale(cfg.rope_factor, cfg.mscale) / yarn_mscale(cfg.rope_factor, cfg.mscale_all_dim)
    return (torch.stack((angle.cos(), angle.sin()), dim=-1) * scale).to(device)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the last dimension of x by the table rows given.

    x [..., d_h^R]; cos_sin broadcastable to [..., d_h^R / 2, 2]. Computed in float32, returned in x's dtype.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # the same numbers in a fifth of the time
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.view_as_complex(cos_sin.contiguous())
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
