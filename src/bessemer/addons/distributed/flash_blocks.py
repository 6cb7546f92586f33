"""torch's fused attention for a part of a row's keys, with the log-sum-exp by which parts are merged.

    CPU                  `_scaled_dot_product_flash_attention_for_cpu`
    GPU, BF16            `_scaled_dot_product_flash_attention`
    GPU, float32         `_scaled_dot_product_efficient_attention`

Kernels want equal widths of keys and values, so the narrower of the two gets zeros, which change neither scores nor
outputs; the flash kernel for GPUs also wants multiples of 8.

Shapes: q [B, H, Q, W], k [B, H, S, W], v [B, H, S, V]; out [B, H, Q, V], lse [B, H, Q] in float32, natural logarithm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax(scale q k^T) v; `causal`: query i attends to the keys up to i, and Q = S."""
    n_queries, value = q.shape[2], v.shape[3]
    q, k, v = _padded(q, k, v)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype == torch.float32:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out[..., :value], lse[..., :n_queries]


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. `out` and `lse` are those of the whole row, so these are the parts of its gradients."""
    width, value = q.shape[3], v.shape[3]
    q, k, v, dout, out = _padded(q, k, v, dout, out)
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    elif q.dtype == torch.float32:
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        room = F.pad(lse, (0, -lse.shape[-1] % 32))  # the kernel reads whole tiles
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, room, none, none, 0.0, [True, True, True, False], causal, scale=scale
        )
    else:
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, none, none,
            scale=scale,
        )  # fmt: skip
    return dq[..., :width], dk[..., :width], dv[..., :value]


def _padded(*tensors: Tensor) -> list[Tensor]:
    """All with the largest width, and on a GPU a multiple of 8."""
    width = max(tensor.shape[3] for tensor in tensors)
    if tensors[0].device.type != "cpu":
        width += -width % 8
    return [F.pad(tensor, (0, width - tensor.shape[3])) if tensor.shape[3] < width else tensor for tensor in tensors]
