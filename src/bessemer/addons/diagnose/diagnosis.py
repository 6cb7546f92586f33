"""A log's diagnosis: every run's alarms with the step since which they hold, likeliest root cause first, and what
could not be judged for want of which metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .alarms import RULES
from .causes import ordered
from .formats import ReadTally, Unreadable, read
from .history import WINDOW, Alarm, MetricHistory
from .names import ADVICE, PLAIN, TRAINERS
from .runs import LoggedRun, Named, collect, name

GAP = WINDOW
"""Records in which an alarm may fall silent and still be the same one."""
LASTS = {"no-contrast": WINDOW, "groups-too-hard": WINDOW, "groups-too-easy": WINDOW, "never-ending": WINDOW}
"""Records for which an alarm must hold at the end: shares of few groups or answers are coarse, and one window of them
proves little. Other alarms count at once."""


@dataclass
class Stretch:
    """Records, by number, from the first to the last at which an alarm held."""

    first: int
    step: int
    last: int
    alarm: Alarm


@dataclass
class Finding:
    code: str
    since: int
    """The first step at which it holds."""
    message: str
    cause: str
    advice: str
    follows_from: list[str]
    curves: dict[str, list[tuple[int, float]]]
    """The metrics that it rests on, by their names in the log."""

    @property
    def title(self) -> str:
        return self.code.replace("-", " ")


@dataclass
class RunDiagnosis:
    """`not_judged`: alarm -> metrics that the log lacks for it."""

    run: LoggedRun
    named: Named
    records: int
    findings: list[Finding]
    earlier: list[tuple[str, int, int]]
    """Alarms that held and no longer do: code, first and last step."""
    not_judged: dict[str, list[str]]

    def facts(self) -> dict[str, Any]:
        steps = self.run.columns.steps
        return {
            "run": self.run.name, "trainer": self.named.key, "records": self.records,
            "steps": [steps[0], steps[-1]], "steps_are_counted": self.run.by_order,
            "findings": [
                {"code": each.code, "since_step": each.since, "message": each.message, "cause": each.cause,
                 "next": each.advice, "follows_from": each.follows_from, "curves": each.curves}
                for each in self.findings
            ],
            "earlier": [{"code": code, "from_step": first, "to_step": last} for code, first, last in self.earlier],
            "understood": self.named.called, "not_used": self.named.refused, "not_judged": self.not_judged,
            "other_names": len(self.run.other), "notes": self.run.notes,
        }  # fmt: skip


@dataclass
class LogDiagnosis:
    path: Path
    tally: ReadTally
    runs: list[RunDiagnosis] = field(default_factory=list)

    @property
    def alarms(self) -> bool:
        return any(run.findings for run in self.runs)

    def facts(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "log": str(self.path), "form": tally.form, "lines": tally.lines, "records": tally.records,
            "damaged_lines": tally.broken, "first_damaged_line": tally.first_broken or None, "notes": tally.notes,
            "runs": [run.facts() for run in self.runs],
        }  # fmt: skip


def diagnose(path: Path, own: dict[str, str] | None = None) -> LogDiagnosis:
    """The diagnosis of one file; Unreadable if it holds no record of a known form, or no metric that a rule reads.
    `own`: names of metrics that the user gives, rule's name to log's name."""
    tally = ReadTally()
    runs = collect(read(path, tally), own)
    if not tally.records:
        damaged = f"; {tally.broken} lines look like records and are damaged" if tally.broken else ""
        raise Unreadable(
            f"{path}: {tally.lines} lines and no record of a known form{damaged}. Known: trainer_state.json, "
            "trackio's database, W&B's CSV, JSON lines, and what TRL, verl, prime-rl and OpenRLHF print"
        )
    made = LogDiagnosis(path, tally, [judge(name(run, own)) for run in runs if run.columns.steps])
    if not any(run.named.called for run in made.runs):
        some = sorted({each for run in runs for each in run.other})[:8]
        raise Unreadable(
            f"{path}: {tally.records} records, but none of their metrics is known"
            + (f" (they have {', '.join(some)})" if some else "")
            + "; name them: --metric reward=NAME --metric entropy=NAME"
        )
    return made


def judge(named: Named) -> RunDiagnosis:
    """Follows a run record by record, as it was while it ran."""
    history = MetricHistory()
    stretches: dict[str, Stretch] = {}
    past: dict[str, tuple[int, int]] = {}
    number, step = 0, 0
    for number, (step, values) in enumerate(named.rows(), 1):
        history.add(values)
        for rule in RULES:
            if (alarm := rule.judge(history)) is None:
                continue
            held = stretches.get(alarm.code)
            if held is None or number - held.last > GAP:
                held = stretches[alarm.code] = Stretch(number, step, number, alarm)
            held.last, held.alarm = number, alarm
            past[alarm.code] = (past.get(alarm.code, (step, step))[0], step)
    now = {
        code: held
        for code, held in stretches.items()
        if held.last == number and number - held.first + 1 >= LASTS.get(code, 1)
    }
    order = ordered((code, held.first, held.first <= 2 * WINDOW) for code, held in now.items())
    return RunDiagnosis(
        named.run,
        named,
        number,
        [_finding(code, now[code], follows, named) for code, follows in order],
        [(code, *steps) for code, steps in past.items() if code not in now and steps[1] > steps[0]],
        _not_judged(history),
    )


def _finding(code: str, held: Stretch, follows: Sequence[str], named: Named) -> Finding:
    advice = held.alarm.advice
    if named.key != "bessemer" and code in ADVICE:
        settings = TRAINERS[named.key].settings if named.key else {}
        advice = ADVICE[code].format_map({key: settings.get(key, word) for key, word in PLAIN.items()})
    needed = [metric for rule in RULES if code in rule.codes for metric in rule.needs]
    curves: dict[str, list[tuple[int, float]]] = {each: [] for each in dict.fromkeys(needed) if each in named.called}
    for step, values in named.rows():
        for metric, points in curves.items():
            if (value := values.get(metric)) is not None and math.isfinite(value):
                points.append((step, value))
    return Finding(
        code, held.step, held.alarm.message, held.alarm.cause, advice, list(follows),
        {metric: _thinned(points) for metric, points in curves.items() if points},
    )  # fmt: skip


POINTS = 120


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS points, each the mean of its neighbours."""
    if len(points) <= POINTS:
        return points
    size = -(-len(points) // POINTS)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [(part[0][0], sum(value for _, value in part) / len(part)) for part in parts]


def _not_judged(history: MetricHistory) -> dict[str, list[str]]:
    """Alarm -> the metrics it lacks, of the rule that lacks the fewest."""
    missing: dict[str, list[str]] = {}
    for rule in RULES:
        lacks = rule.lacks(history)
        for code in rule.codes:
            missing[code] = min(missing.get(code, lacks), lacks, key=len)
    return {code: lacks for code, lacks in missing.items() if lacks}
