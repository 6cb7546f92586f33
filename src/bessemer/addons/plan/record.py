"""How far a predicted time may be off: the interval of the next run, from what earlier ones took.

`record.toml` has the published runs for a cluster, and this repository's own for a machine that is measured. A machine
remembers what the stages of its runs took, and corrects the next run by it. Ratios are log-normal; the interval holds
the next one in 90 of 100 cases.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from scipy import stats

from bessemer import __version__
from bessemer.addons.plan.hardware import read_toml
from bessemer.addons.watch.expected import CONFIDENCE, MACHINE, ExpectedTime
from bessemer.config.recipe import Recipe
from bessemer.config.units import show_seconds
from bessemer.model import ops
from bessemer.runs.directory import stage_folders
from bessemer.runs.files import read_json, write_json
from bessemer.train import setup
from bessemer.workers import cores

TRAINING, SAMPLING, TEXTS, GUESSED = CAUSES = ("training", "sampling", "texts", "guessed")
"""What a time measured here is made of: measured training, measured sampling, seconds that no token explains, and work
that was too little to measure."""
OWN = 0.04
"""Standard deviation of the logarithm of a stage's own factor."""
LIKE, AGAIN = 4, 0.05
"""A stage's first record counts with the spread `AGAIN` of that many others."""
NEWEST, STAGES = 5, 500
"""Runs of a stage, and stages, that are remembered."""
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


def spreads(busy: float = 0.0) -> dict[str, float]:
    """Cause -> standard deviation of the logarithm of the factor that it puts on a time measured here. `busy`: share of
    this machine that other work took during the measurement, and may take or not take during the run."""
    local = read_toml("record.toml")["local"]
    found = {cause: math.sqrt(statistics.fmean(math.log(ratio) ** 2 for ratio in local[cause])) for cause in local}
    return found | {MACHINE: math.hypot(found[MACHINE], busy / 2)}


class OfMachine:
    """What stages took on this machine, as ratios to what was measured and counted just before: a correction of the
    next run with the same recipe, instruction set and number of processes."""

    def __init__(self, path: Path, recipe: Recipe, n_processes: int) -> None:
        self.path = path
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA")
        where = [platform.node(), ops.backend(setup.device()), isa, cores(), n_processes]
        self._keys, before = dict[str, str](), json.dumps([__version__, where, recipe.model], default=str)
        for stage in recipe.stages:  # the length of answers depends on all stages before
            before = hashlib.sha256((before + stage.model_dump_json()).encode()).hexdigest()
            self._keys[stage.name] = before

    def corrected(self, name: str, time: ExpectedTime) -> ExpectedTime:
        """The stage's time by its record; the same if there is none."""
        ratios = self._read().get(self._keys[name])
        if not ratios:
            return time
        logs = [math.log(ratio) for ratio in ratios]
        mean = statistics.fmean(logs)
        squares = LIKE * AGAIN**2 + sum((log - mean) ** 2 for log in logs)
        spread = math.sqrt(squares / (LIKE + len(logs) - 1) * (1 + 1 / len(logs)))
        return replace(time, seconds=time.seconds * math.exp(mean), parts={}, spread=spread)

    def add(self, name: str, ratio: float) -> None:
        """Records the ratio of a finished stage."""
        if not 0 < ratio < math.inf:
            return
        known = self._read()
        newest = [*known.pop(self._keys[name], []), round(ratio, 4)][-NEWEST:]
        with suppress(OSError):  # the cache may not be writable
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, dict([*known.items(), (self._keys[name], newest)][-STAGES:]))

    def _read(self) -> dict[str, list[float]]:
        """Key -> ratios; what is not of this form is left out."""
        read = read_json(self.path) or {}
        return {
            key: ratios for key, ratios in read.items()
            if isinstance(ratios, list) and all(isinstance(ratio, int | float) and ratio > 0 for ratio in ratios)
        }  # fmt: skip


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
