"""A diagnosis as text for a terminal, and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from textwrap import fill

from .diagnosis import LogDiagnosis, RunDiagnosis
from .names import MEANING

WIDTH, CURVE = 100, 56
BLOCKS = "▁▂▃▄▅▆▇█"
PLAIN_BLOCKS = "_.-=+*#@"
SHOWN = 6
"""Alarms that could not be judged, by name, in the text; --json has all."""


def describe(log: LogDiagnosis, plain: bool = False) -> str:
    """`plain`: for terminals without Unicode."""
    tally = log.tally
    lines = [f"{log.path}: {tally.form}, {tally.records} records"]
    if tally.broken:
        lines.append(f"  {tally.broken} damaged lines are left out, the first is line {tally.first_broken}")
    lines += [f"  {note}" for note in tally.notes]
    for run in log.runs:
        lines += _run(run, plain)
    return "\n".join(map(printable, "\n".join(lines).split("\n")))


def printable(text: str) -> str:
    """Without control characters, which a name in a log may hold and a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _run(run: RunDiagnosis, plain: bool) -> list[str]:
    trainer, steps = run.named.trainer, run.run.columns.steps
    title = f"run {run.run.name!r}: " if run.run.name else ""
    unit = "records" if run.run.by_order else "steps"
    lines = ["", f"{title}{trainer.title if trainer else 'trainer not recognised, TRL names are tried'}, "
                 f"{unit} {steps[0]} to {steps[-1]}"]  # fmt: skip
    lines += [f"  note: {note}" for note in run.run.notes]
    if not run.named.called:
        return [*lines, "  no metric that a rule reads"]
    if not run.findings:
        lines.append("  no alarm")
    for number, each in enumerate(run.findings, 1):
        after = f", follows from {', '.join(code.replace('-', ' ') for code in each.follows_from)}" * bool(
            each.follows_from
        )
        lines += [
            "",
            f"  {number}. {each.title.upper()} since {unit[:-1]} {each.since}{after}",
            _wrapped("", each.message),
        ]
        lines += [_wrapped("likely cause: ", each.cause), _wrapped("look at next: ", each.advice)]
        for metric, points in each.curves.items():
            lines.append(f"     {_curve([value for _, value in points], plain)}  {run.named.called[metric]}")
        lines.append(f"     {_mark(each.since, next(iter(each.curves.values()), []), plain)}")
    for code, first, last in run.earlier:
        lines.append(f"  earlier: {code.replace('-', ' ')}, from {unit[:-1]} {first} to {last}, and no longer")
    lines += ["", *_understood(run)]
    return lines


def _wrapped(before: str, text: str) -> str:
    return fill(before + text, WIDTH, initial_indent="     ", subsequent_indent="     ")


def _binned(values: Sequence[float], width: int = CURVE) -> list[float]:
    if len(values) <= width:
        return [*values]
    edges = [round(n * len(values) / width) for n in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _curve(values: Sequence[float], plain: bool = False) -> str:
    """The values as one row of blocks between the first and the last number."""
    marks, binned = PLAIN_BLOCKS if plain else BLOCKS, _binned(values)
    low, high = min(binned), max(binned)
    scale = (len(marks) - 1) / (high - low) if high > low else 0.0
    drawn = "".join(marks[round((value - low) * scale)] for value in binned)
    return f"{values[0]:>9.3g} {drawn:<{CURVE}} {values[-1]:<9.3g}"


def _mark(since: int, points: Sequence[tuple[int, float]], plain: bool) -> str:
    """A mark under the curve, where the alarm begins."""
    before = sum(step < since for step, _ in points)
    column = before if len(points) <= CURVE else before * CURVE // len(points)
    return " " * (10 + column) + f"{'^' if plain else '▲'} {since}"


def _understood(run: RunDiagnosis) -> list[str]:
    called = run.named.called
    said = ", ".join(f"{metric} = {name}" if metric != name else metric for metric, name in called.items())
    lines = [fill("read as: " + said, WIDTH, initial_indent="  ", subsequent_indent="    ")]
    lines += [f"  not used: {name}: {why}" for name, why in run.named.refused.items()]
    if run.not_judged:
        missing = sorted({metric for lacks in run.not_judged.values() for metric in lacks})
        judged = sorted(run.not_judged.items(), key=lambda each: len(each[1]))
        words = "; ".join(f"{code.replace('-', ' ')} (no {', '.join(lacks)})" for code, lacks in judged[:SHOWN])
        more = f"; and {len(judged) - SHOWN} more (--json)" if len(judged) > SHOWN else ""
        lines.append(fill("not judged: " + words + more, WIDTH, initial_indent="  ", subsequent_indent="    "))
        lacking = [metric for metric in missing if metric in ("accuracy", "format") and metric not in run.named.refused]
        lines += [f"  if the log has {MEANING[metric]} by another name: --metric {metric}=NAME" for metric in lacking]
    return lines


# --- one page ---------------------------------------------------------------------------------------------------------

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:52em;margin:2em auto;padding:0 1em}
svg{width:100%;height:5em;background:#8881}polyline{fill:none;stroke:#2a6fb0;stroke-width:1.5}
line{stroke:#d4641c;stroke-dasharray:3}small{opacity:.7}"""


def page(logs: Sequence[LogDiagnosis]) -> str:
    """An HTML page of the same, without scripts. Everything from the logs is escaped."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Diagnosis</title>", f"<style>{STYLE}</style>"]
    for log in logs:
        parts.append(f"<h1>{escape(str(log.path))}</h1><p>{escape(log.tally.form)}, {log.tally.records} records</p>")
        for run in log.runs:
            trainer = run.named.trainer
            parts.append(
                f"<h2>{escape(run.run.name or 'run')} ({escape(trainer.title if trainer else 'unknown')})</h2>"
            )
            parts += ["<p>no alarm</p>"] if not run.findings else []
            for number, each in enumerate(run.findings, 1):
                after = ", ".join(code.replace("-", " ") for code in each.follows_from)
                parts.append(
                    f"<h3>{number}. {escape(each.title)} since {each.since}"
                    + (f" <small>follows from {escape(after)}</small>" if after else "")
                    + f"</h3><p>{escape(each.message)}.<br>Likely cause: {escape(each.cause)}.<br>"
                    f"Look at next: {escape(each.advice)}.</p>"
                )
                parts += [_chart(run.named.called[metric], curve, each.since) for metric, curve in each.curves.items()]
            text = "\n".join(line.strip() for line in _understood(run))
            parts.append(f"<p><small>{escape(text)}</small></p>")
    return "\n".join(parts) + "\n"


def _chart(label: str, points: Sequence[tuple[int, float]], since: int) -> str:
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    low, high = min(value for _, value in points), max(value for _, value in points)
    across = [(100 * (step - first) / (last - first), 19 - 18 * (v - low) / ((high - low) or 1)) for step, v in points]
    at = 100 * (min(max(since, first), last) - first) / (last - first)
    drawn = " ".join(f"{x:.2f},{y:.2f}" for x, y in across)
    return (
        f"<p><small>{escape(label)}: {points[0][1]:.3g} to {points[-1][1]:.3g}</small><svg viewBox='0 0 100 20' "
        f"preserveAspectRatio=none><polyline vector-effect=non-scaling-stroke points='{drawn}'/>"
        f"<line x1={at:.2f} x2={at:.2f} y1=0 y2=20 vector-effect=non-scaling-stroke /></svg></p>"
    )
