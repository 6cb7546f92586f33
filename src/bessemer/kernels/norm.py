"""RMSNorm (`model.norm`)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.kernels.library import DTYPES, call, fits, threads

BLOCK = 64
"""Rows per backward task; each task has its own row of `partial`."""


def serves(x: Tensor, weight_D: Tensor) -> bool:
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
    """`model.norm.normalise`."""
    rows, stride = _rows(x)
    y, D = torch.empty(x.shape, dtype=x.dtype), x.shape[-1]
    call(f"rms_norm_{DTYPES[x.dtype]}", "pippiifi", rows, stride, weight_D, y, x.numel() // D, D, eps, threads())
    return y


def rms_norm_backward(dy: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`model.norm.normalise_backward`."""
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
