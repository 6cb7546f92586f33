"""Sends tokens to their experts and back when a layer's experts live on several ranks (V3 3.2.2).

Rank r of an expert-parallel group of n holds experts r E/n to (r+1) E/n - 1. `Exchange.dispatch` gives a rank all rows
for its experts in expert order, as `fp8_layers.dispatch` does on one device; `combine` returns the results and sums
them.

A token makes one hop or two. In a hop it is sent once to every place that needs it, however many experts it has there:

    one hop     to the ranks of its experts
    two hops    to the nodes of its experts, where the rank with the sender's number within its node receives it; from
                there to the ranks of that node. On the way back every hop sums the copies of a token before it sends

With node-limited routing a token goes to at most `n_limited_groups` nodes, so the slow links carry that many copies of
it instead of K. Nothing is dropped or padded; a rank may send or receive nothing.

In FP8 training, rows sent to the experts (activations in forward, gradients in backward) are in FP8 with power-of-two
scales; everything returned from them is in the compute dtype (V3 3.3.3).

The host waits once per hop, for the row counts, and not in backward. A hop consists of differentiable all-to-alls.
Sums are in float32, in row order, and rounded once. Tensors are sent as bytes, so every dtype works.

    send_rows     rows to the places that need them        backward: returned, the copies of a token summed
    grad_anchor   stands in for `send_rows` when rows are sent separately as FP8 bytes: no memory, no message, only the
                  gradient's path back
    return_       results returned, copies summed          backward: sent again, in FP8 if the route has a recipe
    exchanged     rows without a gradient

This is the reference among the backends of `exchange.Exchange`: it runs on every device and in every dtype.

Shapes: T tokens at some place of their route, M rows of own experts, D hidden, K experts per token, S rows sent, R rows
received.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bessemer.addons.accelerate.precision import fp8_layers
from bessemer.addons.accelerate.precision.fp8_linear import FP8Recipe
from bessemer.addons.accelerate.precision.operand import TILE, Operand
from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.exchange import Copies, Exchange, Sent, of_rows, on_cpu
from bessemer.model import moe


class Route(NamedTuple):
    """How the rows of one hop were sent."""

    copies: Copies
    """The token of each sent row."""
    send: list[int]
    """Rows sent to each place, S in total."""
    receive: list[int]
    """Rows received from each place, R in total."""
    group: dist.ProcessGroup
    recipe: FP8Recipe | None


def counted(mine_P2: Tensor, group: dist.ProcessGroup) -> tuple[list[list[int]], list[list[int]]]:
    """Swaps two numbers with every place: (this rank's for each place, each place's for this rank). The host waits."""
    theirs_P2 = torch.empty_like(mine_P2)
    with watchdog.waiting("tokens for the experts", dist.get_process_group_ranks(group)):
        dist.all_to_all_single(theirs_P2, mine_P2, group=group)
        sent, received = torch.stack((mine_P2, theirs_P2)).tolist()
    return sent, received


def _where(mask: Tensor, number: int) -> Tensor:
    """The indices where a mask is true. The host knows how many there are, so it need not wait for a GPU."""
    if on_cpu(mask.device):
        return mask.flatten().nonzero().squeeze(1)
    return mask.logical_not().flatten().to(torch.uint8).sort(stable=True).indices[:number]


def _rows(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends x [S, ...], split by `send`; returns the received rows, split by `receive`."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    received, sent = (t.contiguous().view(torch.uint8) if t.dtype != torch.int64 else t for t in (out, x))
    with watchdog.waiting("tokens for the experts", dist.get_process_group_ranks(group)):
        dist.all_to_all_single(received, sent, receive, send, group=group)
    return out


def exchanged(x: Tensor, route: Route) -> Tensor:
    """Sends rows [S, ...] and returns the rows received [R, ...]; no gradient."""
    return _rows(x, route.send, route.receive, route.group)


def send_rows(x_TD: Tensor, route: Route) -> Tensor:
    """Sends every token to the places that need it; returns [R, D]."""
    return _Send.apply(x_TD, route, False)


def grad_anchor(x_TD: Tensor, route: Route | None = None) -> Tensor:
    """A tensor without memory that stands in for the result of `send_rows`, or for x itself if there is no route."""
    return _Send.apply(x_TD, route, True)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, route: Route | None, empty: bool) -> Tensor:
        ctx.route = route
        if empty:
            return _empty(x_TD, len(x_TD) if route is None else sum(route.receive))
        assert route is not None, "only an anchor has no route"
        return exchanged(route.copies.of(x_TD), route)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD: Tensor):
        return dx_RD if ctx.route is None else _returned(dx_RD, ctx.route), None, None


def _returned(x_RD: Tensor, route: Route) -> Tensor:
    return route.copies.total(_rows(x_RD.contiguous(), route.receive, route.send, route.group))


def _empty(x_TD: Tensor, rows: int) -> Tensor:
    return x_TD.new_zeros(()).expand(rows, x_TD.shape[1])


def return_(y_RD: Tensor, route: Route) -> Tensor:
    """Sends results back to the tokens' ranks and sums the copies of each token: [T, D]."""
    return _Return.apply(y_RD, route)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _returned(y_RD, route)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD: Tensor):
        route: Route = ctx.route
        if route.recipe is None:
            return exchanged(route.copies.of(dy_TD), route), None
        sent = route.copies.of(packed(route.recipe.quantised_gradient(dy_TD, power_of_two=True)))
        return unpacked(exchanged(sent, route), dy_TD.shape[1]).dequantise().to(dy_TD.dtype), None


def packed(operand: Operand) -> Tensor:
    """Values and scales of each row as bytes, uint8 [T, D + 4 J]: 7,392 bytes per token of V3."""
    value, scale = operand.value_MK.contiguous(), operand.scale_MJ.contiguous()
    return torch.cat((value.view(torch.uint8), scale.view(torch.uint8)), 1)


def unpacked(payload: Tensor, columns: int) -> Operand:
    value, scale = payload.split([columns, payload.shape[1] - columns], 1)
    assert scale.shape[1] == 4 * -(-columns // TILE), "not a payload of this width"
    return Operand(value.contiguous().view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32))


class Hop(NamedTuple):
    """The places that tokens can be sent to in one hop: the ranks of a process group."""

    group: dist.ProcessGroup
    places: int
    own: int
    """This rank's index among them."""
    first: int
    """The first expert that this hop reaches."""
    width: int
    """Experts per place."""
    link: str
    """The name under which its bytes are counted."""


class _At(NamedTuple):
    """Tokens at one place of their route."""

    x_TD: Tensor
    """In FP8 a tensor without memory, for the gradient's path back."""
    expert_TK: Tensor
    """Their experts; -1 for experts at another place."""
    weight_TK: Tensor
    payload: Tensor | None
    """In FP8, values and scales: bytes [T, D + 4 J]."""


class AllToAll(Exchange):
    """Hops of `all_to_all_single` over gloo or NCCL; layers may share them."""

    def __init__(self, hops: Sequence[Hop], first: int, n_local: int, n_activated: int):
        super().__init__(tuple(sorted(hop.link for hop in hops)), n_local)
        self.hops, self.first, self.n_activated = tuple(hops), first, n_activated

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        if recipe is None:
            at = _At(x_ND, routing.expert_NK, routing.weight_NK, None)
        else:
            payload = packed(recipe.quantised(x_ND, power_of_two=True))
            at = _At(grad_anchor(x_ND), routing.expert_NK, routing.weight_NK, payload)
        routes, rows = [], 0
        for hop in self.hops:
            at, route, rows = self._hop(at, hop, recipe)
            routes.append(route)
        return self._sorted(at, rows, tuple(routes), recipe is not None and fp8_layers.fills(recipe, x_ND.device))

    def returned(self, y_RD: Tensor, back: object) -> Tensor:
        for route in reversed(cast(tuple[Route, ...], back)):
            y_RD = return_(y_RD, route)
        return y_RD

    def _hop(self, at: _At, hop: Hop, recipe: FP8Recipe | None) -> tuple[_At, Route, int]:
        """Sends tokens one hop on: (the tokens that arrived, their route, how many of their choices are there)."""
        place_TK = torch.div(at.expert_TK - hop.first, hop.width, rounding_mode="floor")
        place_TK = place_TK.masked_fill(at.expert_TK < 0, -1)
        at_PTK = place_TK == torch.arange(hop.places, device=place_TK.device)[:, None, None]
        goes_PT, T = at_PTK.any(2), len(at.x_TD)
        sent, received = counted(torch.stack((goes_PT.sum(1), at_PTK.sum((1, 2))), 1), hop.group)
        send, receive = [tokens for tokens, _ in sent], [tokens for tokens, _ in received]
        row = _where(goes_PT, sum(send))  # place by place, tokens in order
        to, token = row // T, row % T
        route = Route(Copies(token, T), send, receive, hop.group, recipe)
        width = at.x_TD.shape[1] * at.x_TD.element_size() if at.payload is None else at.payload.shape[1]
        self.sent_bytes[hop.link] += (len(token) - send[hop.own]) * width
        expert = torch.where(place_TK[token] == to[:, None], at.expert_TK[token], -1)
        arrived = _At(
            send_rows(at.x_TD, route) if at.payload is None else grad_anchor(at.x_TD, route),
            exchanged(expert, route),
            send_rows(at.weight_TK, route),
            None if at.payload is None else exchanged(route.copies.of(at.payload), route),
        )
        return arrived, route, sum(choices for _, choices in received)

    def _sorted(self, at: _At, rows: int, routes: tuple[Route, ...], filling: bool) -> Sent:
        """Repeats every token once for each of its experts on this rank."""
        place = _where(at.expert_TK >= 0, rows)
        expert, order = (at.expert_TK.flatten().index_select(0, place) - self.first).sort(stable=True)
        count_E = expert.new_zeros(self.n_local).scatter_add_(0, expert, torch.ones_like(expert))
        payload = at.payload

        def operand(token: Tensor) -> Operand:
            assert payload is not None, "of FP8 only"
            if not filling:
                return unpacked(payload[token], at.x_TD.shape[1])
            return of_rows(unpacked(payload, at.x_TD.shape[1]), token, filling)

        payload_rows = None if payload is None else operand
        return self.rows(at.x_TD, at.weight_TK, place[order], count_E, payload_rows, filling, routes)
