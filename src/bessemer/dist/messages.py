"""What stages send each other, in an order that both ends know beforehand, so that no message needs a name.

A table says what every rank sends to every other, and when. So `orders` has for each direction (from one rank to
another) the list of its messages, and the receiver takes them off the wire in that order, earlier than it needs them
where it needs them in another one. Each direction is a process group of its own, because NCCL runs what it gets for a
group one after the other: of two ranks that sent first in the same group, neither would ever receive.

Sends never wait. A rank waits only for a message that it needs, has then posted all that come before it, and those were
sent by work that comes before in the table; so what `table.check` accepts cannot hang.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.dist import watchdog
from bessemer.dist.table import Action, Table, actions

AHEAD = 1
"""Messages of a direction that are on their way before they are needed."""


def message(action: Action, stages: int) -> Action | None:
    """What becomes possible at another stage by a piece of work: F with its output, B with the gradient of its input.
    A message is named by that."""
    kind, stage, micro, lane = action
    if kind == "F":
        return Action("F", stage + 1, micro, lane) if stage < stages - 1 else None
    return Action("B", stage - 1, micro, lane) if kind in "BI" and stage else None


def orders(table: Table) -> dict[tuple[int, int], list[Action]]:
    """Messages from rank to rank in the order in which they are sent; of a pair, the forward's first."""
    found: dict[tuple[int, int], list[Action]] = {}
    for rank, steps in enumerate(table.steps):
        for action in actions(steps):
            if (sent := message(action, table.stages)) and (to := table.place[sent.lane][sent.stage]) != rank:
                found.setdefault((rank, to), []).append(sent)
    return found


def holders(table: Table) -> list[tuple[int, ...]]:
    """Sets of several ranks that hold a stage between them, or the first and the last (the embedding, with MTP)."""
    last = table.stages - 1
    stages = [{stage} for stage in range(table.stages)] + [{0, last}]
    ranks = [{lane[stage] for lane in table.place for stage in some} for some in stages]
    return sorted({tuple(sorted(some)) for some in ranks if len(some) > 1})


class Channels:
    """This rank's ends of all directions. `pipelines` are the ranks of every pipeline of the world, in the order of the
    table; all ranks of the world make this together.

    The first message of a direction makes the connection, and NCCL's ends wait for each other there. So it is sent
    here, in one order on all ranks.
    """

    def __init__(self, table: Table, pipelines: Sequence[Sequence[int]], device: torch.device):
        self.table, self._orders, world = table, orders(table), dist.get_rank()
        self.me = next(list(peers).index(world) for peers in pipelines if world in peers)
        self._to: dict[int, tuple[int, Any]] = {}
        self._from: dict[int, tuple[int, Any]] = {}
        self._together: dict[tuple[int, ...], Any] = {}
        for peers in pipelines:
            me = self.me if world in peers else None
            for source, target in sorted(self._orders):
                group, greeting = dist.new_group([peers[source], peers[target]]), torch.zeros(1, device=device)
                if me == source:
                    self._to[target] = peers[target], group
                    dist.send(greeting, peers[target], group)
                elif me == target:
                    self._from[source] = peers[source], group
                    dist.recv(greeting, peers[source], group)
            for ranks in holders(table):
                group = dist.new_group([peers[rank] for rank in ranks])
                if me in ranks:
                    self._together[ranks] = group
        self._coming: dict[int, deque[Action]] = {}
        self._arriving: dict[int, dict[Action, tuple[Any, Tensor]]] = {}
        self._sent: list[tuple[Any, Tensor]] = []
        self._here: dict[Action, Tensor] = {}

    def follow(self, table: Table) -> None:
        """Another number of micro-batches, between the same stages and ranks."""
        self.table, self._orders = table, orders(table)

    def begin(self, room: Callable[[Action], Tensor]) -> None:
        """A step; `room(message)` is an empty tensor for it."""
        self._room = room
        self._coming = {source: deque(self._orders.get((source, self.me), ())) for source in self._from}
        self._arriving = {source: {} for source in self._from}

    def send(self, action: Action, x: Tensor) -> None:
        """What a piece of work of this rank gives to another stage, if there is one; here or elsewhere."""
        sent = message(action, self.table.stages)
        if sent is None:
            return
        to = self.table.place[sent.lane][sent.stage]
        if to == self.me:
            self._here[sent] = x
            return
        peer, group = self._to[to]
        x = x.contiguous()
        self._sent = [(handle, kept) for handle, kept in self._sent if not handle.is_completed()]
        self._sent.append((dist.isend(x, peer, group), x))

    def receive(self, wanted: Action) -> Tensor:
        stage = wanted.stage + (-1 if wanted.kind == "F" else 1)
        source = self.table.place[wanted.lane][stage]
        if source == self.me:
            return self._here.pop(wanted)
        arriving = self._arriving[source]
        while wanted not in arriving:
            self._post(source)
        handle, x = arriving.pop(wanted)
        what = f"{'activations' if wanted.kind == 'F' else 'gradients'} of micro-batch {wanted.micro}"
        with watchdog.waiting(f"{what} for stage {wanted.stage}", [self._from[source][0]]):
            handle.wait()
        while self._coming[source] and len(arriving) < AHEAD:
            self._post(source)
        return x

    def _post(self, source: int) -> None:
        peer, group = self._from[source]
        coming = self._coming[source].popleft()
        x = self._room(coming)
        self._arriving[source][coming] = dist.irecv(x, peer, group), x

    def end(self) -> None:
        """Of a step: everything has been taken."""
        for handle, _ in self._sent:
            handle.wait()
        self._sent.clear()
        assert not self._here and not any(self._coming.values()) and not any(self._arriving.values()), "work undone"

    def sum_with(self, others: Sequence[int], x: Tensor) -> None:
        """x becomes the sum over this rank and the others, the same everywhere."""
        if others:
            group = self._together[tuple(sorted([self.me, *others]))]
            with watchdog.waiting("shared gradients", dist.get_process_group_ranks(group)):
                dist.all_reduce(x, group=group)
