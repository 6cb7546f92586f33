"""The time of one optimizer step: kernels -> layers -> slices -> the schedule's table -> synchronisation and update.

A `Setup` is everything that is assumed. Slices are `stage.cut`'s, tables are the executor's. Communication of a layer
runs beside computation in overlapped pairs only (`overlap.pair`), and takes its multiprocessors there; by itself a
forward or backward is one piece after the other. Gradients are reduce-scattered in float32 over the ranks that hold
a parameter (both copies under DualPipe), weights gathered in the compute dtype, neither hidden behind anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise

from bessemer.errors import UserError
from bessemer.parallel.mesh import Layout
from bessemer.parallel.schedules import schedule
from bessemer.parallel.simulate import Timeline, simulate
from bessemer.parallel.stage import cut
from bessemer.parallel.table import Action, Pair, Step, Table
from bessemer.plan import overlap, work
from bessemer.plan.hardware import Device
from bessemer.plan.kernels import Kernels, Op, data
from bessemer.plan.overlap import Times
from bessemer.plan.routing import Places, places
from bessemer.plan.shape import Shape
from bessemer.precision.tiles import TILE

IN_STEP = 1.2
"""What kernels take within a training step over what they take alone: lower sustained clocks, tails, gaps. The one
number taken from a profile of training: compute streams of the public DeepSeek trace are busy 124.3 ms for 4 + 4 layers
(profile-data, H800) where the kernels below, alone, take 103.3. No time of a whole run is in it."""


@dataclass(frozen=True)
class Setup:
    """What is assumed of a run."""

    shape: Shape
    layout: Layout
    device: Device
    schedule: str
    micro: int
    """Micro-batches of a pipeline and step."""
    rows: int = 1
    """Sequences of a micro-batch."""
    length: int = 4096
    fp8: bool = True
    mtp: bool = True
    recompute: tuple[str, ...] = ()
    """Phases that backward makes again; "layer": all of every layer."""
    imbalance: float = 1.0
    """Rows of the busiest expert-parallel rank over the mean."""
    in_step: float = IN_STEP
    even: bool = False
    """Stages of as many layers each (`stage.cut`); else of as nearly equal time as can be (`balanced`)."""
    fsdp: bool = False
    """Weights are spread over the data-parallel ranks too, and gathered layer by layer."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def step_tokens(self) -> int:
        return self.tokens * self.micro * self.layout.dp * self.layout.ep

    @property
    def n_mtp(self) -> int:
        return self.shape.n_mtp if self.mtp else 0


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
    sync, update, links = _step_end(setup, table, kernels)
    links |= _links(setup, table)
    return StepTime(timeline, table, slices, sync, update, links)


def _seconds(kernels: Kernels, ops: Iterable[Op], setup: Setup) -> float:
    return setup.in_step * sum(kernels.seconds(op) for op in ops)


def layer_times(setup: Setup, dense: bool, taken: int) -> Times:
    """Of one layer, `taken` multiprocessors being away for communication."""
    if not dense and not setup.shape.experts:
        return overlap.NOTHING
    alike = replace(setup.layout, pp=1, dp=1)
    return _layer_times(replace(setup, layout=alike, schedule="", micro=1, even=False, fsdp=False), dense, taken)


@cache
def _layer_times(setup: Setup, dense: bool, taken: int) -> Times:
    kernels, shape, tokens = Kernels.of(setup.device, taken), setup.shape, setup.tokens
    at = places(shape, setup.layout.ep, setup.layout.node)
    attend = work.attend(shape, tokens, setup.length, setup.fp8)
    if dense:
        ffn = work.dense(shape, tokens, setup.fp8)
    else:
        local = max(1, shape.experts // setup.layout.ep)
        ffn = work.experts(shape, tokens, local, at.ranks, setup.fp8)
    if {"attend", "layer"} & set(setup.recompute):
        attend = attend.again()
    if "layer" in setup.recompute or ("experts" in setup.recompute and not dense):
        ffn = ffn.again()
    busy = 1.0 if dense else setup.imbalance
    ways = [
        [_seconds(kernels, ops, setup) for ops in (phase.forward, phase.input, phase.weight)] for phase in (attend, ffn)
    ]
    times = (tuple(ways[0]), tuple(busy * seconds for seconds in ways[1]))
    if dense or setup.layout.ep == 1:
        return Times(*times)
    sent, back = (exchange_seconds(setup, way, at) for way in ("dispatch", "combine"))
    return Times(*times, sent, back, sent, back)


def row_bytes(setup: Setup, way: str) -> int:
    """Of a token on its way: FP8 with its factors out, BF16 back (D.6)."""
    dim = setup.shape.dim
    return dim + 4 * -(-dim // TILE) if setup.fp8 and way == "dispatch" else 2 * dim


def exchange_seconds(setup: Setup, way: str, at: Places) -> float:
    """Of one dispatch or combine, the slower of the two links: rows once for every node, then once for every rank."""
    kernels, layout = Kernels.of(setup.device), setup.layout
    row = setup.tokens * row_bytes(setup, way) * setup.imbalance
    inside = kernels.exchange(row * at.ranks, min(layout.ep, layout.node), way, False)
    if layout.ep <= layout.node:
        return inside
    return max(inside, kernels.exchange(row * at.nodes, layout.ep, way, True))


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
        alone = [_seconds(around[0], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        beside = [_seconds(around[taken], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        times = [kinds[0][d] for d in dense]
        gather = _gathered(setup, dense) if setup.fsdp else 0.0
        yield Slice(
            max(sum(t.forward for t in times) + alone[0], gather),
            max(sum(t.input for t in times) + alone[1], 2 * gather if setup.fsdp else 0.0),
            sum(t.weight for t in times) + alone[2],
            tuple(kinds[taken][d] for d in dense),
            (beside[0], beside[1] + beside[2]),
        )


def cuts(setup: Setup, stages: int) -> list[range]:
    """Layers of every stage."""
    return cut(setup.shape, stages) if setup.even else balanced(setup, stages)


def balanced(setup: Setup, stages: int) -> list[range]:
    """Layers of every stage so that the slowest is as fast as can be, one layer at least: head and MTP modules take
    time, too. Where pairs hide communication only computation counts. For V3 that is 4 layers on each of 15 stages, and
    the last main layer, MTP, head and its second use on the last."""
    times = {dense: layer_times(setup, dense, 0) for dense in (True, False)}
    hidden = setup.schedule.startswith("dualpipe")
    cost = {d: t.compute + (0.0 if hidden else t.communication) for d, t in times.items()}
    tail = work.head(setup.shape, setup.tokens)
    for _ in range(setup.n_mtp):
        tail += work.join(setup.shape, setup.tokens) + work.head(setup.shape, setup.tokens)
    kernels = Kernels.of(setup.device)
    last = _seconds(kernels, tail.forward + tail.input + tail.weight, setup) + setup.n_mtp * cost[False]
    return _cut(tuple(cost[i < setup.shape.dense] for i in range(setup.shape.n_layers)), last, stages)


@cache
def _cut(costs: tuple[float, ...], last: float, stages: int) -> list[range]:
    """Layers of these costs over stages, the last of which has `last` to do beside its own."""
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][n]: the slowest of s stages with the first n layers, as fast as can be, and where the last of them begins
    best = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        extra, row = last if stage == stages else 0.0, {}
        for n in range(stage, len(sums)) if stage < stages else (len(sums) - 1,):
            row[n] = min((max(best[-1][k][0], sums[n] - sums[k] + extra), -k) for k in best[-1] if k < n)
        best.append({n: (time, -k) for n, (time, k) in row.items()})
    ends = [len(sums) - 1]
    for row in best[:0:-1]:
        ends.append(row[ends[-1]][1])
    return [range(a, b) for a, b in pairwise(ends[::-1])]


def _gathered(setup: Setup, dense: list[bool]) -> float:
    """Seconds to gather the weights of some layers from the data-parallel ranks."""
    kernels, layout = Kernels.of(setup.device), setup.layout
    local = setup.shape.experts // layout.ep if setup.shape.experts else 0
    sizes = [sum(setup.shape.layer_params(d, local)) for d in dense]
    return sum(kernels.collective(2.0 * size, layout.dp * layout.ep, layout.node) for size in sizes)


def held_params(setup: Setup, table: Table, rank: int) -> tuple[float, float]:
    """(of experts, of all else) on a pipeline rank."""
    shape, layout = setup.shape, setup.layout
    local = shape.experts // layout.ep if shape.experts else 0
    expert = rest = 0.0
    layers, tables = cuts(setup, table.stages), shape.vocab * shape.dim
    held = {stage for _, stage in table.held(rank)}
    for stage in held:
        kinds = [i < shape.dense for i in layers[stage]]
        kinds += [False] * (shape.n_mtp if stage == table.stages - 1 else 0)
        for dense in kinds:
            more, other = shape.layer_params(dense, local)
            expert, rest = expert + more, rest + other
    ends = (0 in held) + (table.stages - 1 in held and not (shape.tied and 0 in held))
    return expert, rest + ends * tables


def _step_end(setup: Setup, table: Table, kernels: Kernels) -> tuple[float, float, dict[str, float]]:
    """(synchronisation, update, bytes sent) of the slowest pipeline rank."""
    layout, copies = setup.layout, table.lanes
    worst, sent = (0.0, 0.0), 0.0
    for rank in range(table.ranks):
        expert, rest = held_params(setup, table, rank)
        sync = share = 0.0
        for params, ranks, per_node in (
            (expert, layout.dp * copies, max(1, layout.node // layout.ep)),
            (rest, layout.dp * layout.ep * copies, layout.node),
        ):
            if not setup.fsdp:
                sync += sum(kernels.collective(size * params, ranks, per_node) for size in (4.0, 2.0))
            share += params / ranks
            if rank == table.ranks // 2:
                sent += 6.0 * params * (ranks - 1) / ranks
        # gradients: norm, cleared; of the share: read gradient, read and write masters, two moments, write weights
        moved = (0 if setup.fsdp else 8.0) * (expert + rest) + (4 + 8 + 8 + 2) * share
        worst = max(worst, (sync, setup.in_step * kernels._memory(moved, False)))
    return *worst, {"gradients and weights": sent}


def _links(setup: Setup, table: Table) -> dict[str, float]:
    """Bytes that a rank in the middle of the pipeline sends in a step for the exchange and to its neighbours."""
    at = places(setup.shape, setup.layout.ep, setup.layout.node)
    rank = table.ranks // 2
    layers = cuts(setup, table.stages)
    micro = table.per_lane
    sparse = sum(i >= setup.shape.dense for _, stage in table.held(rank) for i in layers[stage]) * micro
    both = 2 * (row_bytes(setup, "dispatch") + row_bytes(setup, "combine")) * setup.tokens * sparse
    found = {}
    if setup.layout.ep > 1:
        nodes = at.nodes if setup.layout.ep > setup.layout.node else 0.0
        far = nodes * (1 - setup.layout.node / setup.layout.ep) if nodes else 0.0
        found = {
            "exchange between nodes": both * far,
            "exchange within nodes": both * (at.ranks - nodes if nodes else at.ranks),
        }
    if table.ranks > 1:
        messages = len(table.held(rank)) * micro * 2
        found["pipeline"] = messages * setup.tokens * setup.shape.dim * 2.0
    return found
