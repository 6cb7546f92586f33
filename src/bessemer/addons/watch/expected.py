"""How long the stages of a run are expected to take, with intervals, and what the stages so far say about the rest.

How far the expected times are off has causes that stages share: the machine is slower than it was when measured; its
training, its sampling or its work on texts takes longer than planned. Each cause is a factor with a normal logarithm,
and a stage takes the part of it that its work has (`ExpectedTime.parts`), times a factor of its own. What is seen of
one stage thus corrects the others (Bayes' rule for normal variables), most of all those of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from bessemer.config.units import show_seconds

CONFIDENCE = 0.9
"""The interval holds the real time in 90 of 100 cases."""
WIDTH = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Of the interval, in standard deviations to each side."""
MACHINE = "machine"
UNKNOWN = 0.5
"""Standard deviation of the logarithm where nothing is known."""
NOTHING: Mapping[str, tuple[float, float]] = MappingProxyType({})


@dataclass(frozen=True)
class TimeInterval:
    """An expected time and the bounds of nine cases in ten, in seconds."""

    low: float
    likely: float
    high: float

    def facts(self) -> dict[str, float]:
        """As JSON."""
        return {"low": round(self.low, 3), "likely": round(self.likely, 3), "high": round(self.high, 3)}

    def describe(self) -> str:
        return f"{show_seconds(self.likely)} ({show_seconds(self.low)} to {show_seconds(self.high)})"


@dataclass(frozen=True)
class ExpectedTime:
    """What is expected of a stage, all of it."""

    seconds: float
    parts: Mapping[str, float] = field(default_factory=dict)
    """Share of these seconds by kind of work: a cause of error that other stages share."""
    spread: float = UNKNOWN
    """Standard deviation of the logarithm of its own factor."""
    each: tuple[float, ...] = ()
    """`StageWork.each`: the expected cost of every step of its progress; empty: they are alike."""
    beside: float = 0.0
    """What every step costs beside that."""


@dataclass(frozen=True)
class Expected:
    """The stages of a run, in order; those that are not due have no part in its time."""

    stages: Mapping[str, ExpectedTime]
    due: tuple[str, ...] = ()
    spreads: Mapping[str, float] = field(default_factory=dict)
    """Cause -> standard deviation of the logarithm of its factor."""
    learn: Callable[[str, float, float], None] = lambda name, seconds, share: None
    """Records the seconds that a stage of this run took, and the share of a core that its process had, for later
    runs."""
    share: float = 1.0
    """Processor seconds that this process got per second while it was measured."""

    def factors(self, seen: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """The factor on the seconds of every stage. `seen`: stage -> (factor seen, standard deviation of its log)."""
        mean_C, _ = self._known(seen)
        return {name: float(np.exp(self._shares(name) @ mean_C)) for name in self.stages}

    def interval(
        self, names: Collection[str] | None = None, seen: Mapping[str, tuple[float, float]] = NOTHING
    ) -> TimeInterval:
        """Of these stages together, of all that are due if they are not given, once others are `seen`."""
        names = self.due if names is None else tuple(names)
        mean_C, covariance_CC = self._known(seen)
        seconds_S = np.array([self.stages[name].seconds * np.exp(self._shares(name) @ mean_C) for name in names])
        total = float(seconds_S.sum())
        if total <= 0:
            return TimeInterval(0.0, 0.0, 0.0)
        weights_S = seconds_S / total
        shared_C = weights_S @ np.stack([self._shares(name) for name in names])
        own = weights_S**2 @ np.array([self.stages[name].spread ** 2 for name in names])
        factor = float(np.exp(WIDTH * np.sqrt(shared_C @ covariance_CC @ shared_C + own)))
        return TimeInterval(total / factor, total, total * factor)

    def _known(self, seen: Mapping[str, tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [C] and covariance [C, C] of the causes' logarithms."""
        mean_C, covariance_CC = np.zeros(len(self.spreads)), np.diag([spread**2 for spread in self.spreads.values()])
        names = [name for name in seen if name in self.stages and seen[name][0] > 0]
        if not names or not mean_C.size:
            return mean_C, covariance_CC
        shares_SC = np.stack([self._shares(name) for name in names])
        noise_S = [self.stages[name].spread ** 2 + seen[name][1] ** 2 for name in names]
        gain_CS = (
            covariance_CC @ shares_SC.T @ np.linalg.inv(shares_SC @ covariance_CC @ shares_SC.T + np.diag(noise_S))
        )
        logs_S = np.log([seen[name][0] for name in names])
        return gain_CS @ logs_S, covariance_CC - gain_CS @ shares_SC @ covariance_CC

    def _shares(self, name: str) -> NDArray[np.float64]:
        """How much of each cause a stage has [C]: the machine whole, every other by its share."""
        parts = {MACHINE: 1.0, **self.stages[name].parts}
        return np.array([parts.get(cause, 0.0) for cause in self.spreads])
