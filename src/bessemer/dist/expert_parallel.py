"""Tokens to their experts and back, where a layer's experts live on several ranks (V3 3.2.2; reference E.3, D.6).

Rank r of an expert-parallel group of n holds experts r E/n to (r+1) E/n - 1. `dispatch` gives it all rows for its
experts in expert order, as `moe.dispatch` does on one device; `combine` brings the results back and sums them.

A token makes one hop or two. In a hop it travels once to every place that needs it, however many experts it has there:

    one hop     to the ranks of its experts
    two hops    to the nodes of its experts, to the rank there whose number in its node is the sender's own; from there
                to the ranks of that node. On the route back every hop sums what it holds of a token before it sends

With node-limited routing a token goes to at most `n_limited_groups` nodes, so the slow links carry that many copies of
it and not K. Nothing is dropped or padded; a rank may send or receive nothing. `PlainExchange`, the reference, sends a
token once for every expert.

In FP8 training rows go to the experts in FP8 with powers of two, forward and, as gradients, backward; all that comes
back is in the compute dtype (D.6).

Shapes: T tokens at some place of their route, M rows of own experts, D hidden, K experts per token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bessemer.model import fp8, moe
from bessemer.dist import all_to_all
from bessemer.dist.all_to_all import Route
from bessemer.precision.fp8_linear import FP8Recipe
from bessemer.precision.operand import Operand


@dataclass(frozen=True)
class Hop:
    """Places that tokens can go to at once: the ranks of a process group."""

    group: Any
    places: int
    own: int
    """This rank's number among them."""
    first: int
    """The first expert that can be reached."""
    width: int
    """Experts of one place."""
    link: str
    """What its bytes are counted under."""


class Sent(NamedTuple):
    """What `Experts` computes with, and the route back."""

    rows_MD: Tensor
    weight_M: Tensor
    count_E: Tensor
    """Rows of each of this rank's experts."""
    token_M: Tensor
    """Which of the tokens that arrived each row is."""
    operand: Operand | None
    routes: tuple[Route, ...]


class _At(NamedTuple):
    """Tokens at one place of their route."""

    x_TD: Tensor
    """In FP8 without memory, to lead the gradient back."""
    expert_TK: Tensor
    """Their experts; -1 for those that are elsewhere."""
    weight_TK: Tensor
    payload: Tensor | None
    """In FP8, values and factors: bytes [T, D + 4 J]."""


@dataclass
class Exchange:
    """The exchange of one rank; layers may share it."""

    hops: tuple[Hop, ...]
    first: int
    """This rank's first expert."""
    n_local: int
    """Its experts."""
    n_activated: int
    """Experts of a token."""
    sent_bytes: Counter = field(default_factory=Counter)
    """Rows sent forward to other ranks, by link."""

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        """All rows for this rank's experts, in expert order; with a recipe in FP8."""
        if recipe is None:
            at = _At(x_ND, routing.expert_NK, routing.weight_NK, None)
        else:
            payload = all_to_all.packed(recipe.quantised(x_ND, power_of_two=True))
            at = _At(all_to_all.grad_anchor(x_ND), routing.expert_NK, routing.weight_NK, payload)
        routes = []
        for hop in self.hops:
            at, route = self._hop(at, hop, recipe)
            routes.append(route)
        return self._sorted(at, tuple(routes))

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        """The sum over all of its experts for every own token, [N, D]."""
        y = all_to_all.summed(y_MD, sent.token_M, sum(sent.routes[-1].receive))
        for route in reversed(sent.routes):
            y = all_to_all.return_(y, route)
        return y

    def _hop(self, at: _At, hop: Hop, recipe: FP8Recipe | None) -> tuple[_At, Route]:
        place_TK = torch.div(at.expert_TK - hop.first, hop.width, rounding_mode="floor")
        place_TK = place_TK.masked_fill(at.expert_TK < 0, -1)
        goes_PT = torch.stack([(place_TK == place).any(1) for place in range(hop.places)])
        to, token = goes_PT.nonzero(as_tuple=True)  # place by place, tokens in order
        send = goes_PT.sum(1).tolist()
        route = Route(token, send, all_to_all.received(send, hop.group, token.device), len(at.x_TD), hop.group, recipe)
        row = at.x_TD.shape[1] * at.x_TD.element_size() if at.payload is None else at.payload.shape[1]
        self.sent_bytes[hop.link] += (len(token) - send[hop.own]) * row
        expert = torch.where(place_TK[token] == to[:, None], at.expert_TK[token], -1)
        return _At(
            all_to_all.send(at.x_TD, route) if at.payload is None else all_to_all.grad_anchor(at.x_TD, route),
            all_to_all.moved(expert, route),
            all_to_all.send(at.weight_TK, route),
            None if at.payload is None else all_to_all.moved(at.payload[token], route),
        ), route

    def _sorted(self, at: _At, routes: tuple[Route, ...]) -> Sent:
        """Every token once for each of its experts here."""
        K = at.expert_TK.shape[1]
        place = (at.expert_TK >= 0).flatten().nonzero().squeeze(1)
        expert, order = (at.expert_TK.flatten()[place] - self.first).sort(stable=True)
        place = place[order]
        token, count_E = place // K, torch.bincount(expert, minlength=self.n_local)
        weight_M = at.weight_TK.flatten().index_select(0, place)
        if at.payload is None:
            return Sent(at.x_TD.index_select(0, token), weight_M, count_E, token, None, routes)
        operand = all_to_all.unpacked(at.payload[token], at.x_TD.shape[1])
        return Sent(fp8.lead(at.x_TD, token), weight_M, count_E, token, operand, routes)


class PlainExchange(Exchange):
    """One all-to-all as anyone would write it: a row for every token and expert, summed at home."""

    def dispatch(self, x_ND: Tensor, routing: moe.Routing, recipe: FP8Recipe | None = None) -> Sent:
        each = moe.Routing(routing.expert_NK.reshape(-1, 1), routing.weight_NK.reshape(-1, 1), routing.balance)
        return super().dispatch(x_ND.repeat_interleave(routing.expert_NK.shape[1], 0), each, recipe)

    def combine(self, y_MD: Tensor, sent: Sent) -> Tensor:
        y = super().combine(y_MD, sent)
        return y.unflatten(0, (-1, self.n_activated)).sum(1)
