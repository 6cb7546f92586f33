"""Muon's Newton-Schulz iterations (`train.update_rules`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels.library import DTYPES, call, fits, threads

LONGEST = 1024
"""Limit on the shorter side: larger matrices do not fit the cache, and torch's products are faster."""


def serves(x_NRC: Tensor) -> bool:
    return (
        x_NRC.dtype == torch.float32 and x_NRC.dim() == 3 and x_NRC.is_contiguous() and min(x_NRC.shape) > 0
        and min(x_NRC.shape[1:]) <= LONGEST and fits(x_NRC)
    )  # fmt: skip


def newton_schulz_(
    x_NRC: Tensor, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Replaces every matrix [R, C] by an approximation of U V^T, times `scale`. The operands of the products are in
    `dtype`, matrices and sums in float32; without AMX, BF16 operands stay in float32."""
    call(f"newton_schulz_{DTYPES[dtype]}", "piiiiffffi", x_NRC, *x_NRC.shape, steps, *coefficients, scale, threads())
