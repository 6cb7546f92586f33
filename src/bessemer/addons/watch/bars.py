"""How long a run will still take (the hook `progress`): as bars on a terminal, as a line every ten seconds in a log.

The stage's time left follows from its own progress (`speed`); the run's adds what is expected of the later stages,
corrected by what those of this call have shown (`expected`). It is also kept in the run's directory, for the live page.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bessemer.addons.watch.expected import MACHINE, Expected, ExpectedTime
from bessemer.addons.watch.speed import StageSpeed
from bessemer.config.units import show_seconds
from bessemer.runs.directory import PLAN, stage_folders
from bessemer.runs.files import read_json, write_json
from bessemer.runs.progress import PLAIN_EVERY, RunProgress, StageProgress

RELATIVE = 3.0
"""Standard deviation of the logarithm of a common factor on estimates that may be mere weights."""


class TimedProgress(RunProgress):
    """Progress with estimated times."""

    def __init__(
        self, estimates: Mapping[str, float], out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        until: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(estimates, out, clock, until)
        names = list(estimates)
        ahead = names if until is None else names[: names.index(until) + 1]
        times = {name: ExpectedTime(seconds) for name, seconds in estimates.items()}
        self.expected = Expected(times, tuple(ahead), {MACHINE: RELATIVE})
        self.root: Path | None = None
        self.spent: dict[str, float] = {}
        self._seen: dict[str, tuple[float, float]] = {}
        """Of the stages of this call: how much longer than planned they took, and how far that may be off."""
        self._stage: StageProgress | None = None
        self._speed: StageSpeed | None = None
        self._kept, self._processor = -math.inf, 0.0
        self._bars: Progress | None = None
        self._tasks: tuple[TaskID, TaskID] | None = None
        self.every = 0.2 if self.console.is_terminal else PLAIN_EVERY
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<14}", markup=False), BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}% {task.fields[words]}", markup=False),
                console=self.console, transient=True,
            )  # fmt: skip

    def expect(self, expected: Expected | None, root: Path) -> None:
        self.expected, self.root = expected or self.expected, root

    def begin(self, name: str) -> StageProgress:
        if self._bars is not None:
            self._bars.start()
            self._tasks = (
                self._bars.add_task(name, total=1.0, words=""),
                self._bars.add_task("whole run", total=1.0, words=""),
            )
        self._stage, self._speed, self._processor = super().begin(name), None, time.process_time()
        return self._stage

    def end(self, name: str, seconds: float) -> None:
        self.spent[name] = seconds
        stage, planned = self._stage, self._time(name).seconds
        if stage is not None and stage.name == name and seconds <= stage.elapsed() + 1:  # all of it in this call
            if planned > 0:
                self._seen[name] = seconds / planned, 0.0
            processor = time.process_time() - self._processor
            self.expected.learn(name, seconds, processor / seconds if seconds > 0 else 0.0)
        self.close()

    def close(self) -> None:
        if self._bars is not None and self._tasks is not None:
            for task in self._tasks:
                self._bars.remove_task(task)
            self._bars.stop()
            self._tasks = None

    def advanced(self, stage: StageProgress, work: float, cost: float) -> None:
        if (speed := self._speed_of(stage)) is not None:
            speed.saw(work, cost, self.clock())

    def left(self, stage: StageProgress) -> float | None:
        """Seconds left of a stage: as planned until it knows its work; None if nothing says."""
        if (speed := self._speed_of(stage)) is not None:
            return speed.left(self.clock())
        planned = self._time(stage.name).seconds * self.expected.factors(self._seen).get(stage.name, 1.0)
        return max(0.0, planned - stage.elapsed()) or None

    def run_left(self, stage: StageProgress, remaining: float) -> float:
        """Seconds left of the run while `stage` has `remaining` seconds to go."""
        speed = self._speed_of(stage)
        seen = self._seen | ({} if speed is None else {stage.name: speed.factor()})
        factors, load = self.expected.factors(seen), 1.0 if speed is None else speed.load()
        later = [name for name in self.expected.due if name not in self.spent and name != stage.name]
        return remaining + load * sum(factors[name] * self._time(name).seconds for name in later)

    def _time(self, name: str) -> ExpectedTime:
        return self.expected.stages.get(name, ExpectedTime(0.0))

    def _speed_of(self, stage: StageProgress) -> StageSpeed | None:
        """None until the stage knows its work."""
        if stage.work > 0 and (self._speed is None or stage is not self._stage):
            factor = self.expected.factors(self._seen).get(stage.name, 1.0)
            done, began = stage.done_at_start, stage.started
            self._stage, self._speed = stage, StageSpeed(self._time(stage.name), factor, stage.work, done, began)
        return self._speed

    def show(self, stage: StageProgress) -> None:
        seconds, words = self.left(stage), stage.words()
        run_words, run_share = "", 0.0
        if seconds is not None:
            run_left = self.run_left(stage, seconds)
            self._keep(run_left)
            so_far = sum(self.spent.values()) + stage.elapsed()
            run_share = so_far / (so_far + run_left) if so_far + run_left > 0 else 0.0
            run_words = f"{show_seconds(run_left)} left"
            words += f" · {show_seconds(seconds)} left"
        if self._bars is not None and self._tasks is not None:
            self._bars.update(self._tasks[0], completed=stage.share(), words=words)
            self._bars.update(self._tasks[1], completed=run_share, words=run_words)
        elif self._bars is None:
            tail = f" · run {run_words}" if run_words else ""
            self.say(f"[{self.place(stage)}] {stage.share():4.0%} {words}{tail}")

    def _keep(self, seconds: float) -> None:
        """Records the seconds that are left in the run's directory, at most every ten seconds."""
        if self.root is None or self.clock() - self._kept < PLAIN_EVERY:
            return
        self._kept = self.clock()
        with suppress(OSError):  # a full disk is the stage's to report
            plan = read_json(self.root / PLAN) or {}
            write_json(self.root / PLAN, plan | {"left": {"seconds": round(seconds, 1), "time": round(time.time(), 1)}})


def record_plan(root: Path, expected: Expected) -> dict[str, float]:
    """Record what each stage is expected to take, for views that compare it with the measured time; for a stage that
    has begun, what was expected before it began. Returns the seconds."""
    begun = {name for _, name, _ in stage_folders(root)}
    recorded = (read_json(root / PLAN) or {}).get("seconds", {})
    still_begun = {name: value for name, value in recorded.items() if name in begun and isinstance(value, int | float)}
    merged = {name: float(still_begun.get(name, round(of.seconds, 3))) for name, of in expected.stages.items()}
    if expected.due or recorded != merged:
        write_json(root / PLAN, {"seconds": merged, "interval": expected.interval().facts(), "share": expected.share})
    return merged
