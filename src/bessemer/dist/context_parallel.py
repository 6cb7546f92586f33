"""Context parallelism: rows split over several ranks, for rows whose activations one rank cannot hold.

A row of T tokens is split into 2n chunks. Rank r of n computes the tokens of chunks r and 2n - 1 - r, an early one and
a late one, so that all ranks attend to equally many keys. Their weights are the same. Tokens meet in four places:

    attention      attends to all earlier tokens: `latent_core` gathers their latents
    MTP            depth k reads the embedding of the token k further on, which every rank looks up itself
    loss           predicts the next token, `Batch.predicted`
    balance loss   counts whole sequences: `Context.counts`

Every rank is given the whole rows of tokens, so no token is sent. At depth k of MTP the last k positions do not exist;
the rank with the end of the row, number 0, has k fewer.

Attention: the latent of a token (C numbers of c_KV and R of the rotated shared key) is all that other ranks need of it;
V3: 576 numbers instead of the 40,960 of its keys and values. The latents of all ranks are gathered; keys and values of
all heads are rebuilt from them block by block, from the last block to the first, and freed after it. Softmax is
accumulated over the blocks by its running log denominator. So between forward and backward a rank holds its own
queries, latents and output, and nothing that grows with the whole row. Backward gathers and rebuilds again, and sends
every rank the sum of the gradients of its latents.

    forward    all-gather of latents
    backward   all-gather of latents, reduce-scatter of their gradients in float32

Scores, softmax and sums are float32 whatever the dtype of the arguments. The gradient of W_UKV is computed in the same
pass, also by schedules that defer weight gradients.

torch's own context_parallel replaces the attention kernels of CUDA only, sends keys and values of all heads, which are
71 times as wide as their latent (V3), and has no segments.

Shapes: B rows, T tokens of a row, t tokens of it on this rank, H heads, N/R nope and rope widths of a key, V value
width, C latent rank, X = C + R, n = B * H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.dist import watchdog
from bessemer.dist.ranks import all_gather, reduce_scatter
from bessemer.errors import UserError
from bessemer.model.layer import Attended, Layer
from bessemer.model.mla import MLA
from bessemer.model.segments import Packed, Segments, first_tokens
from bessemer.model.transformer import mtp_inputs

QUERIES = 64
"""Queries whose scores exist at once."""
KEYS = 1024
"""Keys that are rebuilt at once: a multiple of QUERIES, so that the first block of keys that a query meets includes its
own."""

Attend = Callable[[Layer, Tensor, Tensor | None], Attended]
"""(layer, its input, experts to replay as in `gate.Gate`) -> the layer's first phase."""
RopeTable = Callable[[int], Tensor]
"""Number of positions -> their rotations, [T, R/2, 2]."""


@dataclass(frozen=True)
class WholeAttend:
    """The first phase of a layer over whole rows, or with `Layer.forward` all of them."""

    rope: Tensor
    segments: Segments

    def __call__(self, layer: Layer, x_BTD: Tensor, choice_NK: Tensor | None = None) -> Attended:
        return layer.attend(x_BTD, self.rope, self.segments, choice_NK)


class WholeRows:
    """Whole rows on one rank; `Context` splits them."""

    def length(self, T: int) -> int:
        """Tokens of a row on this rank."""
        return T

    def positions(self, T: int, k: int = 0) -> Tensor | None:
        """Positions of this rank in a row of T tokens, in order and without the last k of the row. None: all."""
        return None

    def take(self, tokens_BT: Tensor) -> Tensor:
        """This rank's tokens, [B, t], or what lies along them."""
        return tokens_BT

    def attention(self, T: int, k: int, table: RopeTable, segments: Segments) -> Attend:
        """The first phase of layers, for rows of T tokens at depth k of MTP (0: the main model)."""
        return WholeAttend(table(T - k), first_tokens(segments, T - k))

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """What depth k reads at this rank's positions: h^{k-1}, and the embeddings of the tokens k further on."""
        h, embedded, _ = mtp_inputs(k, h_BTD, tokens_BT, None, embedding_VD)
        return h, embedded


@dataclass(frozen=True)
class Context(WholeRows):
    """This rank's chunks of rows that are split over the `n` ranks of a group; its number there is `rank`."""

    group: dist.ProcessGroup
    n: int
    rank: int

    def length(self, T: int) -> int:
        if T % (2 * self.n):
            raise UserError(refusal(T, self.n))
        return T // self.n

    def positions(self, T: int, k: int = 0) -> Tensor:
        size = self.length(T) // 2
        within = torch.arange(size)
        positions = torch.cat((within + self.rank * size, within + (2 * self.n - 1 - self.rank) * size))
        return positions[positions < T - k]

    def take(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, self.positions(tokens_BT.shape[1]).to(tokens_BT.device)]

    def attention(self, T: int, k: int, table: RopeTable, segments: Segments) -> Attend:
        rope = table(T)
        rope = rope[self.positions(T, k).to(rope.device)]
        segments_BT = segments.segments_BT if isinstance(segments, Packed) else segments
        cut = Cut(self.group, self.n, self.rank, T // (2 * self.n))

        def attend(layer: Layer, x_BTD: Tensor, choice_NK: Tensor | None) -> Attended:
            assert not (layer.fp8 and layer.training), "attention in FP8 takes whole rows"
            return layer.run_phase("attend", _attend, layer, x_BTD, rope, segments_BT, cut, choice_NK)

        return attend

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        at = self.positions(tokens_BT.shape[1], k).to(tokens_BT.device)
        return h_BTD[:, : len(at)], F.embedding(tokens_BT[:, at + k], embedding_VD)

    def counts(self, count_SE: Tensor) -> Tensor:
        """Expert counts of whole sequences, for `Gate.sum_counts`: the sum over all ranks."""
        count_SE = count_SE.clone()
        with watchdog.waiting("the experts' counts of a sequence", dist.get_process_group_ranks(self.group)):
            dist.all_reduce(count_SE, group=self.group)
        return count_SE


def refusal(T: int, n: int) -> str:
    """The message for rows that cannot be split."""
    return (
        f"rows of {T} tokens cannot be split into {2 * n} equal chunks, two for each of the cp = {n} ranks; take a row "
        f"length that {2 * n} divides, such as {max(1, round(T / (2 * n))) * 2 * n}, or another [layout] cp"
    )


def _attend(
    layer: Layer, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None, cut: Cut, choice_NK: Tensor | None
) -> Attended:
    return layer.route(x_BTD + attention(layer.attn, layer.attn_norm(x_BTD), rope, segments_BT, cut), choice_NK)


def attention(mla: MLA, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None, cut: Cut) -> Tensor:
    """`mla(x)` for this rank's tokens [B, t, D] of the whole rows; rope [t, R/2, 2] is for those tokens, segments
    [B, T] are of the whole rows. A rank keeps nothing of other ranks' tokens."""
    q_BTHX = torch.cat(mla.queries(x_BTD, rope), -1)
    latent_BTX = mla.latent(x_BTD, rope)
    out = latent_core(q_BTHX, latent_BTX, mla.wkv_b.weight, mla.cfg.softmax_scale, segments_BT, cut)
    return mla.wo(out.flatten(-2))


@dataclass(frozen=True)
class Cut:
    """How rows are split: rank r of the n of a group has chunks r and 2n - 1 - r of `size` tokens; the last chunk of a
    row may be shorter."""

    group: dist.ProcessGroup
    n: int
    rank: int
    size: int

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


class _Queries(NamedTuple):
    """Own queries `first` to `end`, at `position` of the row; they attend to the block's keys up to `keys`, with a
    causal mask if `diagonal`."""

    first: int
    end: int
    position: int
    keys: int
    diagonal: bool


def blocks(cut: Cut, t: int) -> Iterator[tuple[_Keys, list[_Queries]]]:
    """Every block of keys with the queries of a rank with t tokens that attend to it, the last keys first."""
    for chunk in range(cut.own[1], -1, -1):
        for first in range((cut.size - 1) // KEYS * KEYS, -1, -KEYS):
            keys = _Keys(chunk, first, min(first + KEYS, cut.size))
            queries: list[_Queries] = []
            for half, own in enumerate(cut.own):
                if own >= chunk:
                    queries += _queries(cut, keys, half, own, t)
            if queries:
                yield keys, queries


def _queries(cut: Cut, keys: _Keys, half: int, own: int, t: int) -> Iterator[_Queries]:
    start, stop = half * cut.size, min((half + 1) * cut.size, t)
    diagonal = own == keys.chunk
    for first in range(start + (keys.first if diagonal else 0), stop, QUERIES):
        end = min(first + QUERIES, stop)
        seen = min(keys.end, end - start) if diagonal else keys.end
        masked = diagonal and seen > first - start + 1
        yield _Queries(first, end, own * cut.size + first - start, seen - keys.first, masked)


def latent_core(
    q_BTHX: Tensor, latent_BTX: Tensor, weight: Tensor, scale: float, segments_BT: Tensor | None, cut: Cut
) -> Tensor:
    """[B, t, H, V]: softmax(scale q k^T) v over all tokens of the rows. q [B, t, H, N + R] and latents [B, t, C + R]
    are of this rank's tokens, rotated; weight [H (N + V), C] is W_UKV; segments [B, T] of the whole rows."""
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
        """Gradients of q, of own latents (over the queries of all ranks) and of the weight (over own queries)."""
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
        """Backward of `_built`."""
        dk, dv = (x.unflatten(0, (self.B, self.H)).transpose(1, 2) for x in (dk, dv))
        dkv = torch.cat((dk[..., : self.nope], dv), -1).flatten(-2).to(self.dtype)
        latent, into = self._at(self.latents, keys), self._at(dlatents, keys)
        into[..., : self.rank_C] = dkv @ self.weight
        into[..., self.rank_C :] = dk[..., self.nope :].sum(2)
        dweight += dkv.flatten(0, 1).t() @ latent[..., : self.rank_C].flatten(0, 1)

    def _scores(self, k: Tensor, keys: _Keys, block: _Queries) -> Tensor:
        """[n, queries, keys], -inf where a query may not attend."""
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
