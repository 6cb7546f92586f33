"""Causal softmax attention core with separate key and value widths.

`attention_reference` is the equation. `causal_attention` picks the backend that serves the call:

    CPU, T <= LONGEST   blocked: only the lower triangle is computed, in blocks of queries; probabilities are kept for
                        backward (3.3x torch's fused kernel at T = 256, see docs/log.md)
    everything else     torch's scaled_dot_product_attention

Layout everywhere: q, k [B, H, T, N + R], v [B, H, T, V] -> [B, H, T, V].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
"""Queries per block."""
LONGEST = 1024
"""Kept probabilities grow with T^2; beyond this the memory is worth more than the time."""


def causal_mask(T: int, segments_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a query may look: [T, T], or [B, 1, T, T] when tokens see only their own segment."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments_BT is None:
        return causal
    return (causal & (segments_BT[:, :, None] == segments_BT[:, None, :])).unsqueeze(1)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, segments_BT: Tensor | None = None) -> Tensor:
    """softmax(scale q k^T) v in float32, every score materialised."""
    score = q.float() @ k.float().transpose(-1, -2) * scale
    score = score.masked_fill(~causal_mask(q.shape[-2], segments_BT, q.device), float("-inf"))
    return (score.softmax(-1) @ v.float()).to(q.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, segments_BT: Tensor | None = None) -> Tensor:
    """`attention_reference`, fast; same arguments and result."""
    if q.device.type == "cpu" and q.shape[-2] <= LONGEST:
        return _blocked(q.contiguous(), k.contiguous(), v.contiguous(), segments_BT, scale)[0]
    if segments_BT is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = causal_mask(q.shape[-2], segments_BT, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _blocks(T: int) -> list[tuple[int, int, int]]:
    """(first query, end, where its probabilities start) per row of the kept vector, in units of one head's numbers."""
    blocks, start = [], 0
    for first in range(0, T, BLOCK):
        end = min(first + BLOCK, T)
        blocks.append((first, end, start))
        start += (end - first) * end
    return blocks


def _kept(T: int) -> int:
    """Probabilities of one head."""
    return sum((end - first) * end for first, end, _ in _blocks(T))


def _probability(kept: Tensor, n: int, block: tuple[int, int, int]) -> Tensor:
    """One block of probabilities of n heads, [n, queries, keys], as a view of the flat vector."""
    first, end, start = block
    size = (end - first) * end
    return kept[n * start : n * (start + size)].view(n, end - first, end)


@torch.library.custom_op("bessemer::blocked_attention", mutates_args=())
def _blocked(q: Tensor, k: Tensor, v: Tensor, segments_BT: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns (output, probabilities); scores, softmax and sums in float32."""
    T, n = q.shape[2], q.shape[0] * q.shape[1]
    qf, kf, vf = (x.flatten(0, 1).float() for x in (q, k, v))
    out = vf.new_empty(n, T, vf.shape[2])
    kept = vf.new_empty(n * _kept(T))
    above = torch.full((BLOCK, BLOCK), float("-inf"), device=q.device).triu(1)
    for block in _blocks(T):
        first, end, _ = block
        score = _probability(kept, n, block)
        torch.bmm(qf[:, first:end], kf[:, :end].transpose(1, 2), out=score)
        score.mul_(scale)
        score[:, :, first:end] += above[: end - first, : end - first]
        if segments_BT is not None:
            other = segments_BT[:, first:end, None] != segments_BT[:, None, :end]
            score.view(*q.shape[:2], end - first, end).masked_fill_(other.unsqueeze(1), float("-inf"))
        score.copy_(score.softmax(-1))
        out[:, first:end] = torch.bmm(score, vf[:, :end])
    return out.view(*v.shape).to(q.dtype), kept


@_blocked.register_fake
def _(q, k, v, segments_BT, scale):
    T, n = q.shape[2], q.shape[0] * q.shape[1]
    return torch.empty_like(v), v.new_empty(n * _kept(T), dtype=torch.float32)


@torch.library.custom_op("bessemer::blocked_attention_backward", mutates_args=())
def _blocked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    T, n = q.shape[2], q.shape[0] * q.shape[1]
    qf, kf, vf, of, do = (x.flatten(0, 1).float() for x in (q, k, v, out, dout))
    dq, dk, dv = torch.empty_like(qf), torch.zeros_like(kf), torch.zeros_like(vf)
    delta = (do * of).sum(-1, keepdim=True)  # sum_s p_s dp_s, the row term of the softmax gradient
    for block in _blocks(T):
        first, end, _ = block
        p, g = _probability(kept, n, block), do[:, first:end]
        dv[:, :end].baddbmm_(p.transpose(1, 2), g)
        ds = torch.bmm(g, vf[:, :end].transpose(1, 2)).sub_(delta[:, first:end]).mul_(p).mul_(scale)
        dq[:, first:end] = torch.bmm(ds, kf[:, :end])
        dk[:, :end].baddbmm_(ds.transpose(1, 2), qf[:, first:end])
    return tuple(d.view(x.shape).to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))


@_blocked_backward.register_fake
def _(dout, q, k, v, out, kept, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx, inputs, output):
    q, k, v, _, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _grad(ctx, dout, _dkept):
    return *_blocked_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


_blocked.register_autograd(_grad, setup_context=_setup)
