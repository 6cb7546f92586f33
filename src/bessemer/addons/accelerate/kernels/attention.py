"""The softmax core of MLA on a CPU (`model.mla.latent_attention`), forward and backward in one pass each.

Saved are the arguments, the output and one number per query and head: the log of the softmax denominator, from which
backward recomputes the probabilities, as FlashAttention does. Memory therefore grows with T and not with T^2. A block
of queries skips the keys of segments it cannot see. Scores, softmax and sums are float32 whatever the dtype of the
arguments; on AMX, products take BF16 operands if the arguments are BF16. Shapes as in `mla`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.kernels.library import DTYPES, call, fits, threads
from bessemer.model.segments import Packed, Segments


def serves(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None) -> bool:
    return (
        fits(q, kv, k_rope)
        and min(q.numel(), kv.numel(), k_rope.numel(), scale) > 0
        and (segments is None or (not isinstance(segments, Packed) and segments.dtype == torch.int64))
    )


def _table(rope: Tensor | None) -> tuple[Tensor | None, int]:
    """A table of rotations [T, R/2, 2] or [B, T, R/2, 2], and its stride along the batch (0 if shared)."""
    if rope is None:
        return None, 0
    rope = rope.contiguous()
    return rope, rope[0].numel() if rope.dim() == 4 else 0


def _segments(segments_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous segments, and a buffer for their ranks, which fit 32 bits."""
    if segments_BT is None:
        return None, None
    return segments_BT.contiguous(), torch.empty(segments_BT.shape, dtype=torch.int32)


def attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, q_table: Tensor | None, k_table: Tensor | None, segments_BT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the output [B, T, H, V] and the log of the softmax denominators [B*H, T] in float32. The T queries q [B,
    T, H, N + R] are at the last T of S positions: kv [B, S, H, N + V], k_rope [B, S, R], segments [B, S]. If a table is
    None, the rotary columns are already rotated."""
    B, T, H, width = q.shape
    S, R = k_rope.shape[1:]
    V = kv.shape[-1] - width + R
    q, kv, k_rope = q.contiguous(), kv.contiguous(), k_rope.contiguous()
    out, lse = torch.empty(B, T, H, V, dtype=q.dtype), torch.empty(B * H, T)
    call(
        f"attention_{DTYPES[q.dtype]}", "ppp" + "pi" * 2 + "pppp" + "i" * 7 + "fi",
        q, kv, k_rope, *_table(q_table), *_table(k_table), *_segments(segments_BT), out, lse,
        B, H, T, S, width - R, R, V, scale, threads(),
    )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, table: Tensor, segments_BT: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope; needs as many queries as keys."""
    B, T, H, width = q.shape
    R = k_rope.shape[-1]
    V = kv.shape[-1] - width + R
    dout, q, kv, k_rope, out = (x.contiguous() for x in (dout.to(q.dtype), q, kv, k_rope, out.to(q.dtype)))
    dq, dkv, dk_rope = (torch.empty_like(x) for x in (q, kv, k_rope))
    call(
        f"attention_backward_{DTYPES[q.dtype]}", "pppp" + "pi" + "p" * 8 + "i" * 6 + "fi",
        dout, q, kv, k_rope, *_table(table), *_segments(segments_BT), out, lse.contiguous(),
        dq, dkv, torch.empty(B, H, T, R), dk_rope, B, H, T, width - R, R, V, scale, threads(),
    )  # fmt: skip
    return dq, dkv, dk_rope


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None
) -> Tensor:
    """`model.mla.latent_attention`."""
    return _LatentAttention.apply(q, kv, k_rope, rope, scale, segments)


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, k_rope, rope, scale, segments_BT):
        out, lse = attention(q, kv, k_rope, rope, rope, segments_BT, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, kv, k_rope, rope, segments_BT, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *arguments, out, lse = ctx.saved_tensors
        return *attention_backward(dout, *arguments, ctx.scale, out, lse), None, None, None
