"""When everything of a table happens, if every piece of work takes a given time, and every message between ranks.

The planner brings times of its own (`plan.step`); with the units of `Costs` and no time for messages it is what a
schedule is worth by itself (reference E.6, Z.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bessemer.dist.table import Action, Pair, Step, Table, needs


class Timing(Protocol):
    """How long a step takes."""

    def of(self, step: Step) -> float: ...


@dataclass(frozen=True)
class Costs:
    """Times of one stage's work, in any unit."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    pair: float | None = None
    """Of an overlapped forward and backward (F&B); None: their sum."""

    def of(self, step: Step) -> float:
        if isinstance(step, Pair):
            return self.forward + self.input + self.weight if self.pair is None else self.pair
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": self.input + self.weight}[step.kind]


@dataclass(frozen=True)
class Span:
    """One step of a rank in time."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A table in time."""

    spans: tuple[tuple[Span, ...], ...]
    """Of every rank, in order."""
    live: tuple[int, ...]
    """Of every rank, the most micro-batches whose activations it held at once, over all it holds of the model."""

    @property
    def makespan(self) -> float:
        return max(spans[-1].end for spans in self.spans if spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """Of every rank, time without work, beginning and end included."""
        return tuple(self.makespan - sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Of every rank, overlapped pairs."""
        return tuple(sum(isinstance(span.step, Pair) for span in spans) for spans in self.spans)


def simulate(table: Table, costs: Timing = Costs(), message: float = 0.0) -> Timeline:
    """Every step starts when its rank is free and what it needs is done and, from another rank, a `message` later."""
    end: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in table.steps]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(table.steps):
            while len(spans[rank]) < len(steps):
                step = steps[len(spans[rank])]
                start = _start(step, end, table, message)
                if start is None:
                    break
                start = max(start, spans[rank][-1].end if spans[rank] else 0.0)
                span = Span(step, start, start + costs.of(step))
                spans[rank].append(span)
                end |= dict.fromkeys(step if isinstance(step, Pair) else (step,), span.end)
                moved = True
    assert all(len(done) == len(steps) for done, steps in zip(spans, table.steps, strict=True)), "the table never ends"
    return Timeline(tuple(map(tuple, spans)), tuple(_live(steps) for steps in table.steps))


def _start(step: Step, end: dict[Action, float], table: Table, message: float) -> float | None:
    """When what it needs is there; None if that is not known yet."""
    latest = 0.0
    for part in step if isinstance(step, Pair) else (step,):
        place = table.place[part.lane]
        for kinds, stage, *rest in needs(part, table.stages):
            found = [end[key] for kind in kinds if (key := Action(kind, stage, *rest)) in end]
            if not found:
                return None
            latest = max(latest, max(found) + (message if place[stage] != place[part.stage] else 0.0))
    return latest


def _live(steps: tuple[Step, ...]) -> int:
    """A forward takes the memory of its micro-batch, a backward gives it back; in a pair the forward comes first. After
    an I there is still what its W reads (`model.deferred`), which is not counted."""
    most = now = 0
    for step in steps:
        for part in step if isinstance(step, Pair) else (step,):
            now += {"F": 1, "B": -1, "I": -1, "W": 0}[part.kind]
            most = max(most, now)
    return most
