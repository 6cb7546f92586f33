"""The exchange of tokens between the ranks that share a layer's experts: what its backends have in common.

    AllToAll    `expert_parallel`: all_to_all_single over gloo or NCCL, in every dtype; the reference
    DeepEP      `deepep`: DeepSeek's kernels for NVLink and RDMA

Rank r of a group of n holds experts r E/n to (r+1) E/n - 1. `dispatch` gives it all rows for its experts in expert
order, as `moe.dispatch` does on one device; `combine` sums the results of every token and returns them. Both are
differentiable, and backward goes the same ways in the other direction. `exchange_choice` says which backend a run
takes.

A backend overrides `dispatch`, which ends in `rows`, and `returned`.

Shapes: N own tokens, R tokens received, M rows of own experts, D hidden, K experts per token, E own experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.model import fp8, moe
from bessemer.precision.fp8_linear import FP8Recipe
from bessemer.precision.operand import Operand


class Sent(NamedTuple):
    """The input of `moe.Experts`, and the way back."""

    rows_MD: Tensor
    weight_M: Tensor
    count_E: Tensor
    """Rows of each of this rank's experts, those included that fill them up."""
    token_M: Tensor
    """The received token of each row."""
    operand: Operand | None
    received: int
    """R."""
    back: object
    """What the backend needs to return results."""
    filled: bool = False
    """As in `moe.Dispatched`; rows of nothing are those of a token that does not exist."""


class Exchange:
    """One rank's end of it; layers may share it."""

    def __init__(self, links: tuple[str, ...], n_local: int):
        self.links, self.n_local = links, n_local
        """Names that its bytes are counted under; the number of this rank's experts."""
        self.sent_bytes: Counter[str] = Counter()
        """Rows sent forward to other ranks, by link, since `bytes_sent` was asked."""

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        """All rows for this rank's experts, in expert order; with a recipe in FP8. Collective."""
        raise NotImplementedError

    def returned(self, y_RD: Tensor, back: object) -> Tensor:
        """Results of received tokens, summed on the tokens' ranks: [N, D]. Collective."""
        raise NotImplementedError

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        """For every own token the sum over all of its experts, [N, D]."""
        y_RD = summed(y_MD, sent.token_M, sent.received, sent.filled)
        return self.returned(y_RD, sent.back)

    def bytes_sent(self) -> list[float]:
        """By link, since the last call."""
        sent = [float(self.sent_bytes[link]) for link in self.links]
        self.sent_bytes.clear()
        return sent

    def rows(
        self, x_RD: Tensor, weight_RK: Tensor, place_M: Tensor, count_E: Tensor,
        operand: Callable[[Tensor], Operand] | None, filling: bool, back: object,
    ) -> Sent:  # fmt: skip
        """Repeats received tokens once for each of their experts here. `place_M`: the choices r K + k in expert order.
        `operand(token_M)` gives the rows in FP8; x_RD is then a tensor without memory, for the gradient's path back.
        `filling`: these rows are filled up (`fp8.fills`)."""
        token_M, weight_M = place_M // weight_RK.shape[1], weight_RK.flatten().index_select(0, place_M)
        if operand is None:
            return Sent(x_RD.index_select(0, token_M), weight_M, count_E, token_M, None, len(x_RD), back)
        if filling:
            fill = fp8.filled(count_E, len(token_M))
            token_M, weight_M, count_E = fill.spread(token_M, len(x_RD)), fill.spread(weight_M, 0.0), fill.rows_E
        rows = operand(token_M)
        return Sent(fp8.grad_anchor(x_RD, token_M), weight_M, count_E, token_M, rows, len(x_RD), back, filling)


def of_rows(x: Operand, token_M: Tensor, filled: bool) -> Operand:
    """The operand's rows of these tokens; `filled`: some are of the token after the last, which is nothing."""
    value, scale = x.value_MK.view(torch.uint8), x.scale_MJ
    if filled:
        value, scale = fp8.with_nothing(value), fp8.with_nothing(scale, 1.0)
    return Operand(value.index_select(0, token_M).view(torch.float8_e4m3fn), scale.index_select(0, token_M))


def summed(x_SD: Tensor, token: Tensor, n_tokens: int, filled: bool = False) -> Tensor:
    """[T, D]: the sum of the rows of every token; 0 for a token without any. `filled`: some rows are of token T, which
    does not exist."""
    return _Summed.apply(x_SD, token, n_tokens, filled)


class _Summed(torch.autograd.Function):
    """torch's index_add would keep its argument for backward: in float32 four bytes per element of every routed row."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, token: Tensor, n_tokens: int, filled: bool) -> Tensor:
        ctx.save_for_backward(token)
        ctx.filled = filled
        out = torch.zeros(n_tokens + filled, x_SD.shape[1], dtype=torch.float32, device=x_SD.device)
        return out.index_add_(0, token, x_SD.float())[:n_tokens].to(x_SD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        (token,) = ctx.saved_tensors
        dy_TD = fp8.with_nothing(dy_TD) if ctx.filled else dy_TD
        return dy_TD.index_select(0, token), None, None, None
