"""Muon's Newton-Schulz iterations (`train.update_rules`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.kernels.library import call, fits, threads

LONGEST = 1024
"""Limit on the shorter side: larger matrices do not fit the cache, and torch's products are faster."""


def serves(x_NRC: Tensor) -> bool:
    return (
        x_NRC.dtype == torch.float32 and x_NRC.dim() == 3 and min(x_NRC.shape) > 0
        and min(x_NRC.shape[1:]) <= LONGEST and fits(x_NRC)
    )  # fmt: skip


def newton_schulz(x_NRC: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    """Approximates U V^T of every matrix [R, C]; returns a new tensor."""
    x_NRC = x_NRC.clone(memory_format=torch.contiguous_format)
    call("newton_schulz", "piiiifffi", x_NRC, *x_NRC.shape, steps, *coefficients, threads())
    return x_NRC
