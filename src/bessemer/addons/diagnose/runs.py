"""Records to runs: which runs a log holds, which trainer wrote it, and the values under the rules' own names.

Records of a step are one (trainers write a step in several, and some in several processes, of which one is ahead).
Where a metric's steps go back, the run was resumed, and the later values replace the earlier ones; where they go back
to the beginning, another run begins.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .formats import LogRecord
from .names import PREFIX, TRAINERS, Pattern, TrainerNames, every_name, patterns, recognise

AGAIN = 3
"""Steps from a run's first within which a step that goes back begins another run."""


class Columns:
    """A run's values by the trainer's names: float64 columns, NaN for what is missing or null (`null` tells apart), and
    infinity for what was written and is not finite. A column ends with the last row in which its metric stands."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, array[float]] = {}
        self.null: dict[str, set[int]] = {}
        """Rows in which a metric stands as null."""

    def row(self, step: int) -> int:
        """The number of the row of `step`, which is made if there is none."""
        at = bisect_left(self.steps, step)
        if at == len(self.steps) or self.steps[at] != step:
            self.steps.insert(at, step)
            for column in self.values.values():
                if at < len(column):
                    column.insert(at, math.nan)
            for name, rows in self.null.items():
                self.null[name] = {row + (row >= at) for row in rows}
        return at

    def put(self, name: str, at: int, value: float | None) -> None:
        column = self.values.setdefault(name, array("d"))
        column.extend([math.nan] * (at + 1 - len(column)))
        if value is None:
            self.null.setdefault(name, set()).add(at)
        else:
            column[at] = value if math.isfinite(value) else math.inf

    def last(self, name: str) -> float:
        """The last step in which a metric stands; minus infinity for none."""
        column = self.values.get(name)
        return self.steps[len(column) - 1] if column else -math.inf

    def drop_from(self, step: int) -> int:
        """Forgets the rows at `step` and later; returns how many."""
        kept = next((n for n, each in enumerate(self.steps) if each >= step), len(self.steps))
        dropped = len(self.steps) - kept
        del self.steps[kept:]
        for column in self.values.values():
            del column[kept:]
        for name, rows in self.null.items():
            self.null[name] = {row for row in rows if row < kept}
        return dropped

    def at(self, name: str, row: int) -> tuple[bool, float | None]:
        """(whether the metric stands in this row, its value: infinity if it is not finite, None for null)."""
        column = self.values[name]
        value = column[row] if row < len(column) else math.nan
        if not math.isnan(value):
            return True, value
        return row in self.null.get(name, ()), None


@dataclass
class LoggedRun:
    """One run of a log. `series`: the rules' names, each with (step, value or NaN) where it was written."""

    name: str
    columns: Columns = field(default_factory=Columns)
    notes: list[str] = field(default_factory=list)
    other: set[str] = field(default_factory=set)
    """Names that no pattern of any trainer matches."""
    by_order: bool = False
    """The log has no steps; they are the records' numbers."""


def collect(records: Iterable[LogRecord], own: dict[str, str] | None = None) -> list[LoggedRun]:
    """The runs in the order of the log."""
    wanted = _Wanted(own or {})
    open_runs: dict[str, LoggedRun] = {}
    done: list[LoggedRun] = []
    for record in records:
        run = open_runs.get(record.run)
        if run is None:
            run = open_runs[record.run] = LoggedRun(record.run)
            done.append(run)
        kept = {name: value for name, value in record.values.items() if wanted(name)}
        run.other |= record.values.keys() - kept.keys() if len(run.other) < 1000 else set()
        if not kept:
            continue
        steps = run.columns.steps
        step = record.step
        if step is None:
            run.by_order, step = True, steps[-1] + 1 if steps else 1
        if any(step < run.columns.last(name) for name in kept):
            if step <= steps[0] + AGAIN and steps[-1] > steps[0] + 2 * AGAIN:
                run = open_runs[record.run] = LoggedRun(record.run)
                done.append(run)
            else:
                dropped = run.columns.drop_from(step)
                run.notes.append(f"resumed at step {step}: {dropped} earlier records of the same steps are left out")
        at = run.columns.row(step)
        for name, value in kept.items():
            run.columns.put(name, at, value)
    several, same = len(done) > 1, Counter(run.name for run in done)
    for number, run in enumerate(done, 1):
        if several and (not run.name or same[run.name] > 1):
            run.name = f"{run.name} run {number}".strip()
    return done


class _Wanted:
    """Whether any trainer's pattern matches a name; remembered, since a log repeats its names."""

    def __init__(self, own: dict[str, str]) -> None:
        self.every = every_name(own)
        self.known: dict[str, bool] = {}

    def __call__(self, name: str) -> bool:
        if name not in self.known:
            if len(self.known) > 100_000:
                return False
            self.known[name] = any(regex.fullmatch(name) for regex in self.every)
        return self.known[name]


@dataclass
class Named:
    """A run under the rules' names: metric -> (the log's name, its values by row)."""

    run: LoggedRun
    key: str | None
    """Of TRAINERS; None if the trainer is not known, and then names are read as TRL's and ours are."""
    used: dict[str, Pattern] = field(default_factory=dict)
    called: dict[str, str] = field(default_factory=dict)
    """Metric -> the name in the log."""
    refused: dict[str, str] = field(default_factory=dict)
    """Metrics that a name was found for, and why it is not used."""

    @property
    def trainer(self) -> TrainerNames | None:
        return TRAINERS.get(self.key or "")

    def rows(self) -> Iterator[tuple[int, dict[str, float | None]]]:
        """(step, values) of every record; NaN where a value is not finite, None where it is null."""
        columns = self.run.columns
        moved: set[str] = set()
        for row, step in enumerate(columns.steps):
            values: dict[str, float | None] = {}
            for metric, name in self.called.items():
                pattern = self.used[metric]
                is_there, value = columns.at(name, row)
                if not is_there:
                    continue
                if pattern.beside and not self._beside(pattern.beside, row):
                    continue
                if pattern.moves and metric not in moved:
                    if not value:
                        continue
                    moved.add(metric)
                if value is not None:
                    value = math.nan if math.isinf(value) else 1 - value if pattern.inverted else value
                values[metric] = value
            if values:
                yield step, values

    def _beside(self, name: str, row: int) -> bool:
        columns = self.run.columns
        return any(each in columns.values and columns.at(each, row)[0] for each in (name, PREFIX + name))


WIDE = 1.25
"""Of values from 0 to 1 with the mean m, the standard deviation is at most sqrt(m (1 - m)), or 1.15 times that as it is
estimated from four. If a right answer pays 2 it is sqrt(m (2 - m)), at least 1.41 times as large."""


def no_share(columns: Columns, name: str) -> str:
    """Why a metric's values are no shares; empty if they can be."""
    means = columns.values[name]
    if any(math.isfinite(value) and not 0 <= value <= 1 for value in means):
        return "leaves 0 to 1"
    spreads = columns.values.get(f"{name.removesuffix('/mean')}/std", ())
    known = [(mean, std) for mean, std in zip(means, spreads, strict=False) if math.isfinite(mean + std) and std > 0]
    wide = sum(std > WIDE * math.sqrt(mean * (1 - mean)) + 1e-3 for mean, std in known)
    return "varies more than values from 0 to 1 can" if 2 * wide > len(known) else ""


def name(run: LoggedRun, own: dict[str, str] | None = None) -> Named:
    """Finds the trainer and the rules' metrics among a run's names."""
    names = {*run.columns.values}
    key = recognise(names | run.other)
    named = Named(run, key)
    trainer = TRAINERS[key] if key else TRAINERS["trl"]
    for pattern in sorted(patterns(trainer, own), key=lambda each: each.rank):
        fits = sorted(each for each in names if pattern.regex.fullmatch(each))
        if pattern.metric in named.called or not fits:
            continue
        if len(fits) > 1:
            run.notes.append(f"{pattern.metric}: {fits[0]} is read; {', '.join(fits[1:3])} would fit as well")
        if pattern.share and (why := no_share(run.columns, fits[0])):
            named.refused[pattern.metric] = f"{fits[0]} {why}, so it is no share of answers"
            continue
        named.used[pattern.metric], named.called[pattern.metric] = pattern, fits[0]
    if key:
        for other, why in TRAINERS[key].known.items():
            if any(each.removeprefix(PREFIX) == other for each in names):
                named.refused.setdefault(other, why)
    return named
