"""The softmax core of MLA without an autograd graph, for a caller that saves its arguments itself (FP8 training)."""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.addons.accelerate.kernels import attention
from bessemer.model.mla import latent_attention
from bessemer.model.segments import Packed, Segments


def attention_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None
) -> tuple[Tensor, Tensor]:
    """The output of `latent_attention` and the log of the softmax denominators (empty if backward computes both
    again)."""
    if attention.serves(q, kv, k_rope, rope, scale, segments):
        assert not isinstance(segments, Packed)
        return attention.attention(q, kv, k_rope, rope, rope, segments, scale)
    with torch.no_grad():
        return latent_attention(q, kv, k_rope, rope, scale, segments), q.new_empty(0, dtype=torch.float32)


def attention_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope. `out` and `lse` come from `attention_forward`; `out` may be rounded."""
    if attention.serves(q, kv, k_rope, rope, scale, segments):
        assert not isinstance(segments, Packed)
        return attention.attention_backward(dout, q, kv, k_rope, rope, segments, scale, out, lse)
    with torch.enable_grad():
        q, kv, k_rope = (x.detach().requires_grad_() for x in (q, kv, k_rope))
        again = latent_attention(q, kv, k_rope, rope, scale, segments)
    dq, dkv, dk_rope = torch.autograd.grad(again, (q, kv, k_rope), dout)
    return dq, dkv, dk_rope
