"""The update rules: AdamW of a flat vector, and Muon of a matrix.

AdamW (Loshchilov and Hutter 2019; constants in V3 4.2):

    g = grad / divisor
    w <- w (1 - lr * decay)                      decoupled
    m <- b1 m + (1-b1) g ;  v <- b2 v + (1-b2) g^2
    w <- w - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

torch's fused kernel does it in one pass over memory and applies the divisor (token count and clip together) for free;
moments in another dtype than float32 go through the formulas in cache-sized blocks.

Muon (Jordan et al. 2024; decay and scale of Liu et al. 2025, "Muon is scalable", 2.2):

    g = grad / divisor
    m <- b m + (1-b) g
    u = b m + (1-b) g                            Nesterov
    O = U V^T of u = U S V^T                     by five steps of Newton-Schulz, all singular values to about 1
    w <- w (1 - lr * decay) - lr * 0.2 * sqrt(max(rows, columns)) * O

The factor gives an update the same root mean square as AdamW's, so learning rate and decay carry over. Muon is not in
the V3 paper, which uses AdamW throughout; Moonlight and Kimi K2 trained V3's architecture with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.model.ops import operation

BLOCK = 1 << 16
"""Elements per block on a CPU if moments are not float32."""
MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Odd polynomial a x + b x^3 + c x^5: steep at 0, values within 0.7 to 1.2 after five steps (Jordan et al. 2024)."""
GPU_BLOCK = 1 << 26
"""Elements per block on a GPU: five float32 temporaries of a whole vector would be larger than the optimizer."""


def most_at_once(device: torch.device) -> int:
    """Elements orthogonalised at a time: three such float32 matrices fit a CPU's cache; a GPU is filled."""
    return 1 << 18 if device.type == "cpu" else GPU_BLOCK


def block(device: torch.device) -> int:
    """Elements updated at a time if moments are not float32."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def adamw_(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, divisor: float,
) -> None:  # fmt: skip
    """Updates w, m and v in place; grad may be overwritten. `step` counts from 1."""
    if m.dtype == torch.float32 and w.device.type in ("cpu", "cuda"):  # MPS's kernel ignores grad_scale
        # The kernel takes t after the increment, and divides the gradient by grad_scale. Both are filled in on the
        # device: a copy from the host would wait for the update of the previous vector.
        torch._fused_adamw_(
            [w], [grad], [m], [v], [], [torch.full((), float(step), device=w.device)],
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            grad_scale=torch.full((), divisor, dtype=torch.float32, device=w.device), found_inf=None,
        )  # fmt: skip
        return
    size = block(w.device)
    for start in range(0, w.numel(), size):
        part = slice(start, start + size)
        adamw_reference_(
            w[part], grad[part], m[part], v[part],
            step=step, lr=lr, betas=betas, eps=eps, decay=decay, divisor=divisor,
        )  # fmt: skip


def adamw_reference_(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, divisor: float,
) -> None:  # fmt: skip
    """The formulas above in float32; moments are rounded to their dtype after use."""
    b1, b2 = betas
    g = grad / divisor
    w.mul_(1 - lr * decay)
    m32 = m.float().lerp_(g, 1 - b1)
    v32 = v.float().mul_(b2).addcmul_(g, g, value=1 - b2)
    denominator = (v32 / (1 - b2**step)).sqrt_().add_(eps)
    w.addcdiv_(m32, denominator, value=-lr / (1 - b1**step))
    m.copy_(m32)
    v.copy_(v32)


@operation
def orthogonalise_(matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Replaces every matrix [R, C] of these stacks [N, R, C] by Muon's update: U V^T, with singular values between 0.7
    and 1.2, times `muon_scale`. A zero matrix stays zero. Products are in `dtype`."""
    scale = muon_scale(*matrices[0].shape[-2:])
    whole_NRC = torch.cat(list(matrices))
    parts = whole_NRC.split(max(1, most_at_once(whole_NRC.device) // whole_NRC[0].numel()))
    updates = torch.cat([newton_schulz(part, dtype) for part in parts]).mul_(scale)
    for x_NRC, update in zip(matrices, updates.split([len(x_NRC) for x_NRC in matrices]), strict=True):
        x_NRC.copy_(update)


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Approximates U V^T of every matrix [R, C] with products in `dtype`; a zero matrix stays zero."""
    dtype_before = x.dtype
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    a, b, c = COEFFICIENTS
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-12)).to(dtype)
    for _ in range(STEPS):
        square = x @ x.transpose(-2, -1)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.transpose(-2, -1) if tall else x).to(dtype_before)


def muon_scale(rows: int, columns: int) -> float:
    """The factor that gives an orthogonal matrix a root mean square of 0.2, that of AdamW's updates."""
    return 0.2 * max(rows, columns) ** 0.5
