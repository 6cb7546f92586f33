"""Rows between the ranks of a group, with their gradients: what an exchange is made of.

    forth    rows to the places that want them         backward: home again, the copies of a token summed
    lead     the same for rows that travel as bytes beside it: no memory, no message, only the gradient's route home
    back     results home, the copies of a token summed     backward: out again, in FP8 if the route has a recipe
    moved    what has no gradient

Sums are in float32 and rounded once. Bytes travel as bytes, so every dtype does.

Shapes: T tokens before a hop, S rows sent, R rows received, D width of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.dist import watchdog
from bessemer.precision.fp8_linear import FP8Recipe
from bessemer.precision.operand import TILE, Operand


class Route(NamedTuple):
    """One hop as it went."""

    token: Tensor
    """Which token each sent row is, int64 [S]."""
    send: list[int]
    """Rows to every place, S in all."""
    receive: list[int]
    """Rows from every place, R in all."""
    n_tokens: int
    """T."""
    group: Any
    recipe: FP8Recipe | None


def received(send: list[int], group: Any, device: torch.device) -> list[int]:
    """How many rows every place is going to send here."""
    mine = torch.tensor(send, device=device)
    theirs = torch.empty_like(mine)
    with watchdog.waiting("tokens for the experts", dist.get_process_group_ranks(group)):
        dist.all_to_all_single(theirs, mine, group=group)
        return theirs.tolist()


def _rows(x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:
    """x [S, ...] cut by `send`; the rows that come instead, by `receive`."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    as_bytes = (t.contiguous().view(torch.uint8) if t.dtype != torch.int64 else t for t in (out, x))
    with watchdog.waiting("tokens for the experts", dist.get_process_group_ranks(group)):
        dist.all_to_all_single(*as_bytes, receive, send, group=group)
    return out


def moved(x: Tensor, route: Route) -> Tensor:
    """Rows [S, ...] sent."""
    return _rows(x, route.send, route.receive, route.group)


def summed(x_SD: Tensor, token: Tensor, n_tokens: int) -> Tensor:
    """[T, D]: the rows of every token added up; 0 for a token without."""
    return _Summed.apply(x_SD, token, n_tokens)


class _Summed(torch.autograd.Function):
    """index_add of torch keeps what it adds, in float32 four bytes for every element of every routed row."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, token: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        out = torch.zeros(n_tokens, x_SD.shape[1], dtype=torch.float32, device=x_SD.device)
        return out.index_add_(0, token, x_SD.float()).to(x_SD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        (token,) = ctx.saved_tensors
        return dy_TD.index_select(0, token), None, None


def send(x_TD: Tensor, route: Route) -> Tensor:
    """Every token to the places that want it, [R, D]."""
    return _Send.apply(x_TD, route, False)


def grad_anchor(x_TD: Tensor, route: Route | None = None) -> Tensor:
    """A tensor without memory in the place of `forth`'s, or without a route in x's own."""
    return _Send.apply(x_TD, route, True)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, route: Route | None, empty: bool) -> Tensor:
        ctx.route = route
        if empty:
            return _empty(x_TD, len(x_TD) if route is None else sum(route.receive))
        return moved(x_TD[route.token], route)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD: Tensor):
        return dx_RD if ctx.route is None else _home(dx_RD, ctx.route), None, None


def _home(x_RD: Tensor, route: Route) -> Tensor:
    return summed(_rows(x_RD.contiguous(), route.receive, route.send, route.group), route.token, route.n_tokens)


def _empty(x_TD: Tensor, rows: int) -> Tensor:
    return x_TD.new_zeros(()).expand(rows, x_TD.shape[1])


def return_(y_RD: Tensor, route: Route) -> Tensor:
    """Results home, [T, D]."""
    return _Return.apply(y_RD, route)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _home(y_RD, route)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        route: Route = ctx.route
        if route.recipe is None:
            return moved(dy_TD[route.token], route), None
        sent = packed(route.recipe.quantised_gradient(dy_TD, power_of_two=True))[route.token]
        return unpacked(moved(sent, route), dy_TD.shape[1]).dequantise().to(dy_TD.dtype), None


def packed(operand: Operand) -> Tensor:
    """Values and factors of a row side by side, uint8 [T, D + 4 J]: 7,392 bytes a token of V3."""
    value, scale = operand.value_MK.contiguous(), operand.scale_MJ.contiguous()
    return torch.cat((value.view(torch.uint8), scale.view(torch.uint8)), 1)


def unpacked(payload: Tensor, columns: int) -> Operand:
    value, scale = payload.split([columns, payload.shape[1] - columns], 1)
    assert scale.shape[1] == 4 * -(-columns // TILE), "not a payload of this width"
    return Operand(value.contiguous().view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32))
