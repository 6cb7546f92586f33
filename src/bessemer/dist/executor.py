"""Runs a pipeline schedule: any table, on real ranks (V3 3.2.1; reference E.4).

A rank goes down its list. It waits for what a piece of work needs from another rank and sends on what comes of it;
sends never wait (`messages`), so a table that `table.check` accepts cannot hang.

    F    forward of a slice, phase by phase, whose graphs are kept (`chunk`)
    B    backward of it: the gradients of its parameters are added, that of its input is sent on
    I    the same without the gradients of matrices, which are left in a store (`model.deferred`); the graphs are gone
    W    what the I left
    F&B  forward of one micro-batch and backward of another by turns, the exchanges of each beside the computation of
         the other (`streams`)

A slice's balance term is differentiated where it arises. Only the order in which gradients are added depends on the
schedule, so every schedule gives the gradients of the whole network to float32's last digits; and a pair has the bits
of its F and then its B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.model.deferred import Store
from bessemer.model.transformer import TrainOutputs
from bessemer.dist.chunk import Chunk
from bessemer.dist.messages import Channels
from bessemer.dist.stage import Phases, Slice, holding
from bessemer.dist.streams import Beside, Serial
from bessemer.dist.table import Action, Pair, Table


class Work(NamedTuple):
    """What a micro-batch is to every stage."""

    tokens_BT: Tensor
    segments_BT: Tensor | None
    loss: Callable[[TrainOutputs, Tensor], Tensor]
    """(outputs of the last stage, head weight) -> what is differentiated there, that slice's balance term included."""
    balance_weight: Tensor
    """Of the balance terms of the other slices."""
    mtp: bool = True
    """Whether the MTP modules run."""


class Executor:
    """One rank of a pipeline: `slices[lane, stage]` for all that the table gives it, cut from one model. `pipelines`
    are the ranks of every pipeline of the world; all ranks make their executors together. `around_backward` is entered
    for every piece of backward computation."""

    def __init__(
        self, table: Table, me: int, slices: dict[tuple[int, int], Slice], pipelines: Sequence[Sequence[int]],
        around_backward: Callable[[], AbstractContextManager] = nullcontext, streams: Serial | None = None,
    ):  # fmt: skip
        if set(slices) != set(table.held(me)):
            raise ValueError(f"rank {me} of {table.name} holds {table.held(me)}, was given {sorted(slices)}")
        self.table, self.me, self.slices, self.around_backward = table, me, slices, around_backward
        self._device = next(next(iter(slices.values())).parameters()).device
        self.channels, self.store = Channels(table, pipelines, self._device), Store()
        for part in slices.values():
            self.store.serve(part)
        self._streams = streams or (Beside(self._device) if self._device.type == "cuda" else Serial())
        self._holders = table.holders()
        self.losses: list[float] = []
        """Of the last run, what this rank's slices added to the loss."""
        self._chunks: dict[Action, tuple[Chunk, Tensor]] = {}

    def follow(self, table: Table) -> None:
        """Another number of micro-batches for the same slices, from the next step on."""
        self.table = table
        self.channels.follow(table)

    def run(self, work: Sequence[Sequence[Work]]) -> None:
        """One step: `work[lane][micro]`, equal on all ranks. Adds to the gradients of the parameters."""
        self._work = work
        self._losses: list[Tensor] = []
        self.channels.begin(self._room)
        for step in self.table.steps[self.me]:
            self._do(step)
        self.channels.end()
        self.losses = torch.stack(self._losses).tolist()
        assert not self._chunks and not len(self.store), "the table leaves work undone"

    def sum_shared(self) -> None:
        """Adds up the gradients of parameters that several ranks hold: the copies of DualPipe, and the embedding where
        MTP modules need it at the end. All get the same sum."""
        mine = {name: p for one in self.slices.values() for name, p in one.named_parameters() if p.grad is not None}
        for name in sorted(mine):
            self.sum_with_others(name, mine[name].grad)

    def others(self, name: str) -> list[int]:
        """Pipeline ranks beside this one that hold the parameter of this name."""
        return [rank for rank in holding(name, self.slices, self._holders) if rank != self.me]

    def sum_with_others(self, name: str, x: Tensor) -> None:
        """x += what the other ranks have in its place; `name` says who they are. All of them call in the same order."""
        self.channels.sum_with(self.others(name), x)

    def _do(self, step: Action | Pair) -> None:
        if isinstance(step, Pair):
            self._overlapped(step)
        elif step.kind == "F":
            list(self._forward(step))
            self._pass_on(step)
        elif step.kind == "W":
            self.store.run(_of(step))
        else:
            list(self._backward(step, later=step.kind == "I"))
            self._pass_on(step)

    def _overlapped(self, pair: Pair) -> None:
        """The slots of E.4, two a round, for as many layers as either has: an exchange beside what is computed."""
        forward, backward = self._forward(pair.forward), self._backward(pair.backward, later=True)
        key, running = _of(pair.backward), True
        next(backward, None)  # what follows the last exchange of a slice
        while running:
            # 1: combine B beside attention W of the layer before and attention F; 3: dispatch B beside MLP W and MLP F
            if running := _go(backward):
                self.store.run(key)
            running |= _go(forward)
            # 2: dispatch F beside MLP B; 4: combine F beside attention B
            running |= _go(forward)
            running |= _go(backward)
        self._pass_on(pair.forward)
        self._pass_on(pair.backward)
        self.store.run(key)

    def _forward(self, action: Action) -> Iterator[None]:
        part, work = self._at(action)
        x = work.tokens_BT if part.first else self.channels.receive(action).requires_grad_()
        chunk = Chunk(_phases(part, x, work), self._streams)
        self._chunks[_of(action)] = chunk, x
        yield from chunk.forward()

    def _backward(self, action: Action, later: bool) -> Iterator[None]:
        part, key = self._at(action)[0], _of(action)
        dy = None if part.last else self.channels.receive(action._replace(kind="B"))
        yield from self._chunks[key][0].backward(dy, lambda: self._computing(key, later))

    def _pass_on(self, action: Action) -> None:
        """What another stage waits for."""
        if action.kind == "F":
            chunk, _ = self._chunks[_of(action)]
            self._losses.append(chunk.loss)
            x, chunk.sent = chunk.sent, None
        else:
            x = self._chunks.pop(_of(action))[1].grad
        self.channels.send(action, x)

    @contextmanager
    def _computing(self, key: Action, later: bool) -> Iterator[None]:
        with self.around_backward(), self.store.open(key) if later else nullcontext():
            yield

    def _at(self, action: Action) -> tuple[Slice, Work]:
        return self.slices[action.lane, action.stage], self._work[action.lane][action.micro]

    def _room(self, action: Action) -> Tensor:
        part, work = self._at(action)
        return part.room(work.tokens_BT)


def _phases(part: Slice, x: Tensor, work: Work) -> Phases:
    """Of the slice, and of the loss that it adds."""
    out = yield from part.phases(x, work.tokens_BT, work.segments_BT, work.mtp)
    if part.last:
        return None, work.loss(out, part.head.weight)
    return out[0], work.balance_weight * out[1]


def _of(action: Action) -> Action:
    """The forward that a piece of work belongs to."""
    return action._replace(kind="F")


def _go(phases: Iterator[None]) -> bool:
    """One phase on; whether there are more."""
    return next(phases, phases) is None
