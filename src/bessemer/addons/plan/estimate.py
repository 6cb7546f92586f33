"""How long a recipe takes on this machine, from a few seconds of measurement (`bessemer plan RECIPE --here`).

Measured: optimizer steps on rows of pre-training, once for every network, precision, FP8, optimizer and micro-batch
that a stage trains with; decoding with networks of those shapes (`pipeline.pace`). Assumed: the length of answers (half
of their cap) and the speed of reading texts. If the run exists, planned times are compared with those it measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.addons.plan import record
from bessemer.addons.plan.pace import Pace
from bessemer.addons.plan.plan_config import pretraining
from bessemer.addons.watch.expected import Expected, TimeInterval
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.pipeline.work import ANSWER
from bessemer.train import setup


@dataclass(frozen=True)
class LocalEstimate:
    """Predicted seconds by stage, and the measured rates behind them."""

    expected: Expected
    rates: dict[str, float]
    measured: dict[str, float]
    """Seconds of the stages that a run has finished."""
    notes: tuple[str, ...]

    @property
    def stages(self) -> dict[str, float]:
        """Planned seconds, before anything of the run is measured."""
        return {name: time.seconds for name, time in self.expected.stages.items()}

    def interval(self, *names: str) -> TimeInterval:
        """Seconds of these stages together, by the finished ones."""
        planned = self.stages
        seen = {name: (took / planned[name], 0.0) for name, took in self.measured.items() if planned.get(name)}
        return self.expected.interval(names, seen)

    def facts(self) -> dict[str, Any]:
        rows = [
            {"stage": name, "planned_seconds": seconds, "measured_seconds": self.measured.get(name),
             "interval_seconds": self.interval(name).facts()}
            for name, seconds in self.stages.items()
        ]  # fmt: skip
        left = [name for name in self.stages if name not in self.measured]
        return {
            "stages": rows,
            "planned_seconds": sum(self.stages.values()),
            "interval_seconds_left": self.interval(*left).facts(),
            **self.rates,
            "assumptions": list(self.notes),
        }

    def describe(self) -> str:
        """The estimate for a terminal."""
        lines = [f"{'stage':<16}{'planned':>12}{'measured':>12}{'error':>9}  likely (nine in ten)"]
        for name, seconds in self.stages.items():
            real = self.measured.get(name)
            measured = f"{'':>23}{self.interval(name).describe()}"
            if real is not None:
                measured = f"{show_seconds(real):>12}{100 * (seconds / real - 1):>+8.0f}%"
            lines.append(f"{name:<16}{show_seconds(seconds):>12}{measured}")
        lines.append(f"{'in all':<16}{show_seconds(sum(self.stages.values())):>12}")
        lines += [f"{name.replace('_', ' ')}: {value:,.0f}" for name, value in self.rates.items()]
        behind = f"{len(self.measured)} finished stages of this run" if self.measured else "earlier runs"
        return "\n".join([*lines, f"likely times: by {behind}", *self.notes])


def estimate(recipe: Recipe, seconds: float = 8.0, run: Path | None = None) -> LocalEstimate:
    """`seconds`: of each measurement; `run`: directory to compare with, if it exists. Needs a pre-training stage."""
    settings, *_ = pretraining(recipe, needed_for="--here measures")
    setup.keep_memory()
    pace = Pace(recipe, seconds, worth=0.0, base=settings)
    stages = pace.of_stages(recipe.stages)
    expected = Expected(stages, tuple(stages), record.spreads(pace.busy()))
    notes = (
        f"answers of {100 * ANSWER:.0f} % of their cap; the reading of texts is not measured",
        "the machine as busy as it was while measuring" + ("; layers compiled" if pace.compiled else ""),
    )
    return LocalEstimate(expected, pace.rates(), record.measured(run), notes)
