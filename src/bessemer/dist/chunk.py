"""A micro-batch at a stage, phase by phase: forward, and later backward in the same pieces (V3 3.2.1, Fig. 4).

What a phase gives to later ones is cut off from its graph, so that the graph of every phase can be differentiated by
itself: from the gradients of what it gave to those of what it was given. The bits are those of one graph; the data of
what was given away are not kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from bessemer.dist.stage import Handed, Phases
from bessemer.dist.streams import Serial


class _Slot:
    """Where the graph of a phase ends, and the gradient that arrives there from later phases."""

    def __init__(self, x: Tensor):
        self.edge = get_gradient_edge(x)
        self.gradient: Tensor | None = None


class Chunk:
    """`phases` returns (what is sent on, or None; the loss)."""

    def __init__(self, phases: Phases, streams: Serial):
        self._phases, self._streams = phases, streams
        self._handed: Handed | None = None
        self._cuts: list[list[_Slot]] = []
        """Of every phase that was run."""
        self._after: Any = None
        self._needed = torch.zeros((), requires_grad=True)
        self._ends: tuple[_Slot | None, _Slot | None] = None, None
        self.sent: Tensor | None = None
        self.loss: Tensor | None = None

    def forward(self) -> Iterator[None]:
        """Stops after every phase, except the last."""
        exchange = False
        while self._phases is not None:
            self._after = self._streams.run(exchange, partial(self._next, exchange), self._after)
            exchange = not exchange
            if self._phases is not None:
                yield

    def backward(self, dy: Tensor | None, around: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """The same backwards; `dy` is the gradient of what was sent. Computation runs in `around()`."""
        (sent, loss), self._ends = self._ends, (None, None)
        if sent is not None:
            sent.gradient = dy
        if loss is not None:
            loss.gradient = torch.ones_like(self.loss)
        while self._cuts:
            exchange = len(self._cuts) % 2 == 0
            phase = partial(_differentiate, self._cuts.pop())
            with nullcontext() if exchange else around():
                self._after = self._streams.run(exchange, phase, self._after)
            if self._cuts:
                yield

    def _next(self, exchange: bool) -> None:
        slots: list[_Slot] = []
        try:
            handed = self._phases.send(self._handed)
        except StopIteration as end:
            self._end(*end.value)
        else:
            with self._streams.on(not exchange):
                on = tree_map(partial(self._cut, slots), handed.on)
            with self._streams.on(exchange):
                kept = tree_map(partial(self._cut, slots), handed.kept)
            self._handed = Handed(on, kept)
            self._cuts.append(slots)

    def _end(self, sent: Tensor | None, loss: Tensor) -> None:
        ends = [_Slot(x) if x is not None and x.requires_grad else None for x in (sent, loss)]
        self._ends = ends[0], ends[1]
        self._cuts.append([slot for slot in ends if slot is not None])
        self.sent, self.loss = None if sent is None else sent.detach(), loss.detach()
        self._phases = self._handed = None

    def _cut(self, slots: list[_Slot], x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        self._streams.share(x)
        if not x.requires_grad:
            return x
        slots.append(_Slot(x))
        return _Border.apply(x.detach(), self._needed, slots[-1], self._streams)


def _differentiate(slots: list[_Slot]) -> None:
    reached = [slot for slot in slots if slot.gradient is not None]
    if reached:
        torch.autograd.backward([slot.edge for slot in reached], [slot.gradient for slot in reached])


class _Border(torch.autograd.Function):
    """x, whose gradient goes into a slot and no further. `needed` makes autograd come here at all."""

    @staticmethod
    def forward(ctx, x: Tensor, needed: Tensor, slot: _Slot, streams: Serial) -> Tensor:
        ctx.slot, ctx.streams = slot, streams
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[None, None, None, None]:
        ctx.streams.share(dx)
        ctx.slot.gradient = dx
        return None, None, None, None
