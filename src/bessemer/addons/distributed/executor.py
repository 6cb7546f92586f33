"""Runs a pipeline schedule: any table, on real ranks (V3 3.2.1).

A rank works down its list. It waits for what a step needs from another rank and sends the result on; sends never wait,
so a table that `table.check` accepts cannot hang.

    F    forward of a slice, phase by phase, keeping the graph of every phase (`chunk`)
    B    backward: adds to the gradients of the slice's parameters and sends on the gradient of its input
    I    B without the gradients of matrices, which are deferred to a store (`kernels.deferred`); frees the graphs
    W    the gradients that an I deferred
    F&B  forward of one micro-batch and backward of another, alternating; the exchanges of each run alongside the
         computation of the other (`chunk.Overlapped`)

A slice's balance term is differentiated where it arises. Only the order in which gradients are added depends on the
schedule, so every schedule gives the gradients of the whole network up to the last digits of float32; a pair is
bit-identical to its F followed by its B.

`Channels` passes the messages between stages in an order that both ends know in advance, so no message needs a tag: a
table says what every rank sends to every other, and when. `orders` lists the messages of each direction (from one rank
to another). The receiver takes them in that order, some earlier than it needs them if it needs them in another order.
Each direction has its own process group, because NCCL runs the operations of a group one after the other: two ranks
that both sent first in the same group would never receive. A rank waits only for a message that it needs. By then it
has posted the receives of all messages before it, and earlier steps of the table have sent those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.addons.accelerate.kernels.deferred import Store
from bessemer.addons.distributed import process_groups, watchdog
from bessemer.addons.distributed.chunk import Chunk, Overlapped, Serial
from bessemer.addons.distributed.completion import Completed, CompleteGradients, alike
from bessemer.addons.distributed.model_slice import Phases, Slice, holding
from bessemer.addons.distributed.process_groups import GroupSpec
from bessemer.addons.distributed.table import Action, Pair, Table, actions
from bessemer.model.segments import Segments
from bessemer.model.transformer import TrainOutputs

AHEAD = 1
"""How many receives per direction are posted before they are needed; none in the first step."""


class Work(NamedTuple):
    """One micro-batch, as every stage needs it."""

    tokens_BT: Tensor
    segments: Segments
    loss: Callable[[TrainOutputs, Tensor], Tensor]
    """(outputs of the last stage, head weight) -> the loss of the last stage, its balance term included."""
    balance_weight: Tensor
    """Weight of the balance terms of the other slices."""
    mtp: bool = True
    """Whether the MTP modules run."""
    filler: bool = False
    """Whether the expert loads leave out its tokens (`Batch.filler`)."""
    choice_BTLK: Tensor | None = None
    """The experts of every token in all sparse layers, as in `Transformer.train_outputs`; a stage takes its own."""
    counted_BT: Tensor | None = None
    """Which tokens count in the expert loads; None: all."""


class Executor:
    """One rank of a pipeline, with `slices[lane, stage]` for every stage that the table places on it, all of one model.
    `pipelines` lists the ranks of every pipeline in the world; creating an executor is collective over all ranks.
    `uncounted` is entered around all computation whose tokens no gate may count: backward, which may recompute, and
    everything of a filler."""

    def __init__(
        self, table: Table, me: int, slices: dict[tuple[int, int], Slice], pipelines: Sequence[Sequence[int]],
        uncounted: Callable[[], AbstractContextManager] = nullcontext, streams: Serial | None = None,
    ):  # fmt: skip
        if set(slices) != set(table.slices_on(me)):
            raise ValueError(f"rank {me} of {table.name} holds {table.slices_on(me)}, was given {sorted(slices)}")
        self.table, self.me, self.slices, self.uncounted = table, me, slices, uncounted
        self._device = next(next(iter(slices.values())).parameters()).device
        self.channels, self.store = Channels(table, pipelines, self._device), Store()
        if table.ranks > 1 or defers(table):  # modules that a store serves cannot be compiled
            for part in slices.values():
                self.store.serve(part)
        self._streams = streams or (Overlapped(self._device) if self._device.type == "cuda" else Serial())
        self._holders = table.holders()
        self.losses: list[float] = []
        """The loss terms of this rank's slices in the last run."""
        self._chunks: dict[Action, tuple[Chunk, Tensor]] = {}

    def set_table(self, table: Table) -> None:
        """Changes the number of micro-batches, for the same slices, from the next step on."""
        self.table = table
        self.channels.set_table(table)

    def run(self, work: Sequence[Sequence[Work]], completed: Completed | None = None) -> None:
        """Runs one step on `work[lane][micro]`, the same on all ranks of the pipeline, and adds to the parameters'
        gradients. Parameters are passed to `completed` as soon as this rank adds nothing more to their gradients, in
        the same order on all ranks of a stage."""
        self._work = work
        self._losses: list[Tensor] = []
        self.channels.begin(self._room)
        completion = None if completed is None else CompleteGradients(self.slices, self.table.steps[self.me], completed)
        for number, step in enumerate(self.table.steps[self.me]):
            with nullcontext() if completion is None else completion.at(number):
                self._do(step)
        self.channels.end()
        self.losses = torch.stack(self._losses).tolist()
        assert not self._chunks and not len(self.store), "the table leaves work undone"

    def warm(self, work: Work) -> None:
        """Runs every slice forward and backward as for `work`, but on noise and without messages. Gradients are zero
        or None afterwards, as before.

        What a GPU does for the first time (tuning and loading kernels, allocating memory) waits for everything queued
        on it, including messages under way, and the rank that is to receive those may be waiting in the same way.
        Collective over the ranks of an exchange."""
        draw = torch.Generator(self._device).manual_seed(0)
        parameters = [parameter for part in self.slices.values() for parameter in part.parameters()]
        without = [parameter for parameter in parameters if parameter.grad is None]
        for later in (False, True):
            for (lane, stage), part in sorted(self.slices.items()):
                x, key = work.tokens_BT, Action("F", stage, 0, lane)
                if not part.first:  # noise, because zeros would all go to the same experts
                    x = part.room(x).normal_(generator=draw).requires_grad_()
                chunk = Chunk(_phases(part, x, work), self._streams)
                list(chunk.forward(self.uncounted))
                dy = None if chunk.sent is None else torch.zeros_like(chunk.sent)
                list(chunk.backward(dy, partial(self._computing, key, later)))
                self.store.run(key)
        for parameter in without:
            parameter.grad = None
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def sum_shared(self) -> None:
        """Sums the gradients of parameters that several pipeline ranks hold (the two copies of DualPipe, and the
        embedding if MTP modules on the last stage need it). All of them get the same sum. The reference for
        `Zero1.sum_shared`, which sums whole buckets."""
        parameters = [pair for part in self.slices.values() for pair in part.named_parameters()]
        gradients = {name: p.grad for name, p in parameters if p.grad is not None}
        for name in sorted(gradients):
            self.sum_with_others(name, gradients[name])

    def others(self, name: str) -> list[int]:
        """Other pipeline ranks that hold the parameter of this name."""
        return [rank for rank in holding(name, self.slices, self._holders) if rank != self.me]

    def sum_with_others(self, name: str, x: Tensor) -> None:
        """Sums x in place over the ranks that hold the parameter `name`. All of them call it in the same order."""
        if others := self.others(name):
            self.channels.begin_sum(others, x)()

    def begin_sum(self, name: str, x: Tensor) -> Callable[[], None]:
        """Starts the sum of `sum_with_others` and returns a function that waits for it."""
        return self.channels.begin_sum(self.others(name), x)

    @property
    def mirrored(self) -> bool:
        """Whether only one other rank holds parameters of this one, and both complete them in the same steps, so that
        their sums can start during a step."""
        others = {rank for ranks in sharing_ranks(self.table) if self.me in ranks for rank in ranks} - {self.me}
        steps = self.table.steps
        return len(others) == 1 and alike(steps[self.me], steps[others.pop()])

    def _do(self, step: Action | Pair) -> None:
        if isinstance(step, Pair):
            self._overlapped(step)
        elif step.kind == "F":
            list(self._forward(step))
            self._send_on(step)
        elif step.kind == "W":
            self.store.run(_of(step))
        else:
            list(self._backward(step, later=step.kind == "I"))
            self._send_on(step)

    def _overlapped(self, pair: Pair) -> None:
        """Runs the slots of V3 Fig. 4, two per round, until neither has layers left: exchanges next to computation."""
        forward, backward = self._forward(pair.forward), self._backward(pair.backward, later=True)
        key, running = _of(pair.backward), True
        next(backward, None)  # the phase after the last exchange of a slice
        while running:
            # 1: combine B next to attention W of the layer before and attention F
            # 3: dispatch B next to MLP W and MLP F
            if running := _advance(backward):
                self.store.run(key)
            running |= _advance(forward)
            # 2: dispatch F next to MLP B; 4: combine F next to attention B
            running |= _advance(forward)
            running |= _advance(backward)
        self._send_on(pair.forward)
        self._send_on(pair.backward)
        self.store.run(key)

    def _forward(self, action: Action) -> Iterator[None]:
        part, work = self._at(action)
        x = work.tokens_BT if part.first else self.channels.receive(action).requires_grad_()
        chunk = Chunk(_phases(part, x, work), self._streams)
        self._chunks[_of(action)] = chunk, x
        yield from chunk.forward(self.uncounted if work.filler else nullcontext)

    def _backward(self, action: Action, later: bool) -> Iterator[None]:
        part, key = self._at(action)[0], _of(action)
        dy = None if part.last else self.channels.receive(action._replace(kind="B"))
        yield from self._chunks[key][0].backward(dy, lambda: self._computing(key, later))

    def _send_on(self, action: Action) -> None:
        """Sends the output of an F, or the input gradient of a B or I, to the stage that needs it."""
        if action.kind == "F":
            chunk, _ = self._chunks[_of(action)]
            self._losses.append(chunk.loss)
            x, chunk.sent = chunk.sent, None
        else:
            x = self._chunks.pop(_of(action))[1].grad
        self.channels.send(action, x)

    @contextmanager
    def _computing(self, key: Action, later: bool) -> Iterator[None]:
        with self.uncounted(), self.store.open(key) if later else nullcontext():
            yield

    def _at(self, action: Action) -> tuple[Slice, Work]:
        return self.slices[action.lane, action.stage], self._work[action.lane][action.micro]

    def _room(self, action: Action) -> Tensor:
        part, work = self._at(action)
        return part.room(work.tokens_BT)


def _phases(part: Slice, x: Tensor, work: Work) -> Phases:
    """The phases of a slice; ends with (output to send on or None, loss term)."""
    out = yield from part.phases(x, work.tokens_BT, work.segments, work.mtp, work.choice_BTLK, work.counted_BT)
    if isinstance(out, TrainOutputs):
        assert part.head is not None, "the last stage has the head"
        return None, work.loss(out, part.head.weight)
    return out[0], work.balance_weight * out[1]


def _of(action: Action) -> Action:
    """The forward that an action belongs to."""
    return action._replace(kind="F")


def _advance(phases: Iterator[None]) -> bool:
    """Runs one phase and returns whether there are more."""
    return next(phases, phases) is None


def message(action: Action, stages: int) -> Action | None:
    """The action at another stage that needs the result of this one: F its output, B the gradient of its input; None if
    there is none. That action identifies the message."""
    kind, stage, micro, lane = action
    if kind == "F":
        return Action("F", stage + 1, micro, lane) if stage < stages - 1 else None
    return Action("B", stage - 1, micro, lane) if kind in "BI" and stage else None


def orders(table: Table) -> dict[tuple[int, int], list[Action]]:
    """The messages of each direction, (sender, receiver), in sending order; of a pair, the forward's first."""
    messages: dict[tuple[int, int], list[Action]] = {}
    for rank, steps in enumerate(table.steps):
        for action in actions(steps):
            if (sent := message(action, table.stages)) and (to := table.place[sent.lane][sent.stage]) != rank:
                messages.setdefault((rank, to), []).append(sent)
    return messages


def defers(table: Table) -> bool:
    """Whether any backward of the table defers its gradients of matrices."""
    return any(isinstance(step, Pair) or step.kind in "IW" for steps in table.steps for step in steps)


def sharing_ranks(table: Table) -> list[tuple[int, ...]]:
    """Sets of ranks that share parameters: copies of a stage, or the first and the last (the embedding, with MTP)."""
    last = table.stages - 1
    stages = [{stage} for stage in range(table.stages)] + [{0, last}]
    ranks = [{lane[stage] for lane in table.place for stage in some} for some in stages]
    return sorted({tuple(sorted(some)) for some in ranks if len(some) > 1})


def needed_groups(table: Table, pipelines: Sequence[Sequence[int]]) -> Iterator[GroupSpec]:
    """The groups of all pipelines in the world, for directions and equal parameters, in an order all ranks share."""
    routes, shared = sorted(orders(table)), sharing_ranks(table)
    for peers in pipelines:
        yield from (GroupSpec("messages", (peers[source], peers[target])) for source, target in routes)
        yield from (GroupSpec("sums", tuple(sorted(peers[rank] for rank in ranks))) for ranks in shared)


class Channels:
    """This rank's ends of all directions. `pipelines` lists the ranks of every pipeline in the world, in the order of
    the table. Creating it is collective over all ranks of the world."""

    def __init__(self, table: Table, pipelines: Sequence[Sequence[int]], device: torch.device):
        self.table, self._orders, world = table, orders(table), dist.get_rank()
        process_groups.make(needed_groups(table, pipelines), device)
        peers = next(list(peers) for peers in pipelines if world in peers)
        self.me = peers.index(world)
        self._to: dict[int, tuple[int, Any]] = {}
        self._from: dict[int, tuple[int, Any]] = {}
        for source, target in self._orders:
            if self.me == source:
                self._to[target] = peers[target], process_groups.get("messages", (world, peers[target]))
            elif self.me == target:
                self._from[source] = peers[source], process_groups.get("messages", (peers[source], world))
        self._shared = {
            ranks: process_groups.get("sums", sorted(peers[rank] for rank in ranks))
            for ranks in sharing_ranks(table)
            if self.me in ranks
        }
        self._expected: dict[int, deque[Action]] = {}
        self._arriving: dict[int, dict[Action, tuple[Any, Tensor]]] = {}
        self._sent: list[tuple[Any, Tensor]] = []
        self._local: dict[Action, Tensor] = {}
        self._begun = False

    def set_table(self, table: Table) -> None:
        """Changes the number of micro-batches, between the same stages and ranks."""
        self.table, self._orders = table, orders(table)

    def begin(self, room: Callable[[Action], Tensor]) -> None:
        """Starts a step; `room(message)` returns an empty tensor to receive that message."""
        self._room = room
        self._ahead, self._begun = AHEAD if self._begun else 0, True
        self._expected = {source: deque(self._orders.get((source, self.me), ())) for source in self._from}
        self._arriving = {source: {} for source in self._from}

    def send(self, action: Action, x: Tensor | None) -> None:
        """Passes the result of an action to the stage that needs it, if any, on this rank or another."""
        sent = message(action, self.table.stages)
        if sent is None:
            return
        assert x is not None, f"{action} has no result"
        to = self.table.place[sent.lane][sent.stage]
        if to == self.me:
            self._local[sent] = x
            return
        peer, group = self._to[to]
        x = x.contiguous()
        self._sent = [(handle, tensor) for handle, tensor in self._sent if not handle.is_completed()]
        self._sent.append((dist.isend(x, peer, group), x))

    def receive(self, needed: Action) -> Tensor:
        stage = needed.stage + (-1 if needed.kind == "F" else 1)
        source = self.table.place[needed.lane][stage]
        if source == self.me:
            return self._local.pop(needed)
        arriving = self._arriving[source]
        while needed not in arriving:
            self._post(source)
        handle, x = arriving.pop(needed)
        content = f"{'activations' if needed.kind == 'F' else 'gradients'} of micro-batch {needed.micro}"
        with watchdog.waiting(f"{content} for stage {needed.stage}", [self._from[source][0]]):
            handle.wait()
        while self._expected[source] and len(arriving) < self._ahead:
            self._post(source)
        return x

    def _post(self, source: int) -> None:
        peer, group = self._from[source]
        message = self._expected[source].popleft()
        x = self._room(message)
        self._arriving[source][message] = dist.irecv(x, peer, group), x

    def end(self) -> None:
        """Ends a step, once its messages have been received."""
        if self._sent:
            with watchdog.waiting("others to take its messages", [peer for peer, _ in self._to.values()]):
                for handle, _ in self._sent:
                    handle.wait()
            self._sent.clear()
        assert not self._local and not any(self._expected.values()) and not any(self._arriving.values()), "work undone"

    def begin_sum(self, others: Sequence[int], x: Tensor) -> Callable[[], None]:
        """Starts summing x in place over this rank and the others, to the same bits on all of them. Returns a function
        that waits for the sum."""
        group = self._shared[tuple(sorted([self.me, *others]))]
        work = dist.all_reduce(x, group=group, async_op=True)

        def wait() -> None:
            with watchdog.waiting("shared gradients", dist.get_process_group_ranks(group)):
                work.wait()

        return wait
