"""Context parallelism: rows split over several ranks, for rows whose activations one rank cannot hold.

A row of T tokens is split into 2n chunks. Rank r of n computes the tokens of chunks r and 2n - 1 - r, an early one and
a late one, so that all ranks attend to equally many keys. All ranks have the same weights. Tokens interact in four
places:

    attention      attends to all earlier tokens: `context_attention` gathers their latents
    MTP            depth k reads the embedding of the token k further on, which every rank looks up itself
    loss           predicts the next token, `Batch.predicted`
    balance loss   counts whole sequences: `Context.counts`

Every rank gets the whole rows of tokens, so no token is sent. At MTP depth k the last k positions do not exist, so rank
0, which has the end of the row, has k fewer. In FP8 training, tiles of 1 x 128 lie along features and are the same as
for whole rows. The tiles of weight gradients lie along tokens and are cut with the rows.

torch's own context_parallel replaces only CUDA's attention kernels, sends the keys and values of all heads, which are
71 times as wide as their latent (V3), and does not support segments.

Shapes: B rows, T tokens of a row, t tokens of it on this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bessemer.addons.accelerate.precision import fp8_layers
from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.context_attention import Cut, FP8Core, attention, runs_of
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.layer import Attended, Layer, recomputed
from bessemer.model.segments import Packed, Segments, first_tokens
from bessemer.model.transformer import mtp_inputs

Attend = Callable[[Layer, Tensor, Tensor | None], Attended]
"""(layer, its input, experts to replay as in `gate.Gate`) -> the output of the layer's first phase."""
RopeTable = Callable[[int], Tensor]
"""Number of positions -> their rotations, [T, R/2, 2]."""


@dataclass(frozen=True)
class WholeAttend:
    """Runs a layer's first phase over whole rows; its fields are also the arguments for the whole `Layer.forward`."""

    rope: Tensor
    segments: Segments

    def __call__(self, layer: Layer, x_BTD: Tensor, choice_NK: Tensor | None = None) -> Attended:
        return layer.attend(x_BTD, self.rope, self.segments, choice_NK)


class WholeRows:
    """Keeps rows whole on one rank; `Context` splits them."""

    def length(self, T: int) -> int:
        """How many of a row's T tokens this rank holds. `Context` raises UserError if T cannot be split."""
        return T

    @property
    def multiple(self) -> int:
        """Rows are split if their tokens are a multiple of this."""
        return 1

    def split(self, batch: Batch) -> Batch:
        """The batch, of which this rank computes its own positions."""
        return batch

    def positions(self, T: int, k: int = 0) -> Tensor | None:
        """Positions of this rank in a row of T tokens, in order and without the last k of the row. None: all."""
        return None

    def take(self, tokens_BT: Tensor) -> Tensor:
        """This rank's part, [B, t, ...], of tokens or of anything else with leading dimensions [B, T]."""
        return tokens_BT

    def whole(self, values_Bt: Tensor) -> Tensor:
        """The values of all ranks at their positions, [B, T]. The gradient goes back to this rank's own."""
        return values_Bt

    def attention(self, T: int, k: int, table: RopeTable, segments: Segments) -> Attend:
        """Returns what runs a layer's first phase for rows of T tokens at MTP depth k (0: the main model)."""
        return WholeAttend(table(T - k), first_tokens(segments, T - k))

    def counted(self, k: int, counted_BT: Tensor | None) -> Tensor | None:
        """Which of this rank's positions at depth k count in the loads (`Gate.counted_BT`)."""
        return None if counted_BT is None else counted_BT[:, k:]

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """What depth k reads at this rank's positions: h^{k-1}, and the embeddings of the tokens k positions ahead."""
        h, embedded, _ = mtp_inputs(k, h_BTD, tokens_BT, None, embedding_VD)
        return h, embedded


@dataclass(frozen=True)
class Context(WholeRows):
    """Splits rows over the `n` ranks of a group, in which this rank has number `rank`."""

    group: dist.ProcessGroup
    n: int
    rank: int

    @property
    def multiple(self) -> int:
        return 2 * self.n

    def split(self, batch: Batch) -> Batch:
        return batch.at(self.positions(batch.tokens_BT.shape[1]), self.whole)

    def length(self, T: int) -> int:
        if T % self.multiple:
            raise UserError(refusal(T, self.n))
        return T // self.n

    def positions(self, T: int, k: int = 0) -> Tensor:
        size = self.length(T) // 2
        within = torch.arange(size)
        positions = torch.cat((within + self.rank * size, within + (2 * self.n - 1 - self.rank) * size))
        return positions[positions < T - k]

    def take(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT[:, self.positions(tokens_BT.shape[1]).to(tokens_BT.device)]

    def whole(self, values_Bt: Tensor) -> Tensor:
        whole_BT: Tensor = _Whole.apply(values_Bt, self)
        return whole_BT

    def attention(self, T: int, k: int, table: RopeTable, segments: Segments) -> Attend:
        rope = table(T)
        rope = rope[self.positions(T, k).to(rope.device)]
        segments_BT = segments.segments_BT if isinstance(segments, Packed) else segments
        cut = Cut(self.group, self.n, self.rank, T // (2 * self.n), runs_of(segments_BT))

        def attend(layer: Layer, x_BTD: Tensor, choice_NK: Tensor | None) -> Attended:
            if (recipe := fp8_layers.recipe_of(layer)) is not None:
                core = FP8Core(cut)
                y_BTD = fp8_layers.attention(layer.attn_norm, layer.attn, x_BTD, rope, segments_BT, recipe, core)
                return recomputed(layer.route, x_BTD + y_BTD, choice_NK)
            return layer.run_phase("attend", _attend, layer, x_BTD, rope, cut, choice_NK)

        return attend

    def counted(self, k: int, counted_BT: Tensor | None) -> Tensor | None:
        if counted_BT is None:
            return None
        return counted_BT[:, self.positions(counted_BT.shape[1], k).to(counted_BT.device) + k]

    def ahead(self, k: int, h_BTD: Tensor, tokens_BT: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        at = self.positions(tokens_BT.shape[1], k).to(tokens_BT.device)
        return h_BTD[:, : len(at)], F.embedding(tokens_BT[:, at + k], embedding_VD)

    def counts(self, count_SE: Tensor) -> Tensor:
        """Sums expert counts over the group, so that they cover whole sequences; for `Gate.sum_counts`."""
        count_SE = count_SE.clone()
        with watchdog.waiting("the experts' counts of a sequence", dist.get_process_group_ranks(self.group)):
            dist.all_reduce(count_SE, group=self.group)
        return count_SE


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_Bt: Tensor, context: Context) -> Tensor:
        parts = [torch.empty_like(values_Bt) for _ in range(context.n)]
        with watchdog.waiting("numbers of a row", dist.get_process_group_ranks(context.group)):
            dist.all_gather(parts, values_Bt.contiguous(), group=context.group)
        T = values_Bt.shape[1] * context.n
        whole_BT = values_Bt.new_empty(len(values_Bt), T)
        for rank, part_Bt in enumerate(parts):
            whole_BT[:, replace(context, rank=rank).positions(T).to(part_Bt.device)] = part_Bt
        ctx.own_T = context.positions(T).to(values_Bt.device)
        return whole_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor) -> tuple[Tensor, None]:
        return grad_BT[:, ctx.own_T], None


def refusal(T: int, n: int) -> str:
    """The message for rows that cannot be split."""
    return (
        f"rows of {T} tokens cannot be split into {2 * n} equal chunks, two for each of the cp = {n} ranks; use a row "
        f"length that is a multiple of {2 * n}, such as {max(1, round(T / (2 * n))) * 2 * n}, or another [layout] cp"
    )


def _attend(layer: Layer, x_BTD: Tensor, rope: Tensor, cut: Cut, choice_NK: Tensor | None) -> Attended:
    return layer.route(x_BTD + attention(layer.attn, layer.attn_norm(x_BTD), rope, cut), choice_NK)
