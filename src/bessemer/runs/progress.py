"""How far a run is: a line every ten seconds. Progress is only for people: nothing reads it back. An add-on shows bars
and estimates how long the whole run will take (the hook `progress`)."""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.text import Text

from bessemer import plugins
from bessemer.config.units import show_seconds, show_tokens
from bessemer.escape import escaped

PLAIN_EVERY = 10.0  # seconds between lines when the output is not a terminal


class RunProgress:
    """The whole run: its stages, with the seconds that they are expected to take, 0 if nobody knows."""

    every = PLAIN_EVERY
    """Seconds between two signs of progress."""

    def __init__(
        self, estimates: Mapping[str, float], out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        until: str | None = None,
    ) -> None:  # fmt: skip
        """Stages after `until` do not count."""
        self.estimates, self.clock, self.until = dict(estimates), clock, until
        self.console = Console(file=out or sys.stderr, highlight=False, soft_wrap=True)
        self.said_once: set[str] = set()
        """Lines that need not be said again, such as what all stages compute in."""

    def say(self, message: RenderableType) -> None:
        """Print text, or anything that rich can render. Text is printed without rich's markup, and with control
        characters escaped: it may quote a model."""
        self.console.print(Text(escaped(message)) if isinstance(message, str) else message)

    def expect(self, expected: Any, root: Path) -> None:
        """What the hook `estimate` expects of the run in `root`; only the hook `progress` reads it."""

    def begin(self, name: str) -> "StageProgress":
        return StageProgress(self, name)

    def end(self, name: str, seconds: float) -> None:
        """Record the total seconds of `name`; for a skipped stage, those of the earlier run."""

    def close(self) -> None:
        """Ends what is shown of the stage that runs."""

    def advanced(self, stage: "StageProgress", work: float, cost: float) -> None:
        """`stage` has done `work` more, at this `cost` (`StageProgress.advance`)."""

    def left(self, stage: "StageProgress") -> float | None:
        """Seconds left of a stage, at the speed of this attempt; None if there is none yet."""
        fresh, remaining = stage.done - stage.done_at_start, max(0.0, stage.work - stage.done)
        return (self.clock() - stage.started) * remaining / fresh if fresh > 0 and stage.work > 0 else None

    def show(self, stage: "StageProgress") -> None:
        seconds = self.left(stage)
        words = stage.words() + ("" if seconds is None else f" · {show_seconds(seconds)} left")
        self.say(f"[{self.place(stage)}] {stage.share():4.0%} {words}")

    def place(self, stage: "StageProgress") -> str:
        """The stage's name, after its number."""
        names = list(self.estimates)
        return f"{names.index(stage.name) + 1}/{len(names)} {stage.name}" if names else f" {stage.name}"


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

    def advance(self, work: float = 1.0, note: str = "", cost: float | None = None) -> None:
        """Add `work` to the work done; `note` is a few words such as "loss 3.21". `cost`: where equal work does not
        take equally long, what it brought of `StageWork.each`."""
        self.done += work
        self.note = note or self.note
        self.run.advanced(self, work, work if cost is None else cost)
        now = self.run.clock()
        if now - self.shown >= self.run.every:
            self.shown = now
            self.run.show(self)

    def say(self, text: RenderableType) -> None:
        self.run.say(text)

    def elapsed(self) -> float:
        return self.run.clock() - self.began

    def share(self) -> float:
        return min(1.0, self.done / self.work) if self.work > 0 else 0.0

    def words(self) -> str:
        amount = f"{show_tokens(self.done)}/{show_tokens(self.work)} {self.units}" if self.work else ""
        return " · ".join(part for part in (amount, self.note) if part)


def shown(estimates: Mapping[str, float], until: str | None = None) -> RunProgress:
    """The progress of a run, on the terminal, as the installed add-ons show it."""
    progress: RunProgress = (plugins.hook("progress") or RunProgress)(estimates, until=until)
    return progress
