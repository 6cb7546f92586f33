"""Sentences with their numbers filled in: computed values, published figures, and what runs gave."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bessemer.addons.evals.intervals import over_seeds
from bessemer_claims.verdict import Measured


class RunValue(NamedTuple):
    """What runs gave for a metric: its mean over seeds, the 95 % interval, and how many runs."""

    mean: float
    low: float
    high: float
    n: int


class MissingRun(LookupError):
    """A sentence speaks of runs that have not been made."""


class RunValues(dict[str, RunValue]):
    """Metric -> what runs gave for it; MissingRun for another."""

    def __missing__(self, metric: str) -> RunValue:
        raise MissingRun(metric)

    @classmethod
    def of(cls, measured: Mapping[str, Measured], confidence: float) -> RunValues:
        values = cls()
        for metric, runs in measured.items():
            interval = over_seeds(runs.values, confidence)
            values[metric] = RunValue(interval.middle, interval.low, interval.high, len(runs.values))
        return values


class _Filler(string.Formatter):
    """str.format, whose format may end in "*FACTOR": {hours:.0f*100}."""

    def format_field(self, value: Any, spec: str) -> str:
        form, times, factor = spec.partition("*")
        return format(value * float(factor) if times else value, form).replace("-", "\u2212" if "+" in form else "-")


def filled(text: Sequence[str], values: Mapping[str, Any]) -> tuple[str, str]:
    """A text in both languages with its numbers; MissingRun if it speaks of runs that `values` lacks."""
    english, chinese = (_Filler().vformat(sentence, (), values) for sentence in text)
    return english, chinese
