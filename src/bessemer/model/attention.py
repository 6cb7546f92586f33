"""Causal softmax attention over MLA's heads.

`attention_reference` is the equation. `latent_attention` takes the projections as they come, rotates, builds the heads
and picks the backend that serves the call:

    CPU, T <= LONGEST   `attention_cpu.latent_attention`: one operation from the projections to the output, with its
                        own backward
    CPU, longer         `attention_cpu.long_attention`: the same, and what it keeps grows with T instead of T^2
    everything else     torch's scaled_dot_product_attention

`recomputing` and `recomputing_backward` are `latent_attention` cut in two for who keeps the arguments elsewhere: what
they need of each other is the output and one number per query and head.

Shapes: B rows, T tokens, H heads, N/R nope and rope widths of a key, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bessemer.model import attention_cpu
from bessemer.model.rope import rotate

LONGEST = 1024
"""Up to this the CPU backend keeps probabilities, which grow with T^2; beyond it makes them again in backward."""


def causal_mask(T: int, segments_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may look: [T, T], or [B, 1, T, T] when tokens see only their own segment."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments_BT is None:
        return causal
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :])).unsqueeze(1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, segments_BT: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v in float32, every score materialised. q, k [B, H, T, N + R], v [B, H, T, V]."""
    score = q.float() @ k.float().transpose(-1, -2) * scale
    score = score.masked_fill(~causal_mask(q.shape[-2], segments_BT, q.device), float("-inf"))
    return (score.softmax(-1) @ v.float()).to(q.dtype)


def heads(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and k [B, H, T, N + R] and v [B, H, T, V] from the arguments of `latent_attention`."""
    nope = q.shape[-1] - k_rope.shape[-1]
    q_rope = rotate(q[..., nope:], rope.unsqueeze(-3))
    k_rope = rotate(k_rope, rope).unsqueeze(2).expand(-1, -1, q.shape[2], -1)
    q = torch.cat((q[..., :nope], q_rope), -1)
    k = torch.cat((kv[..., :nope], k_rope), -1)
    return q.transpose(1, 2), k.transpose(1, 2), kv[..., nope:].transpose(1, 2)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments_BT: Tensor | None = None
) -> Tensor:
    """MLA's core, expanded: q [B, T, H, N + R] and k_rope [B, T, R], neither rotated yet; kv [B, T, H, N + V] holds
    keys and values of every head; rope [T, R/2, 2] or [B, T, R/2, 2]. Returns [B, T, H, V]."""
    if _on_cpu(q):
        core = attention_cpu.latent_attention if q.shape[1] <= LONGEST else attention_cpu.long_attention
        return core(q, kv, k_rope, rope, segments_BT, scale)[0]
    return _torch_attention(q, kv, k_rope, rope, scale, segments_BT)


def _torch_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments_BT: Tensor | None
) -> Tensor:
    q, k, v = heads(q, kv, k_rope, rope)
    if segments_BT is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = causal_mask(q.shape[-2], segments_BT, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


def recomputing(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`latent_attention` without a graph: the output, and the log of the softmax denominators (empty where torch's
    attention makes its own again)."""
    if _on_cpu(q):
        return attention_cpu.recomputing(q, kv, k_rope, rope, segments_BT, scale)
    with torch.no_grad():
        return _torch_attention(q, kv, k_rope, rope, scale, segments_BT), q.new_empty(0, dtype=torch.float32)


def recomputing_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments_BT: Tensor | None,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope. `out` and `lse` as `recomputing` gave them; `out` may have been rounded since."""
    if _on_cpu(q):
        return attention_cpu.recomputing_backward(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, kv, k_rope)]
        again = _torch_attention(*inputs, rope, scale, segments_BT)
    return torch.autograd.grad(again, inputs, dout)
