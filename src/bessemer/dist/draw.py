"""A timeline drawn: as text for a terminal, as SVG for a page.

Text: a row a rank, time to the right; F3 is the forward of micro-batch 3, B its backward, I and W the two halves of
one, F3&B1 a pair that overlaps. Small letters are lane 1, the micro-batches that enter at the last rank.
"""

from __future__ import annotations

from html import escape

from bessemer.dist.simulate import Span, Timeline
from bessemer.dist.table import Action, Pair, Step, Table, actions

_COLOURS = {"F": "#7fb2e5", "B": "#7cc28a", "I": "#b5e0a8", "W": "#f0cf7a"}
_DARKER = {"F": "#4d86c2", "B": "#4f9a61", "I": "#8fc47f", "W": "#d3ab45"}
"""Lane 1."""


def said(step: Step) -> str:
    """F3, or f3 in lane 1; F3&b1."""
    if isinstance(step, Pair):
        return f"{said(step.forward)}&{said(step.backward)}"
    letter = step.kind if step.lane == 0 else step.kind.lower()
    return f"{letter}{step.micro}"


def text(timeline: Timeline) -> str:
    """A line a rank. A unit is as wide as its longest piece of work needs."""
    spans = [span for row in timeline.spans for span in row]
    wide = max((len(said(span.step)) + 1) / (span.end - span.start) for span in spans)
    digits = len(str(len(timeline.spans) - 1))
    lines = []
    for rank, row in enumerate(timeline.spans):
        line = ""
        for span in row:
            start, end = round(span.start * wide), round(span.end * wide)
            line = line.ljust(start, ".") + said(span.step).ljust(end - start)
        lines.append(f"{rank:>{digits}} {line.ljust(round(timeline.makespan * wide), '.')}")
    return "\n".join(lines)


def summary(table: Table, timeline: Timeline) -> str:
    """What the picture is worth, in words."""
    worst = max(timeline.idle)
    lines = [
        f"{table.name}: {table.ranks} ranks, {table.stages} stages"
        + (", 2 copies of the model" if table.lanes == 2 else "")
        + f", {table.micro} micro-batches",
        f"makespan {timeline.makespan:g}; idle at most {worst:g} a rank ({100 * worst / timeline.makespan:.1f} %)",
        f"held at once: {max(timeline.live)} micro-batches of a stage, at most",
    ]
    if any(timeline.pairs):
        lines.append(f"overlapped pairs: {', '.join(map(str, timeline.pairs))}")
    return "\n".join(lines)


def svg(table: Table, timeline: Timeline, width: int = 1600, row: int = 26) -> str:
    """A page of its own: rectangles with the number of the micro-batch, a legend below."""
    left, unit = 40, (width - 50) / timeline.makespan
    parts = []
    for rank, spans in enumerate(timeline.spans):
        top = 10 + rank * row
        parts.append(f'<text x="4" y="{top + row * 0.62:.1f}">{rank}</text>')
        parts += [_box(span, left + span.start * unit, top, (span.end - span.start) * unit, row - 3) for span in spans]
    bottom = 20 + table.ranks * row
    parts += _legend(table, left, bottom)
    told = escape("; ".join(summary(table, timeline).splitlines()))
    parts.append(f'<text x="{left}" y="{bottom + 18 * table.lanes + 16}">{told}</text>')
    height = bottom + 18 * table.lanes + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _box(span: Span, x: float, y: float, width: float, height: float) -> str:
    """One piece of work; of a pair the forward above and the backward below."""
    title = f"<title>{escape(said(span.step))}: {span.start:g} to {span.end:g}</title>"
    parts = span.step if isinstance(span.step, Pair) else (span.step,)
    each = height / len(parts)
    drawn = "".join(_rectangle(part, x, y + n * each, width, each) for n, part in enumerate(parts))
    return f"<g>{title}{drawn}</g>"


def _rectangle(action: Action, x: float, y: float, width: float, height: float) -> str:
    fill = (_DARKER if action.lane else _COLOURS)[action.kind]
    box = (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}" stroke="#ffffff" '
        f'stroke-width="0.6"/>'
    )
    if width < 7 * len(str(action.micro)):
        return box
    centre = f'x="{x + width / 2:.2f}" y="{y + height / 2 + 3.5:.2f}" text-anchor="middle" font-size="9"'
    return f"{box}<text {centre}>{action.micro}</text>"


def _legend(table: Table, left: int, y: int) -> list[str]:
    """A line a lane."""
    words = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}
    used = {action.kind for steps in table.steps for action in actions(steps)}
    parts = []
    for lane, colours in enumerate((_COLOURS, _DARKER)[: table.lanes]):
        x = left
        for kind in (kind for kind in words if kind in used):
            parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colours[kind]}"/>')
            parts.append(f'<text x="{x + 16}" y="{y + 10}">{words[kind]}</text>')
            x += 36 + 6 * len(words[kind])
        if table.lanes == 2:
            parts.append(f'<text x="{x}" y="{y + 10}">entering at {("rank 0", "the last rank")[lane]}</text>')
        y += 18
    return parts
