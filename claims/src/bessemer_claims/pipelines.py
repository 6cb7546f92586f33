"""Pipelines whose stages sleep: the real executor on real processes, with real messages but no computation.

A stage sleeps for as long as it would compute: one unit in F, one in I (the gradient of its input) and one in W; a B is
I and W. So 8 ranks need no core, and the measurement is of the schedule and its executor. A layer's two exchanges sleep
too if they are given a time, and run beside the other half of a pair if the executor overlaps. A rank is idle while it
waits for a message or has nothing left to do (V3 Table 2).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bessemer.addons.accelerate.kernels.deferred import gradient
from bessemer.addons.distributed import process_groups
from bessemer.addons.distributed.chunk import Overlapped, Serial
from bessemer.addons.distributed.executor import Executor, Work
from bessemer.addons.distributed.model_slice import PhaseOutput, Phases, Slice
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.table import Action, Step
from bessemer.addons.distributed.timeline import Costs, simulate

WIDTH = 8
"""How many numbers a stage sends on per row."""


class Case(NamedTuple):
    """One pipeline to time."""

    schedule: str
    exchange: float = 0.0
    """Seconds per exchange; a forward has two exchanges and a backward two."""
    overlap: bool = False
    """Whether exchanges run beside computation, in pairs."""


class PipelineStep(NamedTuple):
    """One timed step of a pipeline."""

    seconds: float
    """From the first rank's start to the last rank's end."""
    idle: float
    """Share of all ranks' time that they spend waiting."""


class _Asleep(torch.autograd.Function):
    """Returns x; sleeps in forward and in backward, and for the weight's gradient, which a store may defer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, seconds: float) -> Tensor:
        ctx.weight, ctx.seconds = weight, seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        def later() -> Tensor:
            time.sleep(ctx.seconds)
            return torch.zeros_like(ctx.weight)

        time.sleep(ctx.seconds)
        return dy.clone(), gradient(ctx.weight, later), None


class _Exchange(torch.autograd.Function):
    """Returns x; sleeps in forward and in backward, in place of an exchange of tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return dy.clone(), None


class SleepingStage(nn.Module):
    """What the executor needs from a `Slice`: one layer in its five phases."""

    def __init__(self, stage: int, stages: int, unit: float, exchange: float) -> None:
        super().__init__()
        self.first, self.last, self.unit, self.exchange = stage == 0, stage == stages - 1, unit, exchange
        self.attend, self.experts = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def room(self, tokens_BT: Tensor) -> Tensor:
        return torch.empty(len(tokens_BT), WIDTH)

    def phases(self, x: Tensor, tokens_BT: Tensor, *_: object) -> Phases:
        x = torch.zeros(len(tokens_BT), WIDTH, requires_grad=True) if self.first else x
        x = _Asleep.apply(x, self.attend, self.unit / 2)
        x, _ = yield PhaseOutput(x)
        x, _ = yield PhaseOutput(_Exchange.apply(x, self.exchange))
        x, _ = yield PhaseOutput(_Asleep.apply(x, self.experts, self.unit / 2))
        x, _ = yield PhaseOutput(_Exchange.apply(x, self.exchange))
        return x, x.sum() * 0


class _Watched(Executor):
    """Records (begin, end, seconds waited) of every step."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.spans: list[tuple[float, float, float]] = []
        self._waited, self._receive = 0.0, self.channels.receive
        self.channels.receive = self._watched  # type: ignore[method-assign]

    def _watched(self, needed: Action) -> Tensor:
        began = time.perf_counter()
        x = self._receive(needed)
        self._waited += time.perf_counter() - began
        return x

    def _do(self, step: Step) -> None:
        began, self._waited = time.perf_counter(), 0.0
        super()._do(step)
        self.spans.append((began, time.perf_counter(), self._waited))


def _on_a_rank(
    rank: int, store: str, ranks: int, micro: int, unit: float, cases: Sequence[Case], answers: SimpleQueue
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    process_groups.begin(300)
    for number, case in enumerate(cases):
        table = schedule(case.schedule, ranks, micro)
        slices = {
            (lane, stage): SleepingStage(stage, table.stages, unit, case.exchange)
            for lane, stage in table.slices_on(rank)
        }
        streams = Overlapped(torch.device("cpu")) if case.overlap else Serial()
        executor = _Watched(table, rank, cast(dict[tuple[int, int], Slice], slices), [range(ranks)], streams=streams)
        work = [[_work() for _ in range(table.per_lane)] for _ in range(table.lanes)]
        dist.barrier()
        executor.run(work)
        answers.put((rank, number, executor.spans))
    dist.barrier()
    dist.destroy_process_group()


def _work() -> Work:
    return Work(torch.zeros(1, 1, dtype=torch.long), None, lambda out, head: out.balance, torch.tensor(1.0))


def measure(ranks: int, micro: int, unit: float, cases: Sequence[Case]) -> list[PipelineStep]:
    """Times a step of every case, on one process per rank; a step before them lets the ranks find each other."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.SimpleQueue()
    spans: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), ranks, micro, unit, [Case("gpipe"), *cases], answers)
        processes = [context.Process(target=_on_a_rank, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        for _ in range(ranks * (1 + len(cases))):
            rank, number, result = answers.get()
            spans[rank, number] = result
        for process in processes:
            process.join()
    return [_timed([spans[rank, number] for rank in range(ranks)]) for number in range(1, 1 + len(cases))]


def _timed(spans: Sequence[Sequence[tuple[float, float, float]]]) -> PipelineStep:
    length = max(rank_spans[-1][1] for rank_spans in spans) - min(rank_spans[0][0] for rank_spans in spans)
    busy = sum(end - begin - waited for rank_spans in spans for begin, end, waited in rank_spans)
    return PipelineStep(length, 1 - busy / (length * len(spans)))


def expected(name: str, ranks: int, micro: int) -> float:
    """The idle share by the schedule's table, with one unit each for F, I and W."""
    timeline = simulate(schedule(name, ranks, micro), Costs(1, 1, 1))
    return sum(timeline.idle) / (timeline.makespan * ranks)


def numbers(ranks: int, micro: int, unit: float, exchange: float) -> dict[str, float]:
    """Idle shares of the schedules, measured and by their tables, and the share of the exchanges' time that overlap
    hides."""
    names = ("gpipe", "1f1b", "zb1p", "dualpipe")
    serial, beside = Case("dualpipe", exchange), Case("dualpipe", exchange, overlap=True)
    cases = [*map(Case, names), Case("1f1b"), serial, beside, serial]
    *idle, again, slow, overlapped, slow_again = measure(ranks, micro, unit, cases)
    cost = slow.seconds - idle[-1].seconds
    result = {f"idle {name}": timing.idle for name, timing in zip(names, idle, strict=True)}
    result |= {f"idle {name} by its table": expected(name, ranks, micro) for name in names}
    hidden, by_chance = ((slow.seconds - other.seconds) / cost for other in (overlapped, slow_again))
    return result | {"idle 1f1b again": again.idle, "hidden": hidden, "hidden without overlap": by_chance}
