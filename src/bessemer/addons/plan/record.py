"""How far a predicted time may be off: the interval of the next run, from what earlier ones took.

A run's own finished stages come first: their measured seconds over the predicted ones scale the rest of it, and their
spread gives the interval. Before anything of the run is measured, `record.toml` does: the published runs for a cluster,
this repository's own for this machine. Ratios are log-normal; the interval holds the next one in 90 of 100 cases.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scipy import stats

from bessemer.addons.plan.hardware import read_toml
from bessemer.config.units import show_seconds
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json

CONFIDENCE = 0.9
FINISHED = "finished stages of this run"


@dataclass(frozen=True)
class TimeFactors:
    """Factors on a predicted time: the likely one, and the bounds of nine cases in ten."""

    low: float
    middle: float
    high: float
    n: int
    """Runs or stages behind it."""
    by: str = "published runs"
    """What they are."""

    def facts(self, seconds: float) -> dict[str, float]:
        """The times, as JSON."""
        return {"low": self.low * seconds, "likely": self.middle * seconds, "high": self.high * seconds}

    @property
    def source(self) -> str:
        return f"{self.n} {self.by}"

    def describe(self, seconds: float) -> str:
        return f"{show_seconds(self.low * seconds)} to {show_seconds(self.high * seconds)}"


def next_ratio(ratios: Sequence[float], by: str = "published runs") -> TimeFactors:
    """The interval of the next ratio: Student's t on the logarithms (a prediction interval)."""
    logs = [math.log(ratio) for ratio in ratios]
    n, mean = len(logs), statistics.fmean(logs)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(logs) * math.sqrt(1 + 1 / n)
    return TimeFactors(math.exp(mean - half), math.exp(mean), math.exp(mean + half), n, by)


@cache
def of_clusters() -> TimeFactors:
    """Of a time that is predicted for a cluster: slower rates are longer times."""
    return next_ratio([1 / ratio for ratio in read_toml("record.toml")["published"]])


@cache
def of_this_machine() -> TimeFactors:
    """Of a time that is predicted from a measurement here."""
    return next_ratio(read_toml("record.toml")["local"], "earlier runs here")


def of_run(predicted: Mapping[str, float], measured: Mapping[str, float], otherwise: TimeFactors) -> TimeFactors:
    """Of the stages of a run that are not finished: by its finished ones, with the spread of `otherwise` while fewer
    than three are; `otherwise` itself while none is."""
    ratios = [
        measured[name] / predicted[name] for name in measured if predicted.get(name, 0) > 0 and measured[name] > 0
    ]
    if not ratios:
        return otherwise
    if len(ratios) >= 3:
        return next_ratio(ratios, FINISHED)
    middle = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
    scale = middle / otherwise.middle
    return TimeFactors(otherwise.low * scale, middle, otherwise.high * scale, len(ratios), FINISHED)


def measured(run: Path | None) -> dict[str, float]:
    """Seconds of the stages that a run has finished; empty if there is none."""
    finished = {}
    for _, name, folder in stage_folders(run) if run is not None and run.is_dir() else ():
        if (done := read_json(folder / "done.json")) is not None:
            finished[name] = done["seconds"]
    return finished


def of_facts(interval: TimeFactors) -> dict[str, Any]:
    """The interval itself, as JSON: factors on every predicted time of the plan."""
    return {
        "low": interval.low,
        "likely": interval.middle,
        "high": interval.high,
        "runs": interval.n,
        "by": interval.by,
    }
