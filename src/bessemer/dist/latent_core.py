"""The core of MLA for rows that are cut over ranks: own queries over the latents of all earlier tokens.

A token's latent, the C numbers of c_KV and the R of the rotated shared key, is all that other ranks need of it; V3: 576
instead of the 40,960 of its keys and values. The latents of all ranks are gathered; keys and values of all heads are
built from them block by block, from the last block to the first, and gone after it. Softmax is summed up over the
blocks by its running log denominator. So between forward and backward a rank holds its own queries, latents and output,
and nothing that grows with the whole row. Backward gathers again, builds again, and sends every rank the sum of the
gradients of its latents.

    forward    all-gather of latents
    backward   all-gather of latents, reduce-scatter of their gradients in float32

Scores, softmax and sums are float32 whatever the dtype of the arguments. The gradient of W_UKV is made in the same
pass: a schedule that leaves weight gradients for later does not leave this one.

Shapes: B rows, t own tokens, H heads, N/R nope and rope widths of a key, V value width, C latent rank, X = C + R,
n = B * H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.dist import watchdog
from bessemer.dist.collectives import all_gather, reduce_scatter

QUERIES = 64
"""Queries whose scores are held at once."""
KEYS = 1024
"""Keys that are built at once: a multiple of QUERIES, so that the first block of keys a query meets holds its own."""


@dataclass(frozen=True)
class Cut:
    """How rows are cut: rank r of the n of a group has chunks r and 2n - 1 - r of `size` tokens; of the last chunk
    of a row perhaps some fewer, at its end."""

    group: Any
    n: int
    rank: int
    size: int

    @property
    def own(self) -> tuple[int, int]:
        """This rank's chunks, earlier and later."""
        return self.rank, 2 * self.n - 1 - self.rank

    def home(self, chunk: int) -> tuple[int, int]:
        """(rank, which of its two) of a chunk."""
        return (chunk, 0) if chunk < self.n else (2 * self.n - 1 - chunk, 1)


class _Keys(NamedTuple):
    """A block of keys: `first` to `end` of a chunk, and whose they are."""

    chunk: int
    first: int
    end: int


class _Queries(NamedTuple):
    """Own queries `first` to `end`, at `position` of the row; they see the block's keys up to `keys`, the last of
    them by causality where `diagonal`."""

    first: int
    end: int
    position: int
    keys: int
    diagonal: bool


def blocks(cut: Cut, t: int) -> Iterator[tuple[_Keys, list[_Queries]]]:
    """All that a rank with t tokens has to compute, the last keys first."""
    for chunk in range(cut.own[1], -1, -1):
        for first in range((cut.size - 1) // KEYS * KEYS, -1, -KEYS):
            keys = _Keys(chunk, first, min(first + KEYS, cut.size))
            found = []
            for half, own in enumerate(cut.own):
                if own >= chunk:
                    found += _queries(cut, keys, half, own, t)
            if found:
                yield keys, found


def _queries(cut: Cut, keys: _Keys, half: int, own: int, t: int) -> Iterator[_Queries]:
    start, stop = half * cut.size, min((half + 1) * cut.size, t)
    diagonal = own == keys.chunk
    for first in range(start + (keys.first if diagonal else 0), stop, QUERIES):
        end = min(first + QUERIES, stop)
        seen = min(keys.end, end - start) if diagonal else keys.end
        here = diagonal and seen > first - start + 1
        yield _Queries(first, end, own * cut.size + first - start, seen - keys.first, here)


def latent_core(
    q_BTHX: Tensor, latent_BTX: Tensor, weight: Tensor, scale: float, segments_BT: Tensor | None, cut: Cut
) -> Tensor:
    """[B, t, H, V]: softmax(scale q k^T) v over all tokens of the rows. q [B, t, H, N + R] and latents [B, t, C + R]
    are of own tokens, rotated; weight [H (N + V), C] is W_UKV; segments [B, T] of the whole rows."""
    return _Core.apply(q_BTHX, latent_BTX, weight, scale, segments_BT, cut)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, latent, weight, scale, segments_BT, cut):
        work = _Work(q, latent, weight, scale, segments_BT, cut)
        out, lse = work.forward()
        ctx.scale, ctx.cut = scale, cut
        ctx.save_for_backward(q, latent, weight, segments_BT, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, latent, weight, segments_BT, out, lse = ctx.saved_tensors
        work = _Work(q, latent, weight, ctx.scale, segments_BT, ctx.cut)
        return *work.backward(dout, out, lse), None, None, None


class _Work:
    """One pass over the blocks."""

    def __init__(self, q, latent, weight, scale, segments_BT, cut: Cut):
        self.B, self.t, self.H, self.width = q.shape
        self.rank_C = weight.shape[1]
        self.nope = self.width - (latent.shape[-1] - self.rank_C)
        self.weight, self.segments_BT, self.scale, self.cut = weight, segments_BT, scale, cut
        self.dtype = q.dtype
        self.q = self._heads(q) * scale
        self.latents = self._gathered(latent)
        """[rank, B, half, size, X]."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """(output [B, t, H, V], log of the softmax denominators [n, t])."""
        value = self.weight.shape[0] // self.H - self.nope
        out = self.q.new_zeros(len(self.q), self.t, value)
        lse = self.q.new_full((len(self.q), self.t), float("-inf"))
        for keys, queries in blocks(self.cut, self.t):
            k, v = self._built(keys)
            for block in queries:
                rows = slice(block.first, block.end)
                score = self._scores(k, keys, block)
                total = torch.logaddexp(lse[:, rows], score.logsumexp(-1))
                out[:, rows] *= (lse[:, rows] - total).exp_().unsqueeze(-1)
                out[:, rows].baddbmm_(score.sub_(total.unsqueeze(-1)).exp_(), v[:, : block.keys])
                lse[:, rows] = total
        return self._joined(out), lse

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, of own latents over all ranks' queries, and of the weight over own queries."""
        do = self._heads(dout)
        delta = torch.linalg.vecdot(do, self._heads(out))
        dq, dlatents = torch.zeros_like(self.q), torch.zeros_like(self.latents, dtype=torch.float32)
        dweight = torch.zeros_like(self.weight, dtype=torch.float32)
        for keys, queries in blocks(self.cut, self.t):
            k, v = self._built(keys)
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for block in queries:
                rows, seen = slice(block.first, block.end), slice(0, block.keys)
                p = self._scores(k, keys, block).sub_(lse[:, rows].unsqueeze(-1)).exp_()
                g = do[:, rows]
                dv[:, seen].baddbmm_(p.transpose(1, 2), g)
                ds = torch.bmm(g, v[:, seen].transpose(1, 2)).sub_(delta[:, rows].unsqueeze(-1)).mul_(p)
                dq[:, rows].baddbmm_(ds, k[:, seen])
                dk[:, seen].baddbmm_(ds.transpose(1, 2), self.q[:, rows])
            self._put(keys, dk, dv, dlatents, dweight)
        return self._joined(dq.mul_(self.scale)), self._own(dlatents), dweight.to(self.weight.dtype)

    def _built(self, keys: _Keys) -> tuple[Tensor, Tensor]:
        """Keys [n, S, N + R] and values [n, S, V] of a block, in float32."""
        latent = self._at(self.latents, keys)
        kv = F.linear(latent[..., : self.rank_C], self.weight).unflatten(-1, (self.H, -1))
        k_rope = latent[..., self.rank_C :].unsqueeze(2).expand(-1, -1, self.H, -1)
        return self._heads(torch.cat((kv[..., : self.nope], k_rope), -1)), self._heads(kv[..., self.nope :])

    def _put(self, keys: _Keys, dk: Tensor, dv: Tensor, dlatents: Tensor, dweight: Tensor) -> None:
        """Past what `_built` did."""
        dk, dv = (x.unflatten(0, (self.B, self.H)).transpose(1, 2) for x in (dk, dv))
        dkv = torch.cat((dk[..., : self.nope], dv), -1).flatten(-2).to(self.dtype)
        latent, into = self._at(self.latents, keys), self._at(dlatents, keys)
        into[..., : self.rank_C] = dkv @ self.weight
        into[..., self.rank_C :] = dk[..., self.nope :].sum(2)
        dweight += dkv.flatten(0, 1).t() @ latent[..., : self.rank_C].flatten(0, 1)

    def _scores(self, k: Tensor, keys: _Keys, block: _Queries) -> Tensor:
        """[n, queries, keys], -inf where a query may not look."""
        score = torch.bmm(self.q[:, block.first : block.end], k[:, : block.keys].transpose(1, 2))
        begin = keys.chunk * self.cut.size + keys.first
        key = torch.arange(begin, begin + block.keys, device=k.device)
        query = torch.arange(block.position, block.position + block.end - block.first, device=k.device)
        if block.diagonal:
            score.masked_fill_(key > query[:, None], float("-inf"))
        if self.segments_BT is not None:
            other = self.segments_BT[:, query, None] != self.segments_BT[:, None, key]
            score.unflatten(0, (self.B, self.H)).masked_fill_(other.unsqueeze(1), float("-inf"))
        return score

    def _at(self, latents: Tensor, keys: _Keys) -> Tensor:
        rank, half = self.cut.home(keys.chunk)
        return latents[rank, :, half, keys.first : keys.end]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H, W] as [n, S, W] in float32."""
        return x.float().transpose(1, 2).flatten(0, 1)

    def _joined(self, x: Tensor) -> Tensor:
        """Back, in the compute dtype."""
        x = x.unflatten(0, (self.B, self.H)).transpose(1, 2)
        return x.to(self.dtype, memory_format=torch.contiguous_format, copy=True)

    def _gathered(self, latent: Tensor) -> Tensor:
        """The latents of all ranks; bytes travel as bytes, so every dtype does."""
        cut = self.cut
        mine = F.pad(latent, (0, 0, 0, 2 * cut.size - self.t)).contiguous()  # where the end of a row is missing
        found = mine.new_empty(cut.n, *mine.shape)
        with watchdog.waiting("latents of attention", dist.get_process_group_ranks(cut.group)):
            all_gather(found.view(torch.uint8).flatten(), mine.view(torch.uint8).flatten(), group=cut.group)
        return found.unflatten(2, (2, cut.size))

    def _own(self, dlatents: Tensor) -> Tensor:
        """The sum over all ranks of what they found for this rank's latents."""
        found = dlatents.new_empty(dlatents[0].shape)
        with watchdog.waiting("gradients of latents", dist.get_process_group_ranks(self.cut.group)):
            reduce_scatter(found.flatten(), dlatents.flatten(), group=self.cut.group)
        return found.flatten(1, 2)[:, : self.t].to(self.dtype)
