"""The time of one optimizer step: kernels -> layers -> stages -> the schedule's table -> gradient sum and update.

Tables are those of the executor. A layer's communication overlaps computation only in pairs (`layer_time.pair`); a
forward or backward by itself runs one piece after the other. After the last micro-batch, gradients are reduce-scattered
in float32 over the ranks that hold a parameter (both copies under DualPipe), AdamW updates this rank's share (V3
3.2.3), and weights are gathered in the compute dtype, with nothing to hide the messages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from bessemer.addons.distributed.schedules import interleaved, schedule
from bessemer.addons.distributed.table import Action, Pair, Step, Table
from bessemer.addons.distributed.timeline import Timeline, simulate
from bessemer.addons.plan import layer_kernels, layer_time
from bessemer.addons.plan.hardware import Kernels, efficiency, memory_op
from bessemer.addons.plan.layer_time import LayerTimes, cuts, layer_times, row_bytes, seconds
from bessemer.addons.plan.training_setup import Setup, destinations
from bessemer.errors import UserError


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one pipeline stage by itself, and of its layers in pairs."""

    forward: float
    input: float
    weight: float
    layers: tuple[LayerTimes, ...] = field(repr=False)
    """With the multiprocessors that communication leaves in a pair."""
    around: tuple[float, float] = (0.0, 0.0)
    """Seconds of the embedding, the head and the input of MTP modules in pairs: forward, backward."""


def step_key(step: Step) -> tuple:
    """A key that is equal for steps that take equally long, whatever their micro-batch."""
    return (step.forward.stage, step.backward.stage) if isinstance(step, Pair) else (step.kind, step.stage)


@dataclass(frozen=True)
class StepCosts:
    """Times of the steps of a schedule's table."""

    stages: tuple[StageTimes, ...]
    send: float

    def of(self, step: Step) -> float:
        key = step_key(step)
        if key not in self._known:
            self._known[key] = self.alone(step) if isinstance(step, Action) else self._pair(*step)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple, float]:
        return {}

    def alone(self, action: Action) -> float:
        stage = self.stages[action.stage]
        return {"F": stage.forward, "I": stage.input, "W": stage.weight, "B": stage.input + stage.weight}[action.kind]

    def _pair(self, forward: Action, backward: Action) -> float:
        f, b = self.stages[forward.stage], self.stages[backward.stage]
        return layer_time.pair(f.layers, b.layers[::-1], 2 * self.send) + f.around[0] + b.around[1]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and of its parts."""

    timeline: Timeline
    table: Table
    stages: tuple[StageTimes, ...]
    sync: float
    """Reduce-scatter of gradients and all-gather of weights."""
    update: float
    """AdamW on this rank's share, gradient norm and clearing of gradients."""
    links: dict[str, float]
    """Bytes that a rank in the middle of the pipeline sends in a step, by kind."""

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.sync + self.update

    @cached_property
    def parts(self) -> dict[str, float]:
        """Means over the ranks of a pipeline: forwards, backwards (of inputs, and of weights if not split off), weight
        gradients, overlapped pairs, bubble, optimizer; the rows of ISCA 2025, Table 4."""
        kinds = {"F": "forward", "B": "backward", "I": "backward", "W": "weights"}
        parts = dict.fromkeys(("forward", "backward", "weights", "pairs"), 0.0)
        for spans in self.timeline.spans:
            for span in spans:
                kind = "pairs" if isinstance(span.step, Pair) else kinds[span.step.kind]
                parts[kind] += (span.end - span.start) / self.table.ranks
        parts["bubble"] = sum(self.timeline.idle) / self.table.ranks
        parts["optimizer"] = self.sync + self.update
        return parts


def step_time(setup: Setup) -> StepTime:
    """The time of one step; UserError for an impossible schedule, and for FP8 on a device without it."""
    if setup.fp8 and setup.device.fp8 is None:
        raise UserError(f"{setup.device.name} has no FP8; set precision=bf16")
    table = table_of(setup)
    costs = step_costs(setup, table)
    timeline = simulate(table, costs, costs.send)
    sync, update = step_end(setup, table)
    return StepTime(timeline, table, costs.stages, sync, update, links(setup, table))


def table_of(setup: Setup) -> Table:
    if setup.schedule == "interleaved" and setup.slices != 2:
        return interleaved(setup.layout.pp, setup.micro, setup.slices)
    return kept_table(setup.schedule, setup.layout.pp, setup.micro)


@lru_cache(maxsize=64)  # a plan asks for the same tables again and again, and ordering their steps takes longest
def kept_table(name: str, ranks: int, micro: int) -> Table:
    return schedule(name, ranks, micro)


def step_costs(setup: Setup, table: Table) -> StepCosts:
    """Times of the steps of a table."""
    stages = tuple(_stage_times(setup, table.stages, any(isinstance(s, Pair) for steps in table.steps for s in steps)))
    on_network = setup.ranks >= setup.layout.node  # the next pipeline rank is on another node
    message = Kernels.of(setup.device).message(setup.tokens * setup.shape.dim * 2, on_network)
    return StepCosts(stages, message if setup.layout.pp > 1 else 0.0)


def _stage_times(setup: Setup, stages: int, pairs: bool) -> Iterable[StageTimes]:
    shape, tokens = setup.shape, setup.tokens
    busy = efficiency()["exchange"]["units"] if pairs and setup.layout.ep > 1 else 0
    kinds = {away: {dense: layer_times(setup, dense, away) for dense in (True, False)} for away in {0, busy}}
    around = {n: Kernels.of(setup.device, n, setup.factors) for n in {0, busy}}
    for stage, layers in enumerate(cuts(setup, stages)):
        dense = [i < shape.dense for i in layers]
        extra = layer_kernels.embed(shape, tokens) if stage == 0 else layer_kernels.Phase()
        if stage == stages - 1:
            head = layer_kernels.head(replace(shape, vocab=shape.vocab // setup.tp), tokens * setup.tp)
            extra += head
            for _ in range(setup.n_mtp):
                extra += layer_kernels.join(shape, tokens) + head
            dense += [False] * setup.n_mtp
        alone = [seconds(around[0], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        in_pairs = [seconds(around[busy], ops, setup) for ops in (extra.forward, extra.input, extra.weight)]
        times = [kinds[0][d] for d in dense]
        gather = _gather_seconds(setup, dense) if setup.fsdp else 0.0
        yield StageTimes(
            max(sum(t.forward for t in times) + alone[0], gather),
            max(sum(t.input for t in times) + alone[1], 2 * gather if setup.fsdp else 0.0),
            sum(t.weight for t in times) + alone[2],
            tuple(kinds[busy][d] for d in dense),
            (in_pairs[0], in_pairs[1] + in_pairs[2]),
        )


def _gather_seconds(setup: Setup, dense: list[bool]) -> float:
    """Seconds to gather the weights of some layers from the data-parallel ranks."""
    kernels, layout = Kernels.of(setup.device), setup.layout
    local = setup.shape.experts // layout.ep if setup.shape.experts else 0
    sizes = [sum(setup.shape.layer_params(d, local)) / setup.tp for d in dense]
    inside = max(1, layout.node // setup.tp)
    return sum(kernels.collective(2.0 * size, setup.ranks // setup.tp, inside) for size in sizes)


GRADIENT, WEIGHT = 4.0, 2.0
"""Bytes per element."""


def _params_of_rank(setup: Setup, table: Table, rank: int) -> tuple[float, float]:
    """Parameters on a pipeline rank: (of experts, of everything else)."""
    shape, layout = setup.shape, setup.layout
    local = shape.experts // layout.ep if shape.experts else 0
    expert = rest = 0.0
    layers, embedding = cuts(setup, table.stages), shape.vocab * shape.dim
    stages = {stage for _, stage in table.slices_on(rank)}
    for stage in stages:
        kinds = [i < shape.dense for i in layers[stage]]
        kinds += [False] * (shape.n_mtp if stage == table.stages - 1 else 0)
        for dense in kinds:
            more, unrouted = shape.layer_params(dense, local)
            expert, rest = expert + more, rest + unrouted
    n_tables = (0 in stages) + (table.stages - 1 in stages and not (shape.tied and 0 in stages))
    return expert, (rest + n_tables * embedding) / setup.tp


def _groups(setup: Setup, table: Table, rank: int) -> list[tuple[float, int, int]]:
    """(parameters, ranks that replicate them, how many of those share a node) of experts and of everything else."""
    expert, other = _params_of_rank(setup, table, rank)
    layout = setup.layout
    return [
        (expert, layout.dp * layout.cp * table.lanes, max(1, layout.node // layout.ep)),
        (other, setup.ranks // setup.tp * table.lanes, max(1, layout.node // setup.tp)),
    ]


def step_end(setup: Setup, table: Table) -> tuple[float, float]:
    """Seconds of (synchronisation, update) on the slowest pipeline rank."""
    kernels, worst = Kernels.of(setup.device, factors=setup.factors), (0.0, 0.0)
    for rank in range(table.ranks):
        groups = _groups(setup, table, rank)
        sync = 0.0 if setup.fsdp else sum(
            kernels.collective(size * params, ranks, per_node)
            for params, ranks, per_node in groups for size in (GRADIENT, WEIGHT)
        )  # fmt: skip
        share = sum(params / ranks for params, ranks, _ in groups)
        replicated = 0.0 if setup.fsdp else sum(params for params, _, _ in groups)
        # all gradients are read for their norm and cleared; in this rank's share, gradients are read, masters and two
        # moments are read and written, weights are written
        update = memory_op("update", 2 * GRADIENT * replicated + (GRADIENT + 8 + 4 * setup.moments + WEIGHT) * share)
        worst = max(worst, (sync, setup.in_step * kernels.seconds(update)))
    return worst


def links(setup: Setup, table: Table) -> dict[str, float]:
    """Bytes that a rank in the middle of the pipeline sends in a step, by kind."""
    at, layout, rank = destinations(setup.shape, setup.layout.ep, setup.layout.node), setup.layout, table.ranks // 2
    layers, micro = cuts(setup, table.stages), table.per_lane
    sparse = sum(i >= setup.shape.dense for _, stage in table.slices_on(rank) for i in layers[stage]) * micro
    rows = 2 * (row_bytes(setup, "dispatch") + row_bytes(setup, "combine")) * setup.tokens * sparse
    groups = _groups(setup, table, rank)
    sent = {"gradients and weights": sum((GRADIENT + WEIGHT) * p * (ranks - 1) / ranks for p, ranks, _ in groups)}
    if layout.ep > layout.node:
        sent["exchange between nodes"] = rows * at.nodes * (1 - layout.node / layout.ep)
        sent["exchange within nodes"] = rows * (at.ranks - at.nodes)
    elif layout.ep > 1:
        sent["exchange within nodes"] = rows * at.ranks * (1 - 1 / layout.ep)
    if table.ranks > 1:
        sent["pipeline"] = 2.0 * len(table.slices_on(rank)) * micro * setup.tokens * setup.shape.dim * WEIGHT
    return sent
