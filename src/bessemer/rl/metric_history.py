"""The history of an RL run as the alarms need it: of every metric the first values, the last ones and the best window.

A window is a mean of WINDOW values, which has half the noise of one rollout. Missing and non-finite values are as if
never measured. Memory does not grow with the run, and the same tables in the same order give the same figures.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import mean

WINDOW = 5
"""Values in a window."""

Values = Mapping[str, object]
"""One table of metrics.jsonl by name; what is no number is passed over."""


class Track:
    """One metric so far."""

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
            self.peak = max(self.peak, mean(self.recent))

    @property
    def start(self) -> float:
        return mean(self.first)

    @property
    def now(self) -> float:
        return mean(self.recent)

    @property
    def rise(self) -> float:
        return self.now - self.start


class Figures:
    """The tracks of a history by metric name, without the "rl/"."""

    def __init__(self, history: Iterable[Values] = ()) -> None:
        self.tracks: dict[str, Track] = {}
        self.judged: dict[str, Track] = {}
        """The same from the moment on when a reward model joined, which is late (R1: the last quarter of stage 4)."""
        self.before: dict[str, list[float]] = {}
        """The last values before that moment."""
        for values in history:
            self.add(values)

    def add(self, values: Values) -> None:
        known = {
            name.removeprefix("rl/"): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        if "preference" in known and not self.judged:
            self.before = {name: list(track.recent) for name, track in self.tracks.items()}
        kept = [self.tracks, self.judged] if "preference" in known or self.judged else [self.tracks]
        for tracks in kept:
            for name, value in known.items():
                tracks.setdefault(name, Track()).add(value)

    def has(self, *names: str, values: int = WINDOW) -> bool:
        return all(name in self.tracks and self.tracks[name].count >= values for name in names)

    def __getitem__(self, name: str) -> Track:
        return self.tracks[name]
