"""The AdamW update of one flat vector (Loshchilov and Hutter 2019; constants in V3 4.2).

    g = grad / divisor
    w <- w (1 - lr * decay)                      decoupled
    m <- b1 m + (1-b1) g ;  v <- b2 v + (1-b2) g^2
    w <- w - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

torch's fused kernel does it in one pass over memory and takes the divisor (token count and clip together) for free;
moments kept in another dtype than float32 go through the formulas in cache-sized blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 16


def adamw_(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor,
    *, step: int, lr: float, betas: tuple[float, float], eps: float, decay: float, divisor: float,
) -> None:  # fmt: skip
    """Updates w, m and v in place; grad may be overwritten. `step` counts from 1."""
    if m.dtype == torch.float32:
        # The kernel takes t after the increment, and divides the gradient by grad_scale.
        torch._fused_adamw_(
            [w], [grad], [m], [v], [], [torch.tensor(float(step), device=w.device)],
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
            grad_scale=torch.tensor(divisor, dtype=torch.float32, device=w.device), found_inf=None,
        )  # fmt: skip
        return
    block = BLOCK if w.device.type == "cpu" else w.numel()
    for start in range(0, w.numel(), block):
        part = slice(start, start + block)
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
