"""RMSNorm: w * z / sqrt(mean(z^2) + eps), computed in float32 (as in the released code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.model.ops import operation


@operation
def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension, in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], weight_D, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the last dimension; the gain stays in float32 whatever the compute dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
