"""The time of one optimizer step: kernels -> layers -> slices -> the schedule's table -> synchronisation and update.

Tables are the executor's. Communication of a layer runs beside computation in overlapped pairs only (`overlap.pair`);
by itself a forward or backward is one piece after the other. What comes after the last micro-batch is in `ends`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from bessemer.dist.schedules import schedule
from bessemer.dist.table import Action, Pair, Step, Table
from bessemer.dist.timeline import Timeline, simulate
from bessemer.errors import UserError
from bessemer.plan import overlap, step_overhead, work
from bessemer.plan.kernels import Kernels, data
from bessemer.plan.layers import cuts, layer_times, seconds
from bessemer.plan.overlap import Times
from bessemer.plan.setup import Setup


@dataclass(frozen=True)
class Slice:
    """Times of one stage by itself, and its layers for pairs."""

    forward: float
    input: float
    weight: float
    layers: tuple[Times, ...] = field(repr=False)
    """With the multiprocessors that pairs leave."""
    around: tuple[float, float] = (0.0, 0.0)
    """Embedding, head and MTP's join: forward, backward; of pairs."""


@dataclass(frozen=True)
class _Costs:
    """Times of a table's steps."""

    slices: tuple[Slice, ...]
    send: float

    def of(self, step: Step) -> float:
        if isinstance(step, Pair):
            return self.pair(step.forward.stage, step.backward.stage)
        return self.alone(step)

    def alone(self, action: Action) -> float:
        part = self.slices[action.stage]
        return {"F": part.forward, "I": part.input, "W": part.weight, "B": part.input + part.weight}[action.kind]

    def pair(self, forward: int, backward: int) -> float:
        f, b = self.slices[forward], self.slices[backward]
        return overlap.pair(f.layers, b.layers[::-1], 2 * self.send) + f.around[0] + b.around[1]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts."""

    timeline: Timeline
    table: Table
    slices: tuple[Slice, ...]
    sync: float
    """Gradients summed, weights gathered."""
    update: float
    """AdamW on this rank's share, clearing, norm."""
    links: dict[str, float]
    """Bytes that a middle rank sends in a step, by kind."""

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.sync + self.update

    @cached_property
    def parts(self) -> dict[str, float]:
        """Means over the ranks of a pipeline: forwards, backwards (inputs, with their weights where not split),
        weights, overlapped pairs, bubble, optimizer: the lines of Table 4 of the ISCA paper."""
        kinds = {"F": "forward", "B": "backward", "I": "backward", "W": "weights"}
        found = dict.fromkeys(("forward", "backward", "weights", "pairs"), 0.0)
        for spans in self.timeline.spans:
            for span in spans:
                kind = "pairs" if isinstance(span.step, Pair) else kinds[span.step.kind]
                found[kind] += (span.end - span.start) / self.table.ranks
        found["bubble"] = sum(self.timeline.idle) / self.table.ranks
        found["optimizer"] = self.sync + self.update
        return found


def step_time(setup: Setup) -> StepTime:
    """UserError for a schedule that cannot be, and for FP8 on a device without it."""
    if setup.fp8 and setup.device.fp8 is None:
        raise UserError(f"{setup.device.name} has no FP8; set precision=bf16")
    table = schedule(setup.schedule, setup.layout.pp, setup.micro)
    slices = tuple(_slices(setup, table.stages, any(isinstance(s, Pair) for steps in table.steps for s in steps)))
    kernels = Kernels.of(setup.device)
    apart = setup.layout.dp * setup.layout.ep >= setup.layout.node  # the next pipeline rank is on another node
    send = kernels.message(setup.tokens * setup.shape.dim * 2, apart) if setup.layout.pp > 1 else 0.0
    timeline = simulate(table, _Costs(slices, send), send)
    sync, update = step_overhead.step_end(setup, table)
    return StepTime(timeline, table, slices, sync, update, step_overhead.links(setup, table))


def _slices(setup: Setup, stages: int, pairs: bool) -> Iterable[Slice]:
    shape, tokens = setup.shape, setup.tokens
    taken = data()["exchange"]["units"] if pairs and setup.layout.ep > 1 else 0
    kinds = {away: {dense: layer_times(setup, dense, away) for dense in (True, False)} for away in {0, taken}}
    around = {0: Kernels.of(setup.device), taken: Kernels.of(setup.device, taken)}
    for stage, layers in enumerate(cuts(setup, stages)):
        dense = [i < shape.dense for i in layers]
        extra = work.embed(shape, tokens) if stage == 0 else work.Phase()
        if stage == stages - 1:
            extra += work.head(shape, tokens)
            for _ in range(setup.n_mtp):
                extra += work.join(shape, tokens) + work.head(shape, tokens)
            dense += [False] * setup.n_mtp
        alone = [seconds(around[0], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        beside = [seconds(around[taken], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        times = [kinds[0][d] for d in dense]
        gather = _gathered(setup, dense) if setup.fsdp else 0.0
        yield Slice(
            max(sum(t.forward for t in times) + alone[0], gather),
            max(sum(t.input for t in times) + alone[1], 2 * gather if setup.fsdp else 0.0),
            sum(t.weight for t in times) + alone[2],
            tuple(kinds[taken][d] for d in dense),
            (beside[0], beside[1] + beside[2]),
        )


def _gathered(setup: Setup, dense: list[bool]) -> float:
    """Seconds to gather the weights of some layers from the data-parallel ranks."""
    kernels, layout = Kernels.of(setup.device), setup.layout
    local = setup.shape.experts // layout.ep if setup.shape.experts else 0
    sizes = [sum(setup.shape.layer_params(d, local)) for d in dense]
    return sum(kernels.collective(2.0 * size, layout.dp * layout.ep, layout.node) for size in sizes)
