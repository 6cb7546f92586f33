"""The Muon update of a matrix (Jordan et al. 2024; decay and scale of Liu et al. 2025, "Muon is scalable", 2.2).

    g = grad / divisor
    m <- b m + (1-b) g
    u = b m + (1-b) g                            Nesterov
    O = U V^T of u = U S V^T                     by five steps of Newton-Schulz, all singular values to about 1
    w <- w (1 - lr * decay) - lr * 0.2 * sqrt(max(rows, columns)) * O

The factor makes the root mean square of an update what AdamW's is, so learning rate and decay carry over. Not in the
V3 paper, which uses AdamW throughout; Moonlight and Kimi K2 trained V3's architecture with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial a x + b x^3 + c x^5: steep at 0, within 0.7 to 1.2 after five steps (Jordan et al. 2024)."""
LIMIT = 1 << 18
"""Elements orthogonalised at a time: three such float32 matrices fit a cache."""


def orthogonal(x_NRC: Tensor) -> Tensor:
    """U V^T of every matrix [R, C], singular values between 0.7 and 1.2; a zero matrix stays zero. Computes in the
    input's dtype."""
    parts = x_NRC.split(max(1, LIMIT // (x_NRC.shape[-2] * x_NRC.shape[-1])))
    return torch.cat([_newton_schulz(part) for part in parts])


def _newton_schulz(x: Tensor) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1)
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(STEPS):
        square = x @ x.transpose(-2, -1)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.transpose(-2, -1) if tall else x


def scale(rows: int, columns: int) -> float:
    """What turns an orthogonal matrix into an update of root mean square 0.2, which is AdamW's."""
    return 0.2 * max(rows, columns) ** 0.5
