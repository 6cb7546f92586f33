"""The exchange of tokens between the ranks that share a layer's experts: what its backends have in common.

    AllToAll    `expert_parallel`: all_to_all_single over gloo or NCCL, in every dtype; the reference
    DeepEP      `deepep`: DeepSeek's kernels for NVLink and RDMA

Rank r of a group of n holds experts r E/n to (r+1) E/n - 1. `dispatch` gives it all rows for its experts in expert
order, as `fp8_layers.dispatch` does on one device; `combine` sums the results of every token and returns them. Both are
differentiable, and backward takes the same routes in reverse. `mesh.choose_exchange` chooses the backend of a run.

A backend overrides `dispatch`, which ends in `rows`, and `returned`.

Shapes: N own tokens, R tokens received, M rows of own experts, D hidden, K experts per token, E own experts; S rows of
T tokens at any place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.precision import fp8_layers
from bessemer.addons.accelerate.precision.fp8_linear import FP8Recipe
from bessemer.addons.accelerate.precision.operand import Operand
from bessemer.model import moe


def on_cpu(device: torch.device) -> bool:
    """Whether the device is the CPU; on others the host runs ahead, and `index_add_` adds in any order."""
    return device.type == "cpu"


class Copies:
    """Rows that are copies of tokens: makes them from the tokens, and sums them again. `token_S` is each row's token.
    `n_rows` of the rows are copies; the others are of token T, which does not exist and counts as zeros."""

    def __init__(self, token_S: Tensor, n_tokens: int, n_rows: int | None = None):
        self.token_S, self.n_tokens = token_S, n_tokens
        self.n_rows = len(token_S) if n_rows is None else n_rows
        self._more = int(self.n_rows < len(token_S))

    def of(self, x_TD: Tensor) -> Tensor:
        """The rows [S, ...]."""
        return (fp8_layers.with_nothing(x_TD) if self._more else x_TD).index_select(0, self.token_S)

    def total(self, x_SD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Each token's sum of its rows, in row order: [T, D] in the dtype of x, 0 for a token without rows. Summed in
        float32, or on a CPU in `dtype`, and rounded once."""
        if len(x_SD) and self.n_tokens and not on_cpu(x_SD.device):
            order, begin_T = self._bags
            return F.embedding_bag(order, x_SD, begin_T, mode="sum")
        out = torch.zeros(self.n_tokens + self._more, x_SD.shape[1], dtype=dtype, device=x_SD.device)
        return out.index_add_(0, self.token_S, x_SD.to(dtype))[: self.n_tokens].to(x_SD.dtype)

    @cached_property
    def _bags(self) -> tuple[Tensor, Tensor]:
        """The rows token by token, in row order, and where each token's rows begin."""
        count_T = self.token_S.new_zeros(self.n_tokens + 1)
        count_T = count_T.scatter_add_(0, self.token_S, torch.ones_like(self.token_S))[:-1]
        return self.token_S.sort(stable=True).indices[: self.n_rows], count_T.cumsum(0) - count_T

    def made(self, x_TD: Tensor) -> Tensor:
        """`of`, with a gradient."""
        return _Rows.apply(x_TD, self, False)

    def anchor(self, x_TD: Tensor) -> Tensor:
        """A tensor without memory that stands for rows sent in FP8, and carries their gradient."""
        return _Rows.apply(x_TD, self, True)

    def summed(self, x_SD: Tensor) -> Tensor:
        """`total`, with a gradient."""
        return _Summed.apply(x_SD, self)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, copies: Copies, empty: bool) -> Tensor:
        ctx.copies = copies
        return x_TD.new_zeros(()).expand(len(copies.token_S), x_TD.shape[1]) if empty else copies.of(x_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_SD: Tensor):
        return ctx.copies.total(dx_SD, dx_SD.dtype), None, None


class _Summed(torch.autograd.Function):
    """torch's index_add would keep its argument for backward: in float32 four bytes per element of every routed row."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return copies.total(x_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        return ctx.copies.of(dy_TD), None


class Sent(NamedTuple):
    """The input of `moe.Experts`, and the way back."""

    rows_MD: Tensor
    weight_M: Tensor
    count_E: Tensor
    """Rows of each of this rank's experts, including those that fill it up."""
    copies: Copies
    """The received token of each row."""
    operand: Operand | None
    back: object
    """What the backend needs to return results."""
    filled: bool = False
    """As in `moe.Dispatched`; filler rows are those of a token that does not exist."""


class Exchange:
    """One rank's end of the exchange; layers may share it."""

    def __init__(self, links: tuple[str, ...], n_local: int):
        self.links, self.n_local = links, n_local
        """The names under which its bytes are counted, and the number of this rank's experts."""
        self.sent_bytes: Counter[str] = Counter()
        """Bytes of the rows sent to other ranks in forward, by link, since the last `bytes_sent`."""

    def begin(self) -> None:
        """Called before a step or an evaluation, once all that its exchanges wait for is ready. Collective."""

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        """Sends tokens; returns all rows for this rank's experts, in expert order, with a recipe in FP8. Collective."""
        raise NotImplementedError

    def returned(self, y_RD: Tensor, back: object) -> Tensor:
        """Sends results of received tokens back, to be summed on the tokens' ranks: [N, D]. Collective."""
        raise NotImplementedError

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        """For every own token, the sum of the results of all its experts, [N, D]. Collective."""
        return self.returned(sent.copies.summed(y_MD), sent.back)

    def bytes_sent(self) -> list[float]:
        """Bytes sent since the last call, in the order of `links`."""
        sent = [float(self.sent_bytes[link]) for link in self.links]
        self.sent_bytes.clear()
        return sent

    def rows(
        self, x_RD: Tensor, weight_RK: Tensor, place_M: Tensor, count_E: Tensor,
        operand: Callable[[Tensor], Operand] | None, filling: bool, back: object,
    ) -> Sent:  # fmt: skip
        """Repeats received tokens once for each of their experts here. `place_M`: the choices r K + k in expert order.
        `operand(token_M)` gives the rows in FP8; x_RD is then a tensor without memory, for the gradient's path back.
        `filling`: these rows are filled up (`fp8_layers.fills`)."""
        token_M, weight_M = place_M // weight_RK.shape[1], weight_RK.flatten().index_select(0, place_M)
        if operand is None:
            copies = Copies(token_M, len(x_RD))
            return Sent(copies.made(x_RD), weight_M, count_E, copies, None, back)
        if filling:
            fill = fp8_layers.filled(count_E, len(token_M))
            token_M, weight_M, count_E = fill.spread(token_M, len(x_RD)), fill.spread(weight_M, 0.0), fill.rows_E
        copies = Copies(token_M, len(x_RD), len(place_M))
        return Sent(copies.anchor(x_RD), weight_M, count_E, copies, operand(token_M), back, filling)


def of_rows(x: Operand, token_M: Tensor, filled: bool) -> Operand:
    """The operand's rows of these tokens; `filled`: some are of the token after the last, whose row is zeros."""
    value, scale = x.value_MK.view(torch.uint8), x.scale_MJ
    if filled:
        value, scale = fp8_layers.with_nothing(value), fp8_layers.with_nothing(scale, 1.0)
    return Operand(value.index_select(0, token_M).view(torch.float8_e4m3fn), scale.index_select(0, token_M))
