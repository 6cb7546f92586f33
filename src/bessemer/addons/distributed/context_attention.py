"""Attention over rows that are split over ranks (`context_parallel`): softmax over the tokens of all of them.

The latent of a token (C numbers of c_KV and R of the rotated shared key) is all that other ranks need of it: in V3, 576
numbers instead of the 40,960 of its keys and values. The latents of all ranks are gathered; the keys and values of all
heads are rebuilt from them block by block and freed after each. Every block is one call of torch's fused attention,
with segments one for each, which also returns the log of its softmax's denominator; by these the blocks' outputs are
merged. Backward calls the fused backward with the merged output and denominator, which makes each block's gradients its
part of those of the whole row. So between forward and backward a rank holds its own
queries, latents and output, and nothing that grows with the whole row. Backward gathers and rebuilds again, and sends
every rank the sum of the gradients of its latents.

    forward    all-gather of latents
    backward   all-gather of latents, reduce-scatter of their gradients in float32

Merging and sums over blocks are float32 whatever the dtype of the arguments; on a CPU all of it is, on a GPU the fused
kernels multiply in the compute dtype (`flash_blocks`). The gradient of W_UKV is computed in the same
pass, even under schedules that defer weight gradients.

In FP8 (`FP8Core`) latents are sent in the form in which they are multiplied, normalised and quantised by tiles: in V3,
656 bytes instead of 1,152. Keys and values then equal those of whole rows. Backward quantises what a rank's own queries
add to the gradient of a key, where a whole row quantises the sum over all queries: as many bits, but rounded n times.

Shapes: B rows, T tokens of a row, t tokens of it on this rank, H heads, N/R nope and rope widths of a key, V value
width, C latent rank, X = C + R; S keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.precision import fp8_layers
from bessemer.addons.accelerate.precision.fp8_linear import forward, input_gradient, weight_gradient
from bessemer.addons.accelerate.precision.operand import Operand
from bessemer.addons.distributed import flash_blocks as flash
from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.expert_parallel import packed, unpacked
from bessemer.addons.distributed.ranks import all_gather, reduce_scatter
from bessemer.model.mla import MLA, rotate

KEYS = 2048
"""Keys and values of all heads that are rebuilt at once."""


def attention(mla: MLA, x_BTD: Tensor, rope: Tensor, cut: Cut) -> Tensor:
    """`mla(x)` for this rank's tokens [B, t, D] of the whole rows; rope [t, R/2, 2] is for those tokens. A rank keeps
    nothing of other ranks' tokens."""
    q_BTHX = torch.cat(mla.queries(x_BTD, rope), -1)
    latent_BTX = mla.latent(x_BTD, rope)
    out = latent_core(q_BTHX, latent_BTX, mla.wkv_b.weight, mla.cfg.softmax_scale, cut)
    return mla.wo(out.flatten(-2))


Runs = tuple[tuple[tuple[int, int], ...], ...]
"""The segments of every row, as (first, end) positions; a token attends inside its segment."""


def runs_of(segments_BT: Tensor | None) -> Runs | None:
    """The runs of equal numbers in every row of the whole rows. The host waits for them."""
    if segments_BT is None:
        return None
    rows = []
    for row_T in segments_BT.cpu():
        borders = [0, *((row_T[1:] != row_T[:-1]).nonzero().squeeze(1) + 1).tolist(), len(row_T)]
        rows.append(tuple(pairwise(borders)))
    return tuple(rows)


@dataclass(frozen=True)
class Cut:
    """How rows are split: rank r of a group of n has chunks r and 2n - 1 - r of `size` tokens; the last chunk of a row
    may be shorter."""

    group: dist.ProcessGroup
    n: int
    rank: int
    size: int
    runs: Runs | None = None
    """None: every token attends to all before it."""

    @property
    def own(self) -> tuple[int, int]:
        """This rank's chunks, earlier and later."""
        return self.rank, 2 * self.n - 1 - self.rank

    def home(self, chunk: int) -> tuple[int, int]:
        """(rank, index among its two) of a chunk."""
        return (chunk, 0) if chunk < self.n else (2 * self.n - 1 - chunk, 1)


class _Keys(NamedTuple):
    """A block of keys: `first` to `end` of a chunk."""

    chunk: int
    first: int
    end: int


class _Pair(NamedTuple):
    """Own queries and keys of a block that meet: a square on the diagonal with a causal mask, or all with all."""

    rows: slice
    queries: slice
    """Among this rank's tokens."""
    keys: slice
    """Of the block."""
    causal: bool


def blocks(cut: Cut, t: int) -> Iterator[tuple[_Keys, list[_Pair]]]:
    """Every block of keys, with the queries that attend to it on a rank with t tokens."""
    for chunk in range(cut.own[1], -1, -1):
        for first in range((cut.size - 1) // KEYS * KEYS, -1, -KEYS):
            keys, pairs = _Keys(chunk, first, min(first + KEYS, cut.size)), list[_Pair]()
            for half, own in enumerate(cut.own):
                start, stop = half * cut.size, min((half + 1) * cut.size, t)
                if own == chunk:  # the square on the diagonal, and what lies below it
                    border = min(start + keys.end, stop)
                    pairs += _pairs(cut, keys, own, start, start + first, border, causal=True)
                    pairs += _pairs(cut, keys, own, start, border, stop, causal=False)
                elif own > chunk:
                    pairs += _pairs(cut, keys, own, start, start, stop, causal=False)
            if pairs:
                yield keys, pairs


def _pairs(cut: Cut, keys: _Keys, own: int, start: int, first: int, end: int, causal: bool) -> Iterator[_Pair]:
    """The queries `first` to `end`, of own chunk `own`, which begins at `start`, with the keys of their segments."""
    if first >= end:
        return
    if cut.runs is None:
        yield _Pair(slice(None), slice(first, end), slice(0, end - first if causal else keys.end - keys.first), causal)
        return
    shift, begin = own * cut.size - start, keys.chunk * cut.size + keys.first  # own index -> position; of the first key
    for row, runs in enumerate(cut.runs):
        for run_first, run_end in runs:
            low, high = max(run_first - shift, first), min(run_end - shift, end)
            if low >= high:
                continue
            if causal:
                yield _Pair(slice(row, row + 1), slice(low, high), slice(low - first, high - first), True)
            elif (seen := max(run_first - begin, 0)) < keys.end - keys.first:  # keys from there on to the block's end
                yield _Pair(slice(row, row + 1), slice(low, high), slice(seen, keys.end - keys.first), False)


def latent_core(q_BTHX: Tensor, latent_BTX: Tensor, weight: Tensor, scale: float, cut: Cut) -> Tensor:
    """[B, t, H, V]: softmax(scale q k^T) v over all tokens of the rows. q [B, t, H, N + R] and latents [B, t, C + R]
    are of this rank's tokens, rotated; weight [H (N + V), C] is W_UKV."""
    return _Core.apply(q_BTHX, latent_BTX, weight, scale, cut)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, latent, weight, scale, cut):
        work = _Work(q, latent, weight, scale, cut)
        out, lse = work.forward()
        ctx.scale, ctx.cut = scale, cut
        ctx.save_for_backward(q, latent, weight, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, latent, weight, out, lse = ctx.saved_tensors
        work = _Work(q, latent, weight, ctx.scale, ctx.cut)
        dq, dlatent, dweight = work.backward(dout, out, lse)
        return dq, dlatent, dweight.to(weight.dtype), None, None


class _Work:
    """One pass over the blocks."""

    def __init__(self, q, latent, weight, scale, cut: Cut):
        self.B, self.t, self.H, self.width = q.shape
        self.rank_C = weight.shape[1]
        self.nope = self.width - self.shared(latent)
        self.value = weight.shape[0] // self.H - self.nope
        self.weight, self.scale, self.cut = weight, scale, cut
        self.dtype = q.dtype
        self.q = self._heads(q)
        self.latents = self._gathered(latent)
        """[rank, B, half, size, X]."""

    def shared(self, latent: Tensor) -> int:
        """The rope width R."""
        return latent.shape[-1] - self.rank_C

    def forward(self) -> tuple[Tensor, Tensor]:
        """(output [B, t, H, V], log of the softmax denominators [B, H, t])."""
        out = self.q.new_zeros(*self.q.shape[:3], self.value, dtype=torch.float32)
        lse = out.new_full(out.shape[:3], float("-inf"))
        for keys, pairs in blocks(self.cut, self.t):
            k, v = self._built(keys)
            for rows, queries, seen, causal in pairs:
                part, part_lse = flash.forward(
                    self.q[rows, :, queries], k[rows, :, seen], v[rows, :, seen], causal, self.scale
                )
                merged, total = out[rows, :, queries], torch.logaddexp(lse[rows, :, queries], part_lse)
                merged.mul_((lse[rows, :, queries] - total).exp_().unsqueeze(-1))
                merged.addcmul_(part.float(), (part_lse - total).exp_().unsqueeze(-1))
                lse[rows, :, queries] = total
        return self._joined(out), lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, of own latents (over the queries of all ranks) and of the weight (over own queries, in
        float32)."""
        do, out = self._heads(dout), self._heads(out)
        dq, width = torch.zeros_like(self.q, dtype=torch.float32), self.rank_C + self.width - self.nope
        dlatents = self.latents.new_zeros(*self.latents.shape[:-1], width, dtype=torch.float32)
        dweight = torch.zeros_like(self.weight, dtype=torch.float32)
        for keys, pairs in blocks(self.cut, self.t):
            k, v = self._built(keys)
            dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
            for rows, queries, seen, causal in pairs:
                parts = flash.backward(
                    do[rows, :, queries], self.q[rows, :, queries], k[rows, :, seen], v[rows, :, seen],
                    out[rows, :, queries], lse[rows, :, queries], causal, self.scale,
                )  # fmt: skip
                sums = dq[rows, :, queries], dk[rows, :, seen], dv[rows, :, seen]
                for total, part in zip(sums, parts, strict=True):
                    total += part
            self._put(keys, dk, dv, dlatents, dweight)
        return self._joined(dq), self._own(dlatents), dweight

    def _built(self, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Keys [B, H, S, N + R] and values [B, H, S, V] of a block."""
        kv, k_rope = self._projected(self._at(self.latents, keys))
        kv, k_rope = kv.unflatten(-1, (self.H, -1)), k_rope.unsqueeze(2).expand(-1, -1, self.H, -1)
        return self._heads(torch.cat((kv[..., : self.nope], k_rope), -1)), self._heads(kv[..., self.nope :])

    def _put(self, keys: _Keys, dk: Tensor, dv: Tensor, dlatents: Tensor, dweight: Tensor) -> None:
        """Backward of `_built`."""
        dk, dv = (x.transpose(1, 2) for x in (dk, dv))
        dkv = torch.cat((dk[..., : self.nope], dv), -1).flatten(-2).to(self.dtype)
        into = self._at(dlatents, keys)
        into[..., : self.rank_C] = self._multiplied(dkv, self._at(self.latents, keys), dweight)
        into[..., self.rank_C :] = dk[..., self.nope :].sum(2)

    def _projected(self, latent_BSX: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, [B, S, H (N + V)], and the shared rotated key [B, S, R]."""
        return F.linear(latent_BSX[..., : self.rank_C], self.weight), latent_BSX[..., self.rank_C :]

    def _multiplied(self, dkv: Tensor, latent_BSX: Tensor, dweight: Tensor) -> Tensor:
        """Backward of the product in `_projected`: returns the gradient of c_KV, and adds the weight's to `dweight`."""
        dweight += dkv.flatten(0, 1).t() @ latent_BSX[..., : self.rank_C].flatten(0, 1)
        return dkv @ self.weight

    def _at(self, latents: Tensor, keys: _Keys) -> Tensor:
        rank, half = self.cut.home(keys.chunk)
        return latents[rank, :, half, keys.first : keys.end]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H, W] as [B, H, S, W], in the dtype of the products: float32 on a CPU."""
        return (x.float() if x.device.type == "cpu" else x.to(self.dtype)).transpose(1, 2)

    def _joined(self, x: Tensor) -> Tensor:
        """[B, H, t, W] as [B, t, H, W] in the compute dtype."""
        return x.transpose(1, 2).to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    def _gathered(self, latent: Tensor) -> Tensor:
        """The latents of all ranks, sent as bytes, so that every dtype works."""
        cut = self.cut
        mine = F.pad(latent, (0, 0, 0, 2 * cut.size - self.t)).contiguous()  # the end of a row may be missing
        gathered = mine.new_empty(cut.n, *mine.shape)
        with watchdog.waiting("latents of attention", dist.get_process_group_ranks(cut.group)):
            all_gather(gathered.view(torch.uint8).flatten(), mine.view(torch.uint8).flatten(), group=cut.group)
        return gathered.unflatten(2, (2, cut.size))

    def _own(self, dlatents: Tensor) -> Tensor:
        """The gradients of this rank's latents, summed over all ranks."""
        summed = dlatents.new_empty(dlatents[0].shape)
        with watchdog.waiting("gradients of latents", dist.get_process_group_ranks(self.cut.group)):
            reduce_scatter(summed.flatten(), dlatents.flatten(), group=self.cut.group)
        return summed.flatten(1, 2)[:, : self.t].to(self.dtype)


class FP8Core(fp8_layers.Core):
    """The core of attention in FP8 for this rank's tokens of rows that are split."""

    def __init__(self, cut: Cut):
        self.cut = cut

    def forward(self, given: fp8_layers.Projected) -> tuple[Tensor, Tensor]:
        return _FP8Work(given, self.cut).forward()

    def backward(
        self, dout: Tensor, given: fp8_layers.Projected, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dq, dlatent, dweight = _FP8Work(given, self.cut).backward(dout, out, lse)
        back = given.rope * given.rope.new_tensor([1, -1])  # the rotation's transpose
        R = given.k_rope.shape[-1]
        dq_nope, dq_rope = dq.split([dq.shape[-1] - R, R], -1)
        dc, dk_rope = dlatent.split([dlatent.shape[-1] - R, R], -1)
        dq = torch.cat((dq_nope, rotate(dq_rope, back.unsqueeze(-3))), -1)
        return dq, dc.flatten(0, 1), rotate(dk_rope, back), dweight


class _FP8Work(_Work):
    """Latents are bytes: values and scales of the operand that W_UKV multiplies, and the shared rotated key."""

    def __init__(self, given: fp8_layers.Projected, cut: Cut):
        self.recipe, self.given = given.recipe, given
        R = given.k_rope.shape[-1]
        q_nope, q_rope = given.q.split([given.q.shape[-1] - R, R], -1)
        q = torch.cat((q_nope, rotate(q_rope, given.rope.unsqueeze(-3))), -1)
        key = rotate(given.k_rope, given.rope).contiguous().view(torch.uint8)
        payload = torch.cat((packed(given.latent).view(*key.shape[:2], -1), key), -1)
        super().__init__(q, payload, given.weight, given.scale, cut)

    def shared(self, latent: Tensor) -> int:
        return self.given.k_rope.shape[-1]

    def _projected(self, latent_BSX: Tensor) -> tuple[Tensor, Tensor]:
        operand, key = self._operand(latent_BSX)
        kv = forward(operand, self.weight, self.recipe)
        return kv.view(*latent_BSX.shape[:2], -1), key.contiguous().view(self.dtype)

    def _multiplied(self, dkv: Tensor, latent_BSX: Tensor, dweight: Tensor) -> Tensor:
        dy = self.recipe.quantised_gradient(dkv)
        dweight += weight_gradient(dy, self._operand(latent_BSX)[0], self.recipe)
        return input_gradient(dy, self.weight, self.recipe).view(*dkv.shape[:2], -1)

    def _operand(self, latent_BSX: Tensor) -> tuple[Operand, Tensor]:
        """The operand [B S, C], and the shared key's bytes."""
        tail = self.given.k_rope.shape[-1] * self.given.k_rope.element_size()
        own, key = latent_BSX.split([latent_BSX.shape[-1] - tail, tail], -1)
        return unpacked(own.flatten(0, 1), self.rank_C), key
