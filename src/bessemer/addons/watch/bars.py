"""How long a run will still take (the hook `progress`): as bars on a terminal, as a line every ten seconds in a log.

The stage's time left begins as its estimate and goes over to the speed of this attempt by a fifth of the work; the
run's adds the later stages' estimates, scaled by how the stages of this call compare with theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bessemer.config.units import show_seconds
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json, write_json
from bessemer.runs.progress import PLAIN_EVERY, RunProgress, StageProgress

PLAN = "plan.json"
"""In a run directory: {"seconds": {stage: estimate}}."""
SURE = 0.2
"""Share of a stage's work from which on its speed so far says how long the rest takes."""
PRIOR = 0.25
"""Part of the whole run's estimate that the stages so far must outweigh before they rescale the later ones."""


class TimedProgress(RunProgress):
    """Progress with estimated times."""

    def __init__(
        self, estimates: Mapping[str, float], out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
        until: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(estimates, out, clock, until)
        names = list(estimates)
        self.ahead = names if until is None else names[: names.index(until) + 1]
        self.spent: dict[str, float] = {}
        self._ran: dict[str, float] = {}
        """Seconds of the stages of this call."""
        self._bars: Progress | None = None
        self._tasks: tuple[TaskID, TaskID] | None = None
        self.every = 0.2 if self.console.is_terminal else PLAIN_EVERY
        if self.console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:<14}", markup=False), BarColumn(bar_width=28),
                TextColumn("{task.percentage:>3.0f}% {task.fields[words]}", markup=False),
                console=self.console, transient=True,
            )  # fmt: skip

    def begin(self, name: str) -> StageProgress:
        if self._bars is not None:
            self._bars.start()
            self._tasks = (
                self._bars.add_task(name, total=1.0, words=""),
                self._bars.add_task("whole run", total=1.0, words=""),
            )
        self._ran[name] = 0.0
        return super().begin(name)

    def end(self, name: str, seconds: float) -> None:
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

    def run_left(self, name: str, elapsed: float, remaining: float) -> float:
        """Seconds left of the run while `name`, started `elapsed` seconds ago, has `left` to go."""
        took = self._ran | {name: elapsed + remaining}
        known = [stage for stage in took if stage not in self.texts and stage in self.spent.keys() | {name}]
        prior = PRIOR * sum(self.estimates[stage] for stage in self.ahead)
        estimated = sum(self.estimates.get(stage, 0.0) for stage in known) + prior
        scale = (sum(took[stage] for stage in known) + prior) / estimated if estimated > 0 else 1.0
        return remaining + sum(
            (1.0 if stage in self.texts else scale) * self.estimates[stage]
            for stage in self.ahead
            if stage not in self.spent and stage != name
        )

    def left(self, stage: StageProgress) -> float | None:
        """Seconds left: by the estimate at first, then at the speed of this attempt; None if neither says."""
        fresh, remaining = stage.done - stage.done_at_start, max(0.0, stage.work - stage.done)
        part = (stage.work - stage.done_at_start) / stage.work if stage.work > 0 else 1.0
        planned = max(0.0, part * self.estimates.get(stage.name, 0.0) - stage.elapsed())
        measured = super().left(stage)
        if measured is None:
            return planned or None
        trust = min(1.0, fresh / (fresh + remaining) / SURE)
        return trust * measured + (1 - trust) * planned

    def show(self, stage: StageProgress) -> None:
        seconds, words = self.left(stage), stage.words()
        run_words, run_share = "", 0.0
        if seconds is not None:
            run_left = self.run_left(stage.name, stage.elapsed(), seconds)
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


def record_plan(root: Path, seconds: dict[str, float]) -> dict[str, float]:
    """Record each stage's estimated seconds, for views that compare them with the measured ones; those of a stage
    that has begun stay what they were before it began. Returns them."""
    begun = {name for _, name, _ in stage_folders(root)}
    recorded = (read_json(root / PLAN) or {}).get("seconds", {})
    still_begun = {name: value for name, value in recorded.items() if name in begun and isinstance(value, int | float)}
    merged = {name: float(still_begun.get(name, round(value, 3))) for name, value in seconds.items()}
    if recorded != merged:
        write_json(root / PLAN, {"seconds": merged})
    return merged
