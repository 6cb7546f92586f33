"""A pipeline schedule as data: what every rank does, in order (V3 3.2.1).

The executor runs a table, the planner times it, `timeline` draws it, and this file checks it; so what is planned is
what runs. Four kinds of work on one micro-batch at one stage:

    F    forward
    B    full backward: gradients of inputs and weights
    I    backward for the inputs only; the other half is left for a W
    W    the weight gradients that an I deferred

and `Pair`, an overlapped forward and backward of two micro-batches (F & B).

A stage is a slice of the model's depth, 0 to S - 1. With two copies of the model (DualPipe) the micro-batches of lane 0
enter at rank 0 and those of lane 1 at the last rank; otherwise there is only lane 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import le
from typing import Literal, NamedTuple, get_args

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Action(NamedTuple):
    """One unit of work."""

    kind: Kind
    stage: int
    micro: int
    """Micro-batch within its lane, from 0."""
    lane: int = 0


class Pair(NamedTuple):
    """Two overlapped actions: the communication of each is hidden behind the computation of the other."""

    forward: Action
    backward: Action


Step = Action | Pair


class OrderedStep(NamedTuple):
    """A step of a table, in its place in `Table.order`."""

    rank: int
    step: Step
    waits: tuple[tuple[int, bool], ...]
    """For each step whose result it needs, its position in the order and whether it is another rank's."""


@dataclass(frozen=True)
class Table:
    """What each rank does, in order."""

    name: str
    stages: int
    place: tuple[tuple[int, ...], ...]
    """Rank of stage s in lane l: `place[l][s]`."""
    micro: int
    """Micro-batches of all lanes together."""
    steps: tuple[tuple[Step, ...], ...]
    """The steps of every rank."""
    idle: int = 0
    """Lanes at the end that no micro-batch enters; ranks still hold their slices."""

    @property
    def ranks(self) -> int:
        return len(self.steps)

    @property
    def lanes(self) -> int:
        return len(self.place)

    @property
    def per_lane(self) -> int:
        return self.micro // (self.lanes - self.idle)

    def holders(self) -> list[set[int]]:
        """The stages of every rank."""
        return [{stage for _, stage in self.slices_on(rank)} for rank in range(self.ranks)]

    def slices_on(self, rank: int) -> list[tuple[int, int]]:
        """(lane, stage) of every slice of the model that a rank holds."""
        return self._slices[rank]

    @cached_property
    def _slices(self) -> list[list[tuple[int, int]]]:
        slices: list[list[tuple[int, int]]] = [[] for _ in self.steps]
        for lane, ranks in enumerate(self.place):
            for stage, rank in enumerate(ranks):
                slices[rank].append((lane, stage))
        return slices

    @cached_property
    def fullest(self) -> list[list[dict[int, int]]]:
        return [fullest(steps) for steps in self.steps]

    @cached_property
    def order(self) -> tuple[OrderedStep, ...]:
        """All steps, each after those that it waits for. AssertionError if steps wait for each other, naming them."""
        ordered: list[OrderedStep] = []
        position: dict[tuple[str, int, int, int], int] = {}
        at, moved = [0] * self.ranks, True
        while moved:
            moved = False
            for rank, steps in enumerate(self.steps):
                while at[rank] < len(steps) and (waits := self._waits(steps[at[rank]], position)) is not None:
                    step = steps[at[rank]]
                    for part in step if isinstance(step, Pair) else (step,):
                        position[part] = len(ordered)
                    ordered.append(OrderedStep(rank, step, waits))
                    at[rank], moved = at[rank] + 1, True
        waiting = {rank: steps[at[rank]] for rank, steps in enumerate(self.steps) if at[rank] < len(steps)}
        assert not waiting, f"deadlock: {waiting}"
        return tuple(ordered)

    def _waits(self, step: Step, position: dict[tuple[str, int, int, int], int]) -> tuple[tuple[int, bool], ...] | None:
        """What a step waits for; None while one of them has no position."""
        waits: list[tuple[int, bool]] = []
        for part in step if isinstance(step, Pair) else (step,):
            placement = self.place[part.lane]
            for kinds, stage, micro, lane in needs(part, self.stages):
                before = len(waits)
                for kind in kinds:
                    at = position.get((kind, stage, micro, lane))
                    if at is not None:
                        waits.append((at, placement[stage] != placement[part.stage]))
                if len(waits) == before:
                    return None
        return tuple(waits)


def actions(steps: tuple[Step, ...]) -> Iterator[Action]:
    """The actions of these steps; of a pair, the forward first."""
    for step in steps:
        if isinstance(step, Pair):
            yield from step
        else:
            yield step


def fullest(steps: tuple[Step, ...]) -> list[dict[int, int]]:
    """The micro-batches by stage whose activations one rank holds, at the moments when it holds the most: those that no
    other moment exceeds in every stage. F saves activations, B frees them; after I (input gradients only), W does."""
    live, moments = {action.stage: 0 for action in actions(steps)}, set()
    for action in actions(steps):
        if action.kind == "F":
            live[action.stage] += 1
            moments.add(tuple(live.values()))
        elif action.kind != "I":
            live[action.stage] -= 1
    most = [moment for moment in moments if not any(moment != m and all(map(le, moment, m)) for m in moments)]
    return [dict(zip(live, moment, strict=True)) for moment in sorted(most)]


Need = tuple[tuple[Kind, ...], int, int, int]
"""(kinds, stage, micro, lane): one of the kinds must be done."""


def needs(action: Action, stages: int) -> list[Need]:
    """What must be done before an action."""
    kind, stage, micro, lane = action
    if kind == "F":
        return [(("F",), stage - 1, micro, lane)] if stage else []
    if kind == "W":
        return [(("I",), stage, micro, lane)]
    later: list[Need] = [(("B", "I"), stage + 1, micro, lane)] if stage < stages - 1 else []
    return [(("F",), stage, micro, lane), *later]


def check(table: Table) -> None:
    """AssertionError unless every stage runs every micro-batch once, on its own rank, forward and backward, and the
    table has no deadlock."""
    seen: dict[tuple, int] = {}
    for rank, steps in enumerate(table.steps):
        for step in steps:
            assert not isinstance(step, Pair) or (step.forward.kind, step.backward.kind) == ("F", "B"), step
        for action in actions(steps):
            _, stage, micro, lane = action
            assert table.place[lane][stage] == rank, f"{action} is not rank {rank}'s"
            assert 0 <= micro < table.per_lane and action not in seen, f"{action} is done twice or does not exist"
            seen[action] = rank
    for lane in range(table.lanes - table.idle):
        for stage in range(table.stages):
            for micro in range(table.per_lane):
                done = "".join(kind for kind in KINDS if Action(kind, stage, micro, lane) in seen)
                assert done in ("FB", "FIW"), f"stage {stage}, micro-batch {micro} of lane {lane}: {done or 'nothing'}"
    _ = table.order
