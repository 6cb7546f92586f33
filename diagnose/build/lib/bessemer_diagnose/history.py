"""What the rules read: the history of a run's metrics, in constant memory, and the alarm that a rule returns."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

WINDOW = 5
"""Values in a window."""
LEARNT = 20
"""Values before a trend is judged."""
Values = Mapping[str, object]
"""One record of metrics.jsonl, values by metric name; values that are not numbers are ignored."""
VITAL = ("loss", "grad_norm", "entropy", "kl")
"""Metrics for which a value that is not finite counts (`MetricHistory.broken`). metrics.jsonl stores it as null."""


@dataclass(frozen=True)
class Alarm:
    """`message` is the observation with its numbers, `cause` the likeliest reason, `advice` what to change."""

    code: str
    message: str
    cause: str
    advice: str

    @property
    def title(self) -> str:
        return self.code.replace("-", " ")

    def __str__(self) -> str:
        return f"{self.title}: {self.message}. Likely cause: {self.cause}. What to do: {self.advice}."


class MetricTrack:
    """The history of one metric, in constant memory."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[float] = []
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.peak = -math.inf
        """The highest window so far."""

    def add(self, value: float) -> None:
        self.count += 1
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.recent.append(value)
        if len(self.recent) == WINDOW:
            self.peak = max(self.peak, fmean(self.recent))

    @property
    def start(self) -> float:
        return fmean(self.first)

    @property
    def now(self) -> float:
        return fmean(self.recent)

    @property
    def rise(self) -> float:
        return self.now - self.start


class MetricHistory:
    """A run's tracks by metric name, without the "rl/" prefix. Missing and non-finite values count as not measured."""

    def __init__(self) -> None:
        self.tracks: dict[str, MetricTrack] = {}
        self.judged: dict[str, MetricTrack] = {}
        """The same, counted from when a reward model joined, which is late (R1: the last quarter of stage 4)."""
        self.before: dict[str, list[float]] = {}
        """The last values before that moment."""
        self.broken: dict[str, int] = {}
        """Latest consecutive values that were not finite, of VITAL metrics; null counts once there was a number."""
        self.kl_and_loss: deque[tuple[float, float]] = deque(maxlen=LEARNT)
        """The latest values of records that have both."""

    def add(self, values: Values) -> None:
        numbers = {}
        for name, value in values.items():
            short = name.removeprefix("rl/")
            if isinstance(value, int | float) and math.isfinite(value):
                numbers[short] = float(value)
            elif short in VITAL and (isinstance(value, float) or (value is None and short in self.tracks)):
                self.broken[short] = self.broken.get(short, 0) + 1
        if self.broken:
            self.broken = {name: count for name, count in self.broken.items() if name not in numbers}
        if "preference" in numbers and not self.judged:
            self.before = {name: list(track.recent) for name, track in self.tracks.items()}
        for tracks in [self.tracks, self.judged] if "preference" in numbers or self.judged else [self.tracks]:
            for name, value in numbers.items():
                tracks.setdefault(name, MetricTrack()).add(value)
        if "kl" in numbers and "loss" in numbers:
            self.kl_and_loss.append((numbers["kl"], numbers["loss"]))

    def has(self, *names: str, values: int = WINDOW) -> bool:
        return all(name in self.tracks and self.tracks[name].count >= values for name in names)

    def __getitem__(self, name: str) -> MetricTrack:
        return self.tracks[name]
