"""Attention of one query per row over a paged latent cache, in Triton (`paged`).

A program serves one row, HEADS heads and one of SPLITS parts of the row's pages; it reads every latent once, as key and
as value, and keeps a running softmax. Parts are summed by torch. The number of parts depends on the number of rows, so
that few rows also fill a GPU. Pages and positions are read on the device: a launch is the same for every length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16
"""Heads per program: the smallest number of rows in a tensor-core product."""
SLOTS = 32
"""Cached tokens read at once; divides a page."""
PROGRAMS = 256
"""Target number of programs: two per multiprocessor of a large card."""
MOST_SPLITS = 16


def attend(q_BHX: Tensor, pool_PSX: Tensor, table_BP: Tensor, position_B: Tensor, latent: int, scale: float) -> Tensor:
    """`paged.attend`."""
    B, H, X = q_BHX.shape
    blocks, page = triton.cdiv(H, HEADS), pool_PSX.shape[1]
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * B * blocks <= PROGRAMS:
        splits *= 2
    q_BHX = q_BHX.contiguous()
    part_BSHC = q_BHX.new_empty(B, splits, H, latent, dtype=torch.float32)
    lse_BSH = q_BHX.new_empty(B, splits, H, dtype=torch.float32)
    _attend[(B, blocks, splits)](
        q_BHX, pool_PSX, table_BP, position_B, part_BSHC, lse_BSH, table_BP.stride(0), H, scale,
        C=latent, R=X - latent, CB=_block(latent), RB=_block(X - latent), PAGE=page,
        HEADS=HEADS, SLOTS=SLOTS, SPLITS=splits, **options(q_BHX.dtype),
    )  # fmt: skip
    if splits == 1:
        return part_BSHC.squeeze(1).to(q_BHX.dtype)
    share_BSH = (lse_BSH - lse_BSH.amax(1, keepdim=True)).exp()
    share_BSH = share_BSH / share_BSH.sum(1, keepdim=True)
    return (part_BSHC * share_BSH.unsqueeze(-1)).sum(1).to(q_BHX.dtype)


def options(dtype: torch.dtype) -> dict[str, int]:
    """How the kernel is launched. In float32 four warps would spill registers."""
    return {"num_warps": 4 if dtype.itemsize < 4 else 8, "num_stages": 2}


def _block(width: int) -> int:
    """Columns of a tensor-core product, at least 16."""
    return max(16, triton.next_power_of_2(width))


@triton.jit(do_not_specialize=["row_pages", "H"])
def _attend(
    q, pool, table, position, part, lse, row_pages, H, scale,
    C: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, RB: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c, r, slot = tl.arange(0, CB), tl.arange(0, RB), tl.arange(0, SLOTS)
    mine, in_c, in_r = (head < H)[:, None], (c < C)[None, :], (r < R)[None, :]
    at = ((row * H + head) * (C + R))[:, None]
    q_c = tl.load(q + at + c[None, :], mask=mine & in_c, other=0.0)
    q_r = tl.load(q + at + C + r[None, :], mask=mine & in_r, other=0.0)
    n = tl.load(position + row).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(n, PAGE), SPLITS) * PAGE
    first = split * each
    last = tl.minimum(first + each, n)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    sums = tl.zeros((HEADS, CB), tl.float32)
    for start in range(first, last, SLOTS):
        page = tl.load(table + row * row_pages + start // PAGE).to(tl.int64)
        seen = start + slot < n
        place = ((page * PAGE + start % PAGE + slot) * (C + R))[:, None]
        k_c = tl.load(pool + place + c[None, :], mask=seen[:, None] & in_c, other=0.0)
        k_r = tl.load(pool + place + C + r[None, :], mask=seen[:, None] & in_r, other=0.0)
        score = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
        score = tl.dot(q_r, tl.trans(k_r), score, input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weight, 1)
        sums = tl.dot(weight.to(k_c.dtype), k_c, sums * fade[:, None], input_precision="ieee")
        top = higher
    empty = total == 0.0
    sums = sums / tl.where(empty, 1.0, total)[:, None]
    to = (row * SPLITS + split) * H + head
    tl.store(part + to[:, None] * C + c[None, :], sums, mask=mine & in_c)
    tl.store(lse + to, tl.where(empty, float("-inf"), top + tl.log(tl.where(empty, 1.0, total))), mask=head < H)
