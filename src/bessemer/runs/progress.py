"""How far a run is and how long it will still take: as bars on a terminal, as a line every ten seconds in a log.

The stage's time left begins as its estimate and goes over to the speed of this attempt by a fifth of the work; the
run's adds the later stages' estimates, scaled by how the stages of this call compare with theirs. Progress is only for
people: nothing reads it back.
"""

import sys
import time
from collections.abc import Callable, Collection
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from bessemer.config.units import show_seconds, show_tokens
from bessemer.escape import escaped

PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal
SURE = 0.2
"""Share of a stage's work from which on its speed so far says how long the rest takes."""
PRIOR = 0.25
"""Part of the whole run's estimate that the stages so far must outweigh before they rescale the later ones."""


class RunProgress:
    """The whole run: stages with their estimated seconds. Stages after `until` do not count."""

    def __init__(
        self, estimates: dict[str, float], out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        until: str | None = None,
    ) -> None:  # fmt: skip
        self.estimates, self.clock = estimates, clock
        names = list(estimates)
        self.ahead = names if until is None else names[: names.index(until) + 1]
        self.console = Console(file=out or sys.stderr, highlight=False, soft_wrap=True)
        self.texts: Collection[str] = ()
        """Stages in which no model works: how long they take says nothing about the others."""
        self.spent: dict[str, float] = {}
        self._ran: dict[str, float] = {}
        """Seconds of the stages of this call."""
        self.said_once: set[str] = set()
        """Lines that need not be said again, such as what all stages compute in."""
        self._bars: Progress | None = None
        self._tasks: tuple[TaskID, TaskID] | None = None
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<14}", markup=False), BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}% {task.fields[words]}", markup=False),
                console=self.console, transient=True,
            )  # fmt: skip

    def say(self, what: RenderableType) -> None:
        """Print text, or anything that rich can render, above the bars. Text is printed without rich's markup,
        and with control characters escaped: it may quote a model."""
        self.console.print(Text(escaped(what)) if isinstance(what, str) else what)

    def begin(self, name: str) -> "StageProgress":
        if self._bars is not None:
            self._bars.start()
            self._tasks = (
                self._bars.add_task(name, total=1.0, words=""),
                self._bars.add_task("whole run", total=1.0, words=""),
            )
        self._ran[name] = 0.0
        return StageProgress(self, name)

    def end(self, name: str, seconds: float) -> None:
        """Record the total seconds of `name`; for a skipped stage, those of the earlier run."""
        self.spent[name] = seconds
        if name in self._ran:
            self._ran[name] = seconds
        self.close()

    def close(self) -> None:
        if self._bars is not None and self._tasks is not None:
            for task in self._tasks:
                self._bars.remove_task(task)
            self._bars.stop()
            self._tasks = None

    def run_left(self, name: str, elapsed: float, left: float) -> float:
        """Seconds left of the run while `name`, started `elapsed` seconds ago, has `left` to go."""
        took = self._ran | {name: elapsed + left}
        known = [stage for stage in took if stage not in self.texts and stage in self.spent.keys() | {name}]
        prior = PRIOR * sum(self.estimates[stage] for stage in self.ahead)
        estimated = sum(self.estimates.get(stage, 0.0) for stage in known) + prior
        scale = (sum(took[stage] for stage in known) + prior) / estimated if estimated > 0 else 1.0
        return left + sum(
            (1.0 if stage in self.texts else scale) * self.estimates[stage]
            for stage in self.ahead
            if stage not in self.spent and stage != name
        )

    def show(self, stage: "StageProgress") -> None:
        left = stage.left()
        words = stage.words()
        run_words, run_share = "", 0.0
        if left is not None:
            run_left = self.run_left(stage.name, stage.elapsed(), left)
            so_far = sum(self.spent.values()) + stage.elapsed()
            run_share = so_far / (so_far + run_left) if so_far + run_left > 0 else 0.0
            run_words = f"{show_seconds(run_left)} left"
            words += f" · {show_seconds(left)} left"
        if self._bars is not None and self._tasks is not None:
            self._bars.update(self._tasks[0], completed=stage.share(), words=words)
            self._bars.update(self._tasks[1], completed=run_share, words=run_words)
        elif self._bars is None:
            place = f"{list(self.estimates).index(stage.name) + 1}/{len(self.estimates)}" if self.estimates else ""
            tail = f" · run {run_words}" if run_words else ""
            self.say(f"[{place} {stage.name}] {stage.share():4.0%} {words}{tail}")


class StageProgress:
    """Progress of one stage, which calls `total` once it knows its work and `advance` as it goes."""

    def __init__(self, run: RunProgress, name: str) -> None:
        self.run, self.name = run, name
        self.units, self.work, self.done, self.done_at_start = "", 0.0, 0.0, 0.0
        self.note = ""
        self.began = self.started = self.shown = run.clock()

    def total(self, work: float, units: str = "steps", done: float = 0.0) -> None:
        """Set the stage's work in its own units, and how much of it an earlier attempt has done."""
        self.work, self.units, self.done, self.done_at_start = float(work), units, float(done), float(done)
        self.started = self.run.clock()

    def advance(self, work: float = 1.0, note: str = "") -> None:
        """Add `work` to the work done; `note` is a few words such as "loss 3.21"."""
        self.done += work
        self.note = note or self.note
        now = self.run.clock()
        if now - self.shown >= (0.2 if self.run.console.is_terminal else PLAIN_EVERY):
            self.shown = now
            self.run.show(self)

    def say(self, text: RenderableType) -> None:
        self.run.say(text)

    def elapsed(self) -> float:
        return self.run.clock() - self.began

    def share(self) -> float:
        return min(1.0, self.done / self.work) if self.work > 0 else 0.0

    def left(self) -> float | None:
        """Seconds left: by the estimate at first, then at the speed of this attempt; None if neither says."""
        fresh, rest = self.done - self.done_at_start, max(0.0, self.work - self.done)
        part = (self.work - self.done_at_start) / self.work if self.work > 0 else 1.0
        planned = max(0.0, part * self.run.estimates.get(self.name, 0.0) - self.elapsed())
        if fresh <= 0 or self.work <= 0:
            return planned or None
        trust = min(1.0, fresh / (fresh + rest) / SURE)
        return trust * (self.run.clock() - self.started) * rest / fresh + (1 - trust) * planned

    def words(self) -> str:
        amount = f"{show_tokens(self.done)}/{show_tokens(self.work)} {self.units}" if self.work else ""
        return " · ".join(part for part in (amount, self.note) if part)
