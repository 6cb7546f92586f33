"""RMSNorm (`model.norm`): C++ on a CPU and Triton on a GPU, each one operation that saves only its input.

Under torch.compile on CUDA the equation runs, and the compiler fuses it with its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels.fused import Fused
from bessemer.addons.accelerate.kernels.library import DTYPES, call, fits, threads
from bessemer.addons.accelerate.kernels.operation import operation

BLOCK = 64
"""Rows per backward task; each task has its own row of `partial`."""


def serves(x: Tensor, weight_D: Tensor, eps: float = 0.0) -> bool:
    return fits(x) and weight_D.dtype == torch.float32 and weight_D.is_contiguous() and x.numel() > 0


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as rows with a constant stride, and that stride; copies only if x has none."""
    if x.dim() == 1 or x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1:  # columns of a wider tensor
        flat = x.stride(-2)
        if all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2)):
            return x, flat
    return x.contiguous(), x.shape[-1]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`normalise` in C++."""
    rows, stride = _rows(x)
    y, D = torch.empty(x.shape, dtype=x.dtype), x.shape[-1]
    call(f"rms_norm_{DTYPES[x.dtype]}", "pippiifi", rows, stride, weight_D, y, x.numel() // D, D, eps, threads())
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`normalise_backward` in C++."""
    rows, stride = _rows(x)
    dy, D = dy.contiguous(), x.shape[-1]
    N = x.numel() // D
    dx, dweight_D = torch.empty(x.shape, dtype=x.dtype), torch.empty_like(weight_D)
    partial = weight_D.new_empty(-(-N // BLOCK), D)
    call(
        f"rms_norm_backward_{DTYPES[x.dtype]}", "ppipppp" + "iifi",
        dy, rows, stride, weight_D, dx, dweight_D, partial, N, D, eps, threads(),
    )  # fmt: skip
    return dx, dweight_D


# --- with gradients --------------------------------------------------------------------------------------------------


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which is kept with size 1."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


def _normalise_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * _scale(x32, eps)).mul_(weight_D).to(x.dtype)


def _normalise_backward_reference(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32, dy32 = x.float(), dy.float()
    scale = _scale(x32, eps)
    z = x32 * scale
    dweight_D = (dy32 * z).flatten(0, -2).sum(0)
    dz = dy32 * weight_D
    inner = torch.linalg.vecdot(dz, z).unsqueeze(-1).mul_(-1 / x.shape[-1])
    return dz.addcmul_(z, inner).mul_(scale).to(x.dtype), dweight_D


_normalise = Fused("triton_norm", "forward", _normalise_reference)
_normalise_backward = Fused("triton_norm", "backward", _normalise_backward_reference)


def normalise(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension without an autograd graph, in x's dtype."""
    return rms_norm(x, weight_D, eps) if serves(x, weight_D) else _normalise(x, weight_D, eps)


def normalise_backward(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and of the gain (float32), recomputed from the input."""
    if serves(x, weight_D) and dy.dtype == x.dtype:
        return rms_norm_backward(dy, x, weight_D, eps)
    return _normalise_backward(dy, x, weight_D, eps)


class _CPUNorm(torch.autograd.Function):
    """Saves only its input, in the input's dtype."""

    @staticmethod
    def forward(ctx, x, weight_D, eps):
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return rms_norm(x, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *normalise_backward(dy, *ctx.saved_tensors, ctx.eps), None


def on_cpu(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`model.norm.rms_norm`."""
    return (_CPUNorm.apply if torch.is_grad_enabled() else rms_norm)(x, weight_D, eps)


@operation("rms_norm")
def on_gpu(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`model.norm.rms_norm` as one operation that saves only its input."""
    return normalise(x, weight_D, eps)


@torch.library.register_fake(on_gpu)
def _(x, weight_D, eps):
    return x.new_empty(x.shape)


@operation("rms_norm_backward")
def _rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return normalise_backward(dy, x, weight_D, eps)


@torch.library.register_fake(_rms_norm_backward)
def _(dy, x, weight_D, eps):
    return x.new_empty(x.shape), torch.empty_like(weight_D)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _grad(ctx, dy):
    return *_rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None


torch.library.register_autograd(on_gpu, _grad, setup_context=_setup)
