"""RMSNorm: w * z / sqrt(mean(z^2) + eps), computed in float32 (V3 A.3 of the released code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """Normalises the last dimension; the gain stays in float32 whatever the compute dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            normalise = _FewPasses.apply if torch.is_grad_enabled() else _normalise
            return normalise(x.float(), self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of the last dimension, kept as 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def _normalise(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return (x * _scale(x, eps)).mul_(weight_D)


class _FewPasses(torch.autograd.Function):
    """F.rms_norm for CPUs, where it is a chain of operations forward and a longer one backward: 4x as fast."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight_D, scale = ctx.saved_tensors
        z = x * scale
        dweight_D = (dy * z).flatten(0, -2).sum(0)
        dz = dy * weight_D
        inner = torch.linalg.vecdot(dz, z).unsqueeze(-1).mul_(-1 / x.shape[-1])
        return dz.addcmul_(z, inner).mul_(scale), dweight_D, None
