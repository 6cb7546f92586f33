"""`model.mla.latent_attention` as one operation for CPUs, with a hand-written backward.

It saves its arguments, its output and one number per query and head: the log of the softmax denominator, from which
backward recomputes the probabilities, as FlashAttention does. Memory therefore grows with T and not with T^2. A block
of queries skips the keys of segments it cannot see, so for long sequences of short segments time also grows with T.

The kernel computes it in one pass where it can. The torch code below does the same for blocks of queries over all heads
at once: only the lower triangle of the scores, in place. Scores, softmax and sums are float32 whatever the dtype of the
arguments; on AMX, the kernel's products take BF16 operands if the arguments are BF16. Shapes as in `mla`; n = B*H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bessemer.kernels.library import DTYPES, call, fits, threads
from bessemer.kernels.operation import operation
from bessemer.model.segments import Packed, Segments

BLOCK = 64
"""Queries per block of the torch code."""


def serves(q: Tensor, kv: Tensor, k_rope: Tensor, segments_BT: Tensor | None, scale: float) -> bool:
    return (
        fits(q, kv, k_rope)
        and min(q.numel(), kv.numel(), k_rope.numel(), scale) > 0
        and (segments_BT is None or segments_BT.dtype == torch.int64)
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


# --- as one operation ------------------------------------------------------------------------------------------------


def _blocks(segments_BT: Tensor | None, T: int) -> list[tuple[int, int, int]]:
    """(first query, end, first key that any of them can see) of each block of queries."""
    return [(t, min(t + BLOCK, T), low) for t, low in zip(range(0, T, BLOCK), _first_keys(segments_BT, T), strict=True)]


def _rotate(x: Tensor, factor: Tensor) -> Tensor:
    """Multiplies pairs of the last dimension by complex numbers, in one pass instead of nine."""
    # always copy: a contiguous slice of a wider tensor may start at an odd element, where a complex view cannot
    pairs = x.to(x.dtype, memory_format=torch.contiguous_format, copy=True).unflatten(-1, (-1, 2))
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


def _masked_scores(
    qf: Tensor, kf: Tensor, block: tuple[int, int, int], segments_BT: Tensor | None, flat: Tensor
) -> Tensor:
    """Scores of one block [n, queries, keys], -inf where masked, in the memory of `flat`."""
    first, end, low = block
    score = flat[: len(qf) * (end - first) * (end - low)].view(len(qf), end - first, end - low)
    torch.bmm(qf[:, first:end], kf[:, low:end].transpose(1, 2), out=score)
    score[:, :, first - low :] += torch.full((end - first, end - first), float("-inf")).triu(1)
    if segments_BT is not None:
        other = segments_BT[:, first:end, None] != segments_BT[:, None, low:end]
        score.unflatten(0, (len(segments_BT), -1)).masked_fill_(other.unsqueeze(1), float("-inf"))
    return score


def _first_keys(segments_BT: Tensor | None, T: int) -> list[int]:
    """The first key that any query of each block can see: the start of its first query's segment. 0 for all blocks
    unless segment numbers ascend along every sequence, since a segment might otherwise resume later."""
    firsts = range(0, T, BLOCK)
    if segments_BT is None or bool((segments_BT[:, 1:] < segments_BT[:, :-1]).any()):
        return [0] * len(firsts)
    segments_BT = segments_BT.contiguous()
    starts = torch.searchsorted(segments_BT, segments_BT[:, ::BLOCK].contiguous())
    return starts.amin(0).tolist()


def flash_forward(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(output [B, T, H, V], log of the softmax denominators [B*H, T] in float32), without an autograd graph."""
    if serves(q, kv, k_rope, segments_BT, scale):
        return attention(q, kv, k_rope, rope, rope, segments_BT, scale)
    B, T, _, _ = q.shape
    qf, kf, vf = _heads(q, kv, k_rope, rope, scale)
    out, lse = torch.empty_like(vf), vf.new_empty(len(vf), T)
    flat = vf.new_empty(len(vf) * BLOCK * T)
    for block in _blocks(segments_BT, T):
        first, end, low = block
        score = _masked_scores(qf, kf, block, segments_BT, flat)
        highest = score.amax(-1)
        p = torch.softmax(score, -1, out=score)
        lse[:, first:end] = highest - p.amax(-1).log_()  # the largest probability is exp(0) over the denominator
        out[:, first:end] = torch.bmm(p, vf[:, low:end])
    out = out.unflatten(0, (B, -1)).transpose(1, 2)
    return out.to(q.dtype, memory_format=torch.contiguous_format, copy=True), lse


def flash_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, kv and k_rope from the arguments and results of `flash_forward`."""
    if serves(q, kv, k_rope, segments_BT, scale):
        return attention_backward(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse)
    B, T, H, value = dout.shape
    qf, kf, vf = _heads(q, kv, k_rope, rope, scale)
    do = dout.float().transpose(1, 2).reshape(B * H, T, value)
    delta = torch.linalg.vecdot(dout.float(), out.float()).transpose(1, 2).reshape(B * H, T)
    dqf, dkf, dvf = torch.empty_like(qf), torch.zeros_like(kf), torch.zeros_like(vf)
    flat = vf.new_empty(len(vf) * BLOCK * T)
    for block in _blocks(segments_BT, T):
        first, end, low = block
        p = _masked_scores(qf, kf, block, segments_BT, flat).sub_(lse[:, first:end, None]).exp_()
        g = do[:, first:end]
        dvf[:, low:end].baddbmm_(p.transpose(1, 2), g)
        ds = torch.bmm(g, vf[:, low:end].transpose(1, 2)).sub_(delta[:, first:end, None]).mul_(p)
        dqf[:, first:end] = torch.bmm(ds, kf[:, low:end])
        dkf[:, low:end].baddbmm_(ds.transpose(1, 2), qf[:, first:end])
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


@operation("latent_attention")
def _latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash_forward` with an autograd graph."""
    return flash_forward(q, kv, k_rope, rope, segments_BT, scale)


@torch.library.register_fake(_latent_attention)
def _(q, kv, k_rope, rope, segments_BT, scale):
    B, T, H, width = q.shape
    value = kv.shape[-1] - width + k_rope.shape[-1]
    return q.new_empty(B, T, H, value), q.new_empty(B * H, T, dtype=torch.float32)


@operation("latent_attention_backward")
def _backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, segments_BT: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return flash_backward(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse)


@torch.library.register_fake(_backward)
def _(dout, q, kv, k_rope, rope, segments_BT, scale, out, lse):
    return tuple(dout.new_empty(x.shape) for x in (q, kv, k_rope))


def _setup(ctx, inputs, output):
    ctx.scale = inputs[5]
    ctx.set_materialize_grads(False)  # the denominators have no gradient
    ctx.save_for_backward(*inputs[:5], *output)


def _grad(ctx, dout, *_):
    if dout is None:
        return None, None, None, None, None, None
    q, kv, k_rope, rope, segments_BT, out, lse = ctx.saved_tensors
    gradients = _backward(dout.contiguous(), q, kv, k_rope, rope, segments_BT, ctx.scale, out, lse)
    return *gradients, None, None, None


torch.library.register_autograd(_latent_attention, _grad, setup_context=_setup)


def latent_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, scale: float, segments: Segments = None
) -> Tensor:
    """`model.mla.latent_attention`."""
    assert not isinstance(segments, Packed), "only a batch on a GPU is packed"
    return _latent_attention(q, kv, k_rope, rope, segments, scale)[0]
