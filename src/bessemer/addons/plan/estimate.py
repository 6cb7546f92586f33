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
from bessemer.addons.plan.record import TimeFactors
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.pipeline.work import ANSWER
from bessemer.train import setup


@dataclass(frozen=True)
class LocalEstimate:
    """Predicted seconds by stage, and the measured rates behind them."""

    stages: dict[str, float]
    rates: dict[str, float]
    measured: dict[str, float]
    """Seconds of the stages that a run has finished."""
    notes: tuple[str, ...]

    @property
    def interval(self) -> TimeFactors:
        """Factors on the times of the stages that are not finished."""
        return record.of_run(self.stages, self.measured, record.of_this_machine())

    def facts(self) -> dict[str, Any]:
        rows = [
            {"stage": name, "planned_seconds": seconds, "measured_seconds": self.measured.get(name),
             "interval_seconds": self.interval.facts(seconds)}
            for name, seconds in self.stages.items()
        ]  # fmt: skip
        left = sum(seconds for name, seconds in self.stages.items() if name not in self.measured)
        return {
            "stages": rows,
            "planned_seconds": sum(self.stages.values()),
            "interval": record.of_facts(self.interval),
            "interval_seconds_left": self.interval.facts(left),
            **self.rates,
            "assumptions": list(self.notes),
        }

    def describe(self) -> str:
        """The estimate for a terminal."""
        lines = [f"{'stage':<16}{'planned':>12}{'measured':>12}{'error':>9}  nine in ten"]
        for name, seconds in self.stages.items():
            real = self.measured.get(name)
            measured = f"{self.interval.describe(seconds):>34}"
            if real is not None:
                measured = f"{show_seconds(real):>12}{100 * (seconds / real - 1):>+8.0f}%"
            lines.append(f"{name:<16}{show_seconds(seconds):>12}{measured}")
        lines.append(f"{'in all':<16}{show_seconds(sum(self.stages.values())):>12}")
        lines += [f"{name.replace('_', ' ')}: {value:,.0f}" for name, value in self.rates.items()]
        lines.append(
            f"nine in ten: by {self.interval.source}, {self.interval.middle:.2f} x the planned time on average"
        )
        return "\n".join([*lines, *self.notes])


def estimate(recipe: Recipe, seconds: float = 8.0, run: Path | None = None) -> LocalEstimate:
    """`seconds`: of each measurement; `run`: directory to compare with, if it exists. Needs a pre-training stage."""
    settings, *_ = pretraining(recipe, needed_for="--here measures")
    setup.keep_memory()
    pace = Pace(recipe, seconds, worth=0.0, base=settings)
    stages = pace.of_stages(recipe.stages)
    notes = (
        f"answers of {100 * ANSWER:.0f} % of their cap; the reading of texts is not measured",
        "the machine as busy as it was while measuring" + ("; layers compiled" if pace.compiled else ""),
    )
    return LocalEstimate(stages, pace.shown, record.measured(run), notes)
