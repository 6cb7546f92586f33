"""Rows cut over several ranks: context parallelism, for rows whose activations one rank cannot hold.

A row of T tokens is cut into 2n chunks. Rank r of n computes the tokens of chunks r and 2n - 1 - r, an early one and a
late one, so that all ranks have equally much to look back on. Weights are the same on all of them. Besides `Exchange`
this is the second place where tokens meet, and all there is to it:

    attention      looks at all earlier tokens: `latent_core` gathers their latents
    MTP            depth k reads the embedding of the token k further, which every rank looks up itself
    loss           predicts the token after, `Batch.predicted`
    balance loss   counts whole sequences: `counts`

Every rank is given the whole rows of tokens, so no token travels. At depth k of MTP the last k positions do not exist;
the rank that has the end of the row, number 0, has so many fewer.

torch's own context_parallel replaces the attention kernels of CUDA alone, moves keys and values of all heads, which are
71 times as wide as their latent (V3), and knows no segments.

Shapes: B rows, T tokens of a row, t tokens of it that are this rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bessemer.errors import UserError
from bessemer.model import mtp
from bessemer.model.layer import Attended, Layer
from bessemer.model.mla import MLA
from bessemer.dist import watchdog
from bessemer.dist.latent_core import Cut, latent_core

Attend = Callable[[Layer, Tensor], Attended]
"""(layer, its input) -> the layer's first phase."""
RopeTable = Callable[[int], Tensor]
"""Number of positions -> their rotations, [T, R/2, 2]."""


class Alone:
    """Whole rows on one rank: what `Context` cuts."""

    def length(self, T: int) -> int:
        """Tokens of a row that are this rank's."""
        return T

    def positions(self, T: int, k: int = 0) -> Tensor | None:
        """Those of this rank in a row of T, but for the last k of the row; in order. None: all."""
        return None

    def take(self, tokens_BT: Tensor) -> Tensor:
        """This rank's tokens, [B, t]."""
        return tokens_BT

    def attention(self, T: int, k: int, table: RopeTable, segments_BT: Tensor | None) -> Attend:
        """The first phase of layers that compute rows of T tokens, at depth k of MTP (0: the main model)."""
        rope, segments = table(T - k), None if segments_BT is None else segments_BT[:, : T - k]
        return lambda layer, x: layer.attend(x, rope, segments)

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """What depth k reads at this rank's positions: h^{k-1}, and the embeddings of the tokens k further."""
        h, embedded, _ = mtp.ahead(k, h_BTD, tokens_BT, None, embedding_VD)
        return h, embedded


@dataclass(frozen=True)
class Context(Alone):
    """This rank's pieces of rows that are cut over the `n` ranks of a group, of which it is number `rank`."""

    group: Any
    n: int
    rank: int

    def length(self, T: int) -> int:
        if T % (2 * self.n):
            raise UserError(refusal(T, self.n))
        return T // self.n

    def positions(self, T: int, k: int = 0) -> Tensor:
        size = self.length(T) // 2
        here = torch.arange(size)
        found = torch.cat((here + self.rank * size, here + (2 * self.n - 1 - self.rank) * size))
        return found[found < T - k]

    def take(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, self.positions(tokens_BT.shape[1]).to(tokens_BT.device)]

    def attention(self, T: int, k: int, table: RopeTable, segments_BT: Tensor | None) -> Attend:
        rope = table(T)
        rope = rope[self.positions(T, k).to(rope.device)]
        cut = Cut(self.group, self.n, self.rank, T // (2 * self.n))

        def attend(layer: Layer, x_BTD: Tensor) -> Attended:
            assert not (layer.fp8 and layer.training), "attention in FP8 takes whole rows"
            return layer.run("attend", _attend, layer, x_BTD, rope, segments_BT, cut)

        return attend

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        at = self.positions(tokens_BT.shape[1], k).to(tokens_BT.device)
        return h_BTD[:, : len(at)], F.embedding(tokens_BT[:, at + k], embedding_VD)

    def counts(self, count_SE: Tensor) -> Tensor:
        """Of the pieces of all ranks: what `Gate.whole` asks."""
        count_SE = count_SE.clone()
        with watchdog.waiting("the experts' counts of a sequence", dist.get_process_group_ranks(self.group)):
            dist.all_reduce(count_SE, group=self.group)
        return count_SE


def refusal(T: int, n: int) -> str:
    """What to say of rows that cannot be cut."""
    return (
        f"rows of {T} tokens cannot be cut into {2 * n} equal chunks, two for each of the cp = {n} ranks; take a row "
        f"length that {2 * n} divides, such as {max(1, round(T / (2 * n))) * 2 * n}, or another [layout] cp"
    )


def _attend(layer: Layer, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None, cut: Cut) -> Attended:
    return layer.route(x_BTD + attention(layer.attn, layer.attn_norm(x_BTD), rope, segments_BT, cut))


def attention(mla: MLA, x_BTD: Tensor, rope: Tensor, segments_BT: Tensor | None, cut: Cut) -> Tensor:
    """`mla(x)` of this rank's tokens [B, t, D] among those of all; rope [t, R/2, 2] is theirs, segments [B, T] are of
    the whole rows. Beyond the shared latents a rank keeps nothing of other ranks' tokens."""
    q_BTHX = torch.cat(mla.queries(x_BTD, rope), -1)
    latent_BTX = mla.latent(x_BTD, rope)
    out = latent_core(q_BTHX, latent_BTX, mla.wkv_b.weight, mla.cfg.softmax_scale, segments_BT, cut)
    return mla.wo(out.flatten(-2))
