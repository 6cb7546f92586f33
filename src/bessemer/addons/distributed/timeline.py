"""The timeline of a schedule: when every step happens, given the time of each step and of a message; as text and SVG.

The planner supplies measured or estimated times (`plan.step_time`); with the unit times of `Costs` and free messages
the timeline shows the schedule itself (V3 Fig. 5).

Text: one row per rank, time to the right. F3 is the forward of micro-batch 3, B its backward, I and W the two halves of
a split backward, F3&B1 an overlapped pair. Lower-case letters are lane 1, the micro-batches that enter at the last
rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import NamedTuple, Protocol

from bessemer.addons.distributed.table import Action, Pair, Step, Table, actions


class Timing(Protocol):
    """How long a step takes."""

    def of(self, step: Step) -> float: ...


@dataclass(frozen=True)
class Costs:
    """Times of one stage's steps, in any unit."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0
    pair: float | None = None
    """Time of an overlapped forward and backward (F&B); None: their sum."""

    def of(self, step: Step) -> float:
        if isinstance(step, Pair):
            return self.forward + self.input + self.weight if self.pair is None else self.pair
        return {"F": self.forward, "I": self.input, "W": self.weight, "B": self.input + self.weight}[step.kind]


class TimedStep(NamedTuple):
    """A step of a rank, with its start and end."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every step of a table happens."""

    table: Table
    starts: tuple[float, ...]
    ends: tuple[float, ...]
    """Of every step, in the order of `Table.order`."""

    @cached_property
    def spans(self) -> tuple[tuple[TimedStep, ...], ...]:
        """The steps of every rank, in order."""
        spans: list[list[TimedStep]] = [[] for _ in self.table.steps]
        for (rank, step, _), start, end in zip(self.table.order, self.starts, self.ends, strict=True):
            spans[rank].append(TimedStep(step, start, end))
        return tuple(map(tuple, spans))

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The most micro-batches with live activations on every rank, summed over its slices of the model."""
        return tuple(_live(steps) for steps in self.table.steps)

    @property
    def makespan(self) -> float:
        return max(self.ends)

    @property
    def idle(self) -> tuple[float, ...]:
        """For every rank, the time without work, from the first step of any rank to the last."""
        return tuple(self.makespan - sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Overlapped pairs of every rank."""
        return tuple(sum(isinstance(span.step, Pair) for span in spans) for spans in self.spans)


def simulate(table: Table, costs: Timing = Costs(), message: float = 0.0) -> Timeline:
    """Starts every step when its rank is free and its inputs are there; an input from another rank takes `message`."""
    starts, ends, free = list[float](), list[float](), [0.0] * table.ranks
    for rank, step, waits in table.order:
        start = free[rank]
        for at, sent in waits:
            start = max(start, ends[at] + message if sent else ends[at])
        free[rank] = end = start + costs.of(step)
        starts.append(start)
        ends.append(end)
    return Timeline(table, tuple(starts), tuple(ends))


def _live(steps: tuple[Step, ...]) -> int:
    """A forward allocates the activations of its micro-batch, a backward frees them; in a pair the forward comes first.
    What a W still reads after its I (`kernels.deferred`) is not counted."""
    peak = now = 0
    for action in actions(steps):
        now += {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
        peak = max(peak, now)
    return peak


_COLOURS = {"F": "#7fb2e5", "B": "#7cc28a", "I": "#b5e0a8", "W": "#f0cf7a"}
_COLOURS_LANE_1 = {"F": "#4d86c2", "B": "#4f9a61", "I": "#8fc47f", "W": "#d3ab45"}


def label(step: Step) -> str:
    """F3, or f3 in lane 1; F3&b1."""
    if isinstance(step, Pair):
        return f"{label(step.forward)}&{label(step.backward)}"
    letter = step.kind if step.lane == 0 else step.kind.lower()
    return f"{letter}{step.micro}"


def as_text(timeline: Timeline) -> str:
    """One line per rank. A unit of time is as wide as the longest label needs."""
    spans = [span for row in timeline.spans for span in row]
    width = max((len(label(span.step)) + 1) / (span.end - span.start) for span in spans)
    digits = len(str(len(timeline.spans) - 1))
    lines = []
    for rank, row in enumerate(timeline.spans):
        line = ""
        for span in row:
            start, end = round(span.start * width), round(span.end * width)
            line = line.ljust(start, ".") + label(span.step).ljust(end - start)
        lines.append(f"{rank:>{digits}} {line.ljust(round(timeline.makespan * width), '.')}")
    return "\n".join(lines)


def summary(table: Table, timeline: Timeline) -> str:
    """The key figures of a timeline."""
    idle = max(timeline.idle)
    lines = [
        f"{table.name}: {table.ranks} ranks, {table.stages} stages"
        + (", 2 copies of the model" if table.lanes == 2 else "")
        + f", {table.micro} micro-batches",
        f"makespan {timeline.makespan:g}; idle at most {idle:g} per rank ({100 * idle / timeline.makespan:.1f} %)",
        f"held at once: at most {max(timeline.live)} micro-batches of a stage",
    ]
    if any(timeline.pairs):
        lines.append(f"overlapped pairs: {', '.join(map(str, timeline.pairs))}")
    return "\n".join(lines)


def as_svg(table: Table, timeline: Timeline, width: int = 1600, row: int = 26) -> str:
    """A standalone image: a rectangle per step with the number of its micro-batch, a legend below."""
    left, unit = 40, (width - 50) / timeline.makespan
    parts = []
    for rank, spans in enumerate(timeline.spans):
        top = 10 + rank * row
        parts.append(f'<text x="4" y="{top + row * 0.62:.1f}">{rank}</text>')
        parts += [_box(span, left + span.start * unit, top, (span.end - span.start) * unit, row - 3) for span in spans]
    bottom = 20 + table.ranks * row
    parts += _legend(table, left, bottom)
    caption = escape("; ".join(summary(table, timeline).splitlines()))
    parts.append(f'<text x="{left}" y="{bottom + 18 * table.lanes + 16}">{caption}</text>')
    height = bottom + 18 * table.lanes + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(span: TimedStep, x: float, y: float, width: float, height: float) -> str:
    """One step; a pair's forward is above its backward."""
    title = f"<title>{escape(label(span.step))}: {span.start:g}–{span.end:g}</title>"
    parts = span.step if isinstance(span.step, Pair) else (span.step,)
    each = height / len(parts)
    boxes = "".join(_rectangle(part, x, y + n * each, width, each) for n, part in enumerate(parts))
    return f"<g>{title}{boxes}</g>"


def _rectangle(action: Action, x: float, y: float, width: float, height: float) -> str:
    fill = (_COLOURS_LANE_1 if action.lane else _COLOURS)[action.kind]
    box = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}" stroke="#ffffff" '
        f'stroke-width="0.6"/>'
    )
    if width < 7 * len(str(action.micro)):
        return box
    centre = f'x="{x + width / 2:.2f}" y="{y + height / 2 + 3.5:.2f}" text-anchor="middle" font-size="9"'
    return f"{box}<text {centre}>{action.micro}</text>"


def _legend(table: Table, left: int, y: int) -> list[str]:
    """One line per lane."""
    words = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}
    used = {action.kind for steps in table.steps for action in actions(steps)}
    parts = []
    for lane, colours in enumerate((_COLOURS, _COLOURS_LANE_1)[: table.lanes]):
        x = left
        for kind in (kind for kind in words if kind in used):
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours[kind]}"/>')
            parts.append(f'<text x="{x + 16}" y="{y + 10}">{words[kind]}</text>')
            x += 36 + 6 * len(words[kind])
        if table.lanes == 2:
            parts.append(f'<text x="{x}" y="{y + 10}">entering at {("rank 0", "the last rank")[lane]}</text>')
        y += 18
    return parts
