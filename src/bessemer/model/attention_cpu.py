"""`mla.latent_attention` as one operation for CPUs, with a hand-written backward.

At laptop sizes a step is bound by passes over memory and by the number of operations, so:
- rotation, scale, layout and the copies of the shared rotary key are one pass each, into the layout of the GEMMs;
- only the lower triangle of the scores is computed, in blocks of queries; softmax works in place;
- probabilities are saved for backward, whose softmax is one fused pass.

`flash_forward` and `flash_backward` are the same function without stored probabilities: saved memory grows with T
instead of T^2, and backward recomputes probabilities from the log of their denominators, as FlashAttention does. Keys
of segments that a block of queries cannot see are not read, so for long sequences of short segments time grows with T
as well.

Scores, softmax and sums are float32 whatever the dtype of the arguments. Shapes as in `mla`; n = B*H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.model.operation import operation

BLOCK = 64
"""Queries per block."""


def _blocks(T: int) -> list[tuple[int, int, int]]:
    """(first query, end, start of its probabilities in the stored vector of one head) of every block of queries."""
    blocks, start = [], 0
    for first in range(0, T, BLOCK):
        end = min(first + BLOCK, T)
        blocks.append((first, end, start))
        start += (end - first) * end
    return blocks


def n_probabilities(T: int) -> int:
    """Stored probabilities of one head."""
    return sum((end - first) * end for first, end, _ in _blocks(T))


def _probability(stored: Tensor, n: int, block: tuple[int, int, int]) -> Tensor:
    """One block of probabilities of n heads, [n, queries, keys], as a view of the flat vector."""
    first, end, start = block
    size = (end - first) * end
    return stored[n * start : n * (start + size)].view(n, end - first, end)


def _rotate(x: Tensor, factor: Tensor) -> Tensor:
    """Rotates pairs of the last dimension by complex numbers, in one pass instead of nine."""
    pairs = x.unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs) * factor).flatten(-2)


def _heads(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries times scale, rotated keys and values in float32: [n, T, N + R], [n, T, N + R], [n, T, V]."""
    B, T, H, width = q.shape
    nope = width - k_rope.shape[-1]
    q, kv, k_rope, turn = q.float(), kv.float(), k_rope.float(), torch.view_as_complex(rope)
    qf, kf = q.new_empty(B, H, T, width), q.new_empty(B, H, T, width)
    torch.mul(q[..., :nope].transpose(1, 2), scale, out=qf[..., :nope])
    qf[..., nope:] = _rotate(q[..., nope:], (turn * scale).unsqueeze(-2)).transpose(1, 2)
    kf[..., :nope] = kv[..., :nope].transpose(1, 2)
    kf[..., nope:] = _rotate(k_rope, turn).unsqueeze(1)
    vf = kv[..., nope:].transpose(1, 2).contiguous()
    return qf.flatten(0, 1), kf.flatten(0, 1), vf.flatten(0, 1)


@operation("latent_attention")
def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (output [B, T, H, V], and for backward: probabilities, queries, keys, values)."""
    B, T, H, _ = q.shape
    qf, kf, vf = _heads(q, kv, k_rope, rope, scale)
    n = B * H
    out = vf.new_empty(n, T, vf.shape[2])
    stored = vf.new_empty(n * n_probabilities(T))
    for block in _blocks(T):
        first, end, _ = block
        score = _masked_scores(qf, kf, block, segments_BT, out=_probability(stored, n, block))
        torch.softmax(score, -1, out=score)
        out[:, first:end] = torch.bmm(score, vf[:, :end])
    return _joined(out, B, q.dtype), stored, qf, kf, vf


def _masked_scores(
    qf: Tensor, kf: Tensor, block: tuple, segments_BT: Tensor | None, out: Tensor, low: int = 0
) -> Tensor:
    """Scores of one block of queries against the keys from `low` on, -inf where masked; written to `out` and
    returned."""
    first, end, _ = block
    torch.bmm(qf[:, first:end], kf[:, low:end].transpose(1, 2), out=out)
    out[:, :, first - low :] += torch.full((end - first, end - first), float("-inf"), device=qf.device).triu(1)
    if segments_BT is not None:
        other = segments_BT[:, first:end, None] != segments_BT[:, None, low:end]
        out.view(len(segments_BT), -1, end - first, end - low).masked_fill_(other.unsqueeze(1), float("-inf"))
    return out


def _first_keys(segments_BT: Tensor | None, T: int) -> list[int]:
    """For every block of queries the first key that any of them can see: the start of its first query's segment.
    0 for all unless segment numbers ascend along every sequence, since a segment may otherwise resume later."""
    firsts = range(0, T, BLOCK)
    if segments_BT is None or bool((segments_BT[:, 1:] < segments_BT[:, :-1]).any()):
        return [0] * len(firsts)
    segments_BT = segments_BT.contiguous()
    starts = torch.searchsorted(segments_BT, segments_BT[:, ::BLOCK].contiguous())
    return starts.amin(0).tolist()


def _joined(out: Tensor, B: int, dtype: torch.dtype) -> Tensor:
    """[n, T, V] as [B, T, H, V]."""
    out = out.unflatten(0, (B, -1)).transpose(1, 2)
    return out.to(dtype, memory_format=torch.contiguous_format, copy=True)


def flash_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [B, T, H, V], log of the softmax denominators [B*H, T] in float32), without a graph."""
    B, T, _, _ = q.shape
    qf, kf, vf = _heads(q, kv, k_rope, rope, scale)
    out, lse = torch.empty_like(vf), vf.new_empty(len(vf), T)
    scratch = vf.new_empty(len(vf) * BLOCK * T)
    for block, low in zip(_blocks(T), _first_keys(segments_BT, T), strict=True):
        first, end, _ = block
        score = _masked_scores(qf, kf, block, segments_BT, _scratch(scratch, len(vf), block, low), low)
        torch.logsumexp(score, -1, out=lse[:, first:end])
        out[:, first:end] = torch.bmm(score.sub_(lse[:, first:end, None]).exp_(), vf[:, low:end])
    return _joined(out, B, q.dtype), lse


def flash_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope from the arguments and results of `flash_forward`."""
    B, T, H, value = dout.shape
    qf, kf, vf = _heads(q, kv, k_rope, rope, scale)
    do = dout.float().transpose(1, 2).reshape(B * H, T, value)
    delta = torch.linalg.vecdot(dout.float(), out.float()).transpose(1, 2).reshape(B * H, T)
    dqf, dkf, dvf = torch.empty_like(qf), torch.zeros_like(kf), torch.zeros_like(vf)
    scratch = vf.new_empty(len(vf) * BLOCK * T)
    for block, low in zip(_blocks(T), _first_keys(segments_BT, T), strict=True):
        first, end, _ = block
        p = _masked_scores(qf, kf, block, segments_BT, _scratch(scratch, len(vf), block, low), low)
        p.sub_(lse[:, first:end, None]).exp_()
        g = do[:, first:end]
        dvf[:, low:end].baddbmm_(p.transpose(1, 2), g)
        ds = torch.bmm(g, vf[:, low:end].transpose(1, 2)).sub_(delta[:, first:end, None]).mul_(p)
        dqf[:, first:end] = torch.bmm(ds, kf[:, low:end])
        dkf[:, low:end].baddbmm_(ds.transpose(1, 2), qf[:, first:end])
    return _projection_gradients(dqf, dkf, dvf, rope, scale, B, dout.dtype)


def _scratch(flat: Tensor, n: int, block: tuple[int, int, int], low: int) -> Tensor:
    first, end, _ = block
    return flat[: n * (end - first) * (end - low)].view(n, end - first, end - low)


@torch.library.register_fake(latent_attention)
def _(q, kv, k_rope, rope, segments_BT, scale):
    B, T, H, width = q.shape
    value = kv.shape[-1] - width + k_rope.shape[-1]
    shapes = (B * H * n_probabilities(T),), (B * H, T, width), (B * H, T, width), (B * H, T, value)
    return q.new_empty(B, T, H, value), *(q.new_empty(shape, dtype=torch.float32) for shape in shapes)


@operation("latent_attention_backward")
def _backward(
    dout: Tensor, stored: Tensor, qf: Tensor, kf: Tensor, vf: Tensor, rope: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope."""
    B, T, H, value = dout.shape
    n = B * H
    do = dout.float().transpose(1, 2).reshape(n, T, value)
    dqf, dkf, dvf = torch.empty_like(qf), torch.zeros_like(kf), torch.zeros_like(vf)
    for block in _blocks(T):
        first, end, _ = block
        p, g = _probability(stored, n, block), do[:, first:end]
        dvf[:, :end].baddbmm_(p.transpose(1, 2), g)
        dp = torch.bmm(g, vf[:, :end].transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, torch.float32)
        dqf[:, first:end] = torch.bmm(ds, kf[:, :end])
        dkf[:, :end].baddbmm_(ds.transpose(1, 2), qf[:, first:end])
    return _projection_gradients(dqf, dkf, dvf, rope, scale, B, dout.dtype)


def _projection_gradients(
    dqf: Tensor, dkf: Tensor, dvf: Tensor, rope: Tensor, scale: float, B: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projections q, kv and k_rope from those of the rotated heads."""
    _, T, width = dqf.shape
    value, nope = dvf.shape[-1], width - 2 * rope.shape[-2]
    back = torch.view_as_complex(rope).conj()
    dqf, dkf, dvf = (d.view(B, -1, T, d.shape[-1]) for d in (dqf, dkf, dvf))
    H = dqf.shape[1]
    dq, dkv = (dqf.new_empty(B, T, H, w, dtype=dtype) for w in (width, nope + value))
    torch.mul(dqf[..., :nope].transpose(1, 2), scale, out=dq[..., :nope])
    dq[..., nope:] = _rotate(dqf[..., nope:].transpose(1, 2), (back * scale).unsqueeze(-2))
    dkv[..., :nope] = dkf[..., :nope].transpose(1, 2)
    dkv[..., nope:] = dvf.transpose(1, 2)
    return dq, dkv, _rotate(dkf[..., nope:].sum(1), back).to(dtype)


@torch.library.register_fake(_backward)
def _(dout, stored, qf, kf, vf, rope, scale):
    B, T, H, value = dout.shape
    width, rope_width = qf.shape[2], 2 * rope.shape[-2]
    shapes = (B, T, H, width), (B, T, H, width - rope_width + value), (B, T, rope_width)
    return tuple(dout.new_empty(shape) for shape in shapes)


def _setup(ctx, inputs, output):
    rope, ctx.scale = inputs[3], inputs[5]
    ctx.set_materialize_grads(False)  # the saved tensors have no gradient; zeros of their size would cost a pass each
    ctx.save_for_backward(*output[1:], rope)


def _grad(ctx, dout, *_):
    if dout is None:
        return None, None, None, None, None, None
    return *_backward(dout.contiguous(), *ctx.saved_tensors, ctx.scale), None, None, None


torch.library.register_autograd(latent_attention, _grad, setup_context=_setup)


@operation("long_attention")
def long_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_forward` with a graph: saves its arguments and results, which grow with T."""
    return flash_forward(q, kv, k_rope, rope, segments_BT, scale)


@torch.library.register_fake(long_attention)
def _(q, kv, k_rope, rope, segments_BT, scale):
    B, T, H, width = q.shape
    value = kv.shape[-1] - width + k_rope.shape[-1]
    return q.new_empty(B, T, H, value), q.new_empty(B * H, T, dtype=torch.float32)


@operation("long_attention_backward")
def _long_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return flash_backward(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse)


@torch.library.register_fake(_long_backward)
def _(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse):
    return tuple(dout.new_empty(x.shape) for x in (q, kv, k_rope))


def _setup_long(ctx, inputs, output):
    ctx.scale = inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output)


def _grad_long(ctx, dout, *_):
    if dout is None:
        return None, None, None, None, None, None
    q, kv, k_rope, rope, segments_BT, out, lse = ctx.saved_tensors
    gradients = _long_backward(dout.contiguous(), q, kv, k_rope, rope, segments_BT, ctx.scale, out, lse)
    return *gradients, None, None, None


torch.library.register_autograd(long_attention, _grad_long, setup_context=_setup_long)
