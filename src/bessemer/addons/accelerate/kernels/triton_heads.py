"""MLA's heads in Triton: rotation, concatenation and padding of queries, keys and values in one pass each way.

Rotary pairs (x_{2j}, x_{2j+1}) are multiplied by cos + i sin; backward rotates the other way. The rotary key is shared
by all heads, so its gradient is summed over them in a fixed order. Shapes as in `model.mla`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads that a program handles at once."""


def forward(q: Tensor, kv: Tensor, k_rope: Tensor, rope: Tensor, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_gpu.heads`."""
    q, kv, rope = q.contiguous(), kv.contiguous(), rope.contiguous()
    k_rope = _rows(k_rope)
    B, T, H, width = q.shape
    turned = k_rope.shape[-1]
    nope = width - turned
    value = kv.shape[-1] - nope
    qh, kh = torch.empty_like(q), torch.empty_like(q)
    vh = q.new_empty(B, T, H, max(value, padded))
    if q.numel():
        _forward[(B * T, triton.cdiv(H, HEADS))](
            q, kv, k_rope, rope, qh, kh, vh, k_rope.stride(-2), rope.numel() // turned, H, nope, turned, value,
            vh.shape[-1], *_blocks(nope, turned, vh.shape[-1]),
        )  # fmt: skip
    return qh, kh, vh


def backward(dqh: Tensor, dkh: Tensor, dvh: Tensor, rope: Tensor, value: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope."""
    dqh, dkh, dvh, rope = (x.contiguous() for x in (dqh, dkh, dvh, rope))
    B, T, H, width = dqh.shape
    turned = 2 * rope.shape[-2]
    nope = width - turned
    dq, dkv, dk_rope = torch.empty_like(dqh), dqh.new_empty(B, T, H, nope + value), dqh.new_empty(B, T, turned)
    if dqh.numel():
        _backward[(B * T,)](
            dqh, dkh, dvh, rope, dq, dkv, dk_rope, rope.numel() // turned, H, nope, turned, value, dvh.shape[-1],
            *_blocks(nope, turned, value),
        )  # fmt: skip
    return dq, dkv, dk_rope


def _rows(x: Tensor) -> Tensor:
    """x as rows with a constant stride; a slice of the last dimension is not copied."""
    even = x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if even else x.contiguous()


def _blocks(nope: int, turned: int, value: int) -> tuple[int, int, int, int]:
    return HEADS, triton.next_power_of_2(nope), triton.next_power_of_2(turned // 2), triton.next_power_of_2(value)


@triton.jit
def _forward(
    q, kv, k_rope, rope, qh, kh, vh, step, positions, H, nope, turned, value, padded,
    HB: tl.constexpr, NB: tl.constexpr, RB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """One program: one token, HB heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    row = (token * H + head)[:, None]
    real = (head < H)[:, None]
    width = nope + turned

    n = tl.arange(0, NB)[None, :]
    inside = real & (n < nope)
    tl.store(qh + row * width + n, tl.load(q + row * width + n, mask=inside), mask=inside)
    tl.store(kh + row * width + n, tl.load(kv + row * (nope + value) + n, mask=inside), mask=inside)
    v = tl.arange(0, VB)[None, :]
    values = tl.load(kv + row * (nope + value) + nope + v, mask=real & (v < value), other=0.0)
    tl.store(vh + row * padded + v, values, mask=real & (v < padded))

    pair = tl.arange(0, RB)
    some = pair < turned // 2
    at = rope + (token % positions) * turned + 2 * pair
    cos, sin = tl.load(at, mask=some, other=0.0)[None, :], tl.load(at + 1, mask=some, other=0.0)[None, :]
    is_inside = real & some[None, :]
    source = q + row * width + nope + 2 * pair[None, :]
    even = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=is_inside, other=0.0).to(tl.float32)
    target = qh + row * width + nope + 2 * pair[None, :]
    tl.store(target, (even * cos - odd * sin).to(qh.dtype.element_ty), mask=is_inside)
    tl.store(target + 1, (even * sin + odd * cos).to(qh.dtype.element_ty), mask=is_inside)

    shared = k_rope + token * step + 2 * pair
    even = tl.load(shared, mask=some, other=0.0).to(tl.float32)[None, :]
    odd = tl.load(shared + 1, mask=some, other=0.0).to(tl.float32)[None, :]
    spread = tl.zeros((HB, RB), tl.float32)
    target = kh + row * width + nope + 2 * pair[None, :]
    tl.store(target, (even * cos - odd * sin + spread).to(kh.dtype.element_ty), mask=is_inside)
    tl.store(target + 1, (even * sin + odd * cos + spread).to(kh.dtype.element_ty), mask=is_inside)


@triton.jit
def _backward(
    dqh, dkh, dvh, rope, dq, dkv, dk_rope, positions, H, nope, turned, value, padded,
    HB: tl.constexpr, NB: tl.constexpr, RB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """One program: one token, all heads."""
    token = tl.program_id(0).to(tl.int64)
    width = nope + turned
    pair = tl.arange(0, RB)
    some = pair < turned // 2
    at = rope + (token % positions) * turned + 2 * pair
    cos, sin = tl.load(at, mask=some, other=0.0), tl.load(at + 1, mask=some, other=0.0)
    n, v = tl.arange(0, NB)[None, :], tl.arange(0, VB)[None, :]
    even_sum, odd_sum = tl.zeros((RB,), tl.float32), tl.zeros((RB,), tl.float32)
    for first in range(0, H, HB):
        head = first + tl.arange(0, HB)
        row = (token * H + head)[:, None]
        real = (head < H)[:, None]
        inside = real & (n < nope)
        tl.store(dq + row * width + n, tl.load(dqh + row * width + n, mask=inside), mask=inside)
        tl.store(dkv + row * (nope + value) + n, tl.load(dkh + row * width + n, mask=inside), mask=inside)
        inside = real & (v < value)
        dv = tl.load(dvh + row * padded + v, mask=inside)
        tl.store(dkv + row * (nope + value) + nope + v, dv, mask=inside)

        is_inside = real & some[None, :]
        at_row = row * width + nope + 2 * pair[None, :]
        even = tl.load(dqh + at_row, mask=is_inside, other=0.0).to(tl.float32)
        odd = tl.load(dqh + at_row + 1, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(dq + at_row, (even * cos[None, :] + odd * sin[None, :]).to(dq.dtype.element_ty), mask=is_inside)
        tl.store(dq + at_row + 1, (odd * cos[None, :] - even * sin[None, :]).to(dq.dtype.element_ty), mask=is_inside)
        even_sum += tl.sum(tl.load(dkh + at_row, mask=is_inside, other=0.0).to(tl.float32), 0)
        odd_sum += tl.sum(tl.load(dkh + at_row + 1, mask=is_inside, other=0.0).to(tl.float32), 0)
    target = dk_rope + token * turned + 2 * pair
    tl.store(target, (even_sum * cos + odd_sum * sin).to(dk_rope.dtype.element_ty), mask=some)
    tl.store(target + 1, (odd_sum * cos - even_sum * sin).to(dk_rope.dtype.element_ty), mask=some)
