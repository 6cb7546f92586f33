"""A micro-batch at a stage, phase by phase: forward, and later backward in the same pieces (V3 3.2.1, Fig. 4).

What a phase passes to later ones is detached from its graph, so that the graph of every phase can be differentiated
on its own: from the gradients of its outputs to those of its inputs. The gradients are bit-identical to those of one
graph, and the outputs' data are not kept for backward.

    Serial      every phase runs at once, where it is called
    Overlapped  communication runs in its own thread, and on a GPU also on its own stream

`run(exchange, phase, after)` starts a phase after another one and returns a handle for the next. Computation is done
when it returns (on a GPU: queued); communication continues in the background. The phases of one micro-batch follow one
another, those of two may overlap; they share nothing but weights, and communication reads none. On CPUs the thread is
tested bit for bit. The streams have not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.cuda import Event
from torch.utils._pytree import tree_map

from bessemer.addons.distributed.model_slice import PhaseOutput, Phases

Handle = Future[Event | None] | Event | None
"""What the next phase waits for: an exchange in its thread, or on a GPU the end of a computation."""


class Serial:
    """One phase after the other."""

    def run(self, exchange: bool, phase: Callable[[], None], after: Handle) -> Handle:
        phase()
        return None

    def on(self, exchange: bool) -> AbstractContextManager:
        """The context to run a phase in; the backward of what is made inside runs there too."""
        return nullcontext()

    def share(self, x: Tensor) -> None:
        """Called for an `x` that one kind of phase has made and the other will read."""


class Overlapped(Serial):
    """Runs communication alongside computation. A GPU needs the thread as well: an exchange has to learn how much it
    will receive, and only its own thread waits for that number."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        # a thread starts on device 0, where anything it touches would create a second context
        self._thread = ThreadPoolExecutor(1, "exchange", partial(torch.cuda.set_device, device) if cuda else None)
        self._streams = (torch.cuda.current_stream(device), torch.cuda.Stream(device)) if cuda else ()

    def run(self, exchange: bool, phase: Callable[[], None], after: Handle) -> Handle:
        if exchange:
            assert not isinstance(after, Future), "an exchange follows computation"
            return self._thread.submit(self._run, exchange, phase, after)
        return self._run(exchange, phase, after.result() if isinstance(after, Future) else after)

    def _run(self, exchange: bool, phase: Callable[[], None], after: Event | None) -> Event | None:
        with self.on(exchange):
            if after is not None:
                self._streams[exchange].wait_event(after)
            phase()
            return self._streams[exchange].record_event() if self._streams else None

    def on(self, exchange: bool) -> AbstractContextManager:
        return torch.cuda.stream(self._streams[exchange]) if self._streams else nullcontext()

    def share(self, x: Tensor) -> None:
        for stream in self._streams if x.is_cuda else ():
            x.record_stream(stream)


class _Output:
    """An output of a phase: the end of its graph, and the gradient that later phases compute for it."""

    def __init__(self, x: Tensor):
        self.edge = get_gradient_edge(x)
        self.gradient: Tensor | None = None


class Chunk:
    """One micro-batch at one stage. `phases` returns (output to send on or None, loss term)."""

    def __init__(self, phases: Phases, streams: Serial):
        self._phases: Phases | None = phases
        self._streams = streams
        self._output: PhaseOutput | None = None
        self._cuts: list[list[_Output]] = []
        """The outputs of every phase that was run."""
        self._after: Handle = None
        self._needed = torch.zeros((), requires_grad=True)
        self._ends: tuple[_Output | None, _Output | None] = None, None
        self.sent: Tensor | None = None
        self.loss: Tensor

    def forward(self, around: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[None]:
        """Yields after every phase except the last. Computation runs in `around()`."""
        exchange = False
        while self._phases is not None:
            with nullcontext() if exchange else around():
                self._after = self._streams.run(exchange, partial(self._next, exchange), self._after)
            exchange = not exchange
            if self._phases is not None:
                yield

    def backward(self, dy: Tensor | None, around: Callable[[], AbstractContextManager]) -> Iterator[None]:
        """The phases in reverse; `dy` is the gradient of the output that was sent. Computation runs in `around()`."""
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
        outputs: list[_Output] = []
        try:
            assert self._phases is not None, "no phase follows the last"
            output = next(self._phases) if self._output is None else self._phases.send(self._output)
        except StopIteration as end:
            self._end(*end.value)
        else:
            with self._streams.on(not exchange):
                following = tree_map(partial(self._cut, outputs), output.next)
            with self._streams.on(exchange):
                later = tree_map(partial(self._cut, outputs), output.later)
            self._output = PhaseOutput(following, later)
            self._cuts.append(outputs)

    def _end(self, sent: Tensor | None, loss: Tensor) -> None:
        ends = [_Output(x) if x is not None and x.requires_grad else None for x in (sent, loss)]
        self._ends = ends[0], ends[1]
        self._cuts.append([output for output in ends if output is not None])
        self.sent, self.loss = None if sent is None else sent.detach(), loss.detach()
        self._phases = self._output = None

    def _cut(self, outputs: list[_Output], x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        self._streams.share(x)
        if not x.requires_grad:
            return x
        outputs.append(_Output(x))
        return _Boundary.apply(x.detach(), self._needed, outputs[-1], self._streams)


def _differentiate(outputs: list[_Output]) -> None:
    reached = [output for output in outputs if output.gradient is not None]
    if reached:
        torch.autograd.backward([output.edge for output in reached], [output.gradient for output in reached])


class _Boundary(torch.autograd.Function):
    """x, whose gradient is stored in the output and goes no further. `needed` makes autograd run this backward."""

    @staticmethod
    def forward(ctx, x: Tensor, needed: Tensor, output: _Output, streams: Serial) -> Tensor:
        ctx.output, ctx.streams = output, streams
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx: Tensor) -> tuple[None, None, None, None]:
        ctx.streams.share(dx)
        ctx.output.gradient = dx
        return None, None, None, None
