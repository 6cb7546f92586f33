"""Runs a pipeline schedule: any table, on real ranks (V3 3.2.1). The reference: right for every table, not yet fast.

A rank goes down its list. It waits for what a piece of work needs from another rank and sends on what comes of it;
sends never wait, so a table that `table.check` accepts cannot hang.

    F    forward of a slice, whose graph is kept
    B    backward of it: the gradients of its parameters are added, that of its input is sent on
    I    the gradient of the input alone; the graph is kept
    W    the gradients of the parameters, from that graph (which goes through the chain of I once more)
    F&B  one after the other; with two streams they would overlap, with the same bits

A slice's balance term is differentiated where it arises. Only the order in which gradients are added depends on the
schedule, so every schedule gives the gradients of the whole network to float32's last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.model.transformer import TrainOutputs
from bessemer.parallel import signs
from bessemer.parallel.stage import Slice
from bessemer.parallel.table import Action, Table, actions

FORWARD, BACKWARD = 0, 1


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


class _Kept(NamedTuple):
    """A forward that waits for its backward."""

    x: Tensor
    y: Tensor
    loss: Tensor
    dy: Tensor | None = None
    """Arrived with an I, for its W."""


class Executor:
    """One rank of a pipeline: `slices[lane, stage]` for all that the table gives it, cut from one model; pipeline rank
    p is rank `peers[p]` of the world."""

    def __init__(
        self, table: Table, me: int, slices: dict[tuple[int, int], Slice], peers: Sequence[int],
        around_backward: Callable[[], AbstractContextManager] = nullcontext,
    ):  # fmt: skip
        if set(slices) != set(table.held(me)):
            raise ValueError(f"rank {me} of {table.name} holds {table.held(me)}, was given {sorted(slices)}")
        self.table, self.me, self.slices, self.peers, self.around_backward = table, me, slices, peers, around_backward
        self._stages = [{stage for _, stage in table.held(rank)} for rank in range(table.ranks)]
        self.losses: list[float] = []
        """Of the last run, what this rank's slices added to the loss."""
        self._kept: dict[Action, _Kept] = {}
        self._arrived: dict[tuple[int, Action], Tensor] = {}
        self._sends: list[tuple[Any, Tensor]] = []

    def run(self, work: Sequence[Sequence[Work]]) -> None:
        """One step: `work[lane][micro]`, equal on all ranks. Adds to the gradients of the parameters."""
        self.losses = []
        do = {"F": self._forward, "B": self._backward, "I": self._input, "W": self._weights}
        for action in actions(self.table.steps[self.me]):
            with nullcontext() if action.kind == "F" else self.around_backward():
                do[action.kind](action, work[action.lane][action.micro])
        for handle, _ in self._sends:
            handle.wait()
        self._sends.clear()
        assert not self._kept and not self._arrived, "the table leaves work undone"

    def sum_shared(self) -> None:
        """Adds up the gradients of parameters that two ranks hold: the copies of DualPipe, and the embedding where MTP
        modules need it at the end. Both get the same sum, in the order of the ranks."""
        mine = {name: p for one in self.slices.values() for name, p in one.named_parameters() if p.grad is not None}
        for name in sorted(mine):
            self.sum_with_others(name, mine[name].grad)

    def others(self, name: str) -> list[int]:
        """Pipeline ranks beside this one that hold the parameter of this name."""
        owners = next(iter(self.slices.values())).owners(name)
        return [rank for rank in range(self.table.ranks) if rank != self.me and self._stages[rank] & owners]

    def sum_with_others(self, name: str, x: Tensor) -> None:
        """x += what the other rank has in its place; `name` says who that is. All holders call it in the same order."""
        for other in self.others(name):
            theirs = torch.empty_like(x)
            handle = dist.isend(x.contiguous(), self.peers[other])
            dist.recv(theirs, self.peers[other])
            handle.wait()
            x.copy_(x + theirs if self.me < other else theirs + x)

    def _forward(self, action: Action, work: Work) -> None:
        part = self.slices[action.lane, action.stage]
        x = work.tokens_BT if part.first else self._receive(FORWARD, action, work).requires_grad_()
        y, balance = part(x, work.segments_BT)
        if part.last:
            out = part.outputs(y, balance, work.tokens_BT, work.segments_BT, work.mtp)
            loss = work.loss(out, part.head.weight)
        else:
            loss = work.balance_weight * balance
            self._send(FORWARD, action, y.detach(), action.stage + 1)
        self.losses.append(float(loss.detach()))
        self._kept[action._replace(kind="F")] = _Kept(x, y, loss)

    def _backward(self, action: Action, work: Work) -> None:
        kept = self._with_gradient(action, work)
        torch.autograd.backward(*_roots(kept))
        self._pass_on(action, kept.x.grad)

    def _input(self, action: Action, work: Work) -> None:
        kept = self._with_gradient(action, work)
        if not self.slices[action.lane, action.stage].first:
            roots, grads = _roots(kept)
            (dx,) = torch.autograd.grad(roots, [kept.x], grads, retain_graph=True)
            self._pass_on(action, dx)
        self._kept[action._replace(kind="F")] = kept

    def _weights(self, action: Action, work: Work) -> None:
        kept = self._kept.pop(action._replace(kind="F"))
        parameters = [p for p in self.slices[action.lane, action.stage].parameters() if p.requires_grad]
        torch.autograd.backward(*_roots(kept), inputs=parameters)

    def _with_gradient(self, action: Action, work: Work) -> _Kept:
        kept = self._kept.pop(action._replace(kind="F"))
        part = self.slices[action.lane, action.stage]
        return kept if part.last else kept._replace(dy=self._receive(BACKWARD, action, work))

    def _pass_on(self, action: Action, dx: Tensor | None) -> None:
        if not self.slices[action.lane, action.stage].first:
            self._send(BACKWARD, action, dx, action.stage - 1)

    def _send(self, way: int, action: Action, x: Tensor, stage: int) -> None:
        to = self.table.place[action.lane][stage]
        key = Action("F", stage, action.micro, action.lane)
        if to == self.me:
            self._arrived[way, key] = x
            return
        x = x.contiguous()
        handle = dist.isend(x, self.peers[to], tag=self._tag(way, key))
        self._sends = [(h, t) for h, t in self._sends if not h.is_completed()] + [(handle, x)]

    def _receive(self, way: int, action: Action, work: Work) -> Tensor:
        part = self.slices[action.lane, action.stage]
        key = Action("F", action.stage, action.micro, action.lane)
        origin = self.table.place[action.lane][action.stage + (-1 if way == FORWARD else 1)]
        if origin == self.me:
            return self._arrived.pop((way, key))
        weight = next(part.parameters())
        x = torch.empty(*work.tokens_BT.shape, part.width, dtype=part.dtype, device=weight.device)
        what = (
            f"{'activations' if way == FORWARD else 'gradients'} of micro-batch {action.micro} at stage {action.stage}"
        )
        with signs.waiting(what, [self.peers[origin]]):
            dist.recv(x, self.peers[origin], tag=self._tag(way, key))
        return x

    def _tag(self, way: int, key: Action) -> int:
        """One number for each message of a step: several may be on their way between two ranks."""
        return ((way * self.table.lanes + key.lane) * self.table.stages + key.stage) * self.table.per_lane + key.micro


def _roots(kept: _Kept) -> tuple[list[Tensor], list[Tensor]]:
    """What is differentiated, and with which gradients."""
    roots, grads = ([], []) if kept.dy is None else ([kept.y], [kept.dy])
    if kept.loss.requires_grad:  # a slice of dense layers adds nothing to the loss
        roots.append(kept.loss)
        grads.append(torch.ones_like(kept.loss))
    return roots, grads
