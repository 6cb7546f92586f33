"""How sure a plan is: draws the planner's uncertain inputs from their ranges and computes the results.

Inputs and their ranges are in `ranges.toml`. A Latin hypercube draws once from each of every input's n equal shares of
probability, in random order, so few draws cover a range; inputs are independent. `reference.toml` has what other large
runs cost, `heldout.toml` the runs that test the ranges. The planner uses the same draws for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from bessemer.addons.plan.hardware import RateFactors
from bessemer.addons.plan.step_time import step_costs, step_end, step_key, table_of
from bessemer.addons.plan.training_setup import Setup
from bessemer_claims.registry import read_toml

RATES = ("gemm", "attention", "memory", "exchange")
Draws = dict[str, np.ndarray]
"""For every input, its n values."""


def draw(n: int, seed: int) -> Draws:
    generator, values = np.random.default_rng(seed), {}
    for row in read_toml("ranges.toml")["input"]:
        share = (generator.permutation(n) + generator.random(n)) / n
        if "chance" in row:
            values[row["name"]] = (share < row["chance"]).astype(float)
        else:
            low, mode, high = row["low"], row["mode"], row["high"]
            values[row["name"]] = stats.triang.ppf(share, (mode - low) / (high - low), low, high - low)
    return values


def drawn(setup: Setup, draws: Draws, real_routing: bool) -> Iterator[Setup]:
    """The setup under every draw. `real_routing`: expert loads and the cut into stages are uncertain too, as for a run
    that published neither."""
    for i in range(len(draws["gemm"])):
        sample = replace(
            setup, in_step=float(draws["in_step"][i]), factors=RateFactors(*(float(draws[name][i]) for name in RATES))
        )
        if real_routing:
            sample = replace(sample, imbalance=float(draws["imbalance"][i]), even=bool(draws["even"][i]))
        yield sample


def step_seconds(setups: Sequence[Setup]) -> np.ndarray:
    """Seconds per step of setups that share a schedule: as `step_time`, with one pass over the table for all."""
    table = table_of(setups[0])
    costs = [step_costs(setup, table) for setup in setups]
    message = np.array([cost.send for cost in costs])
    durations: dict[Any, np.ndarray] = {}
    ends: list[np.ndarray] = []
    free = [np.zeros(len(setups)) for _ in table.steps]
    for rank, step, waits in table.order:  # as `timeline.simulate`, over arrays
        key = step_key(step)
        if key not in durations:
            durations[key] = np.array([cost.of(step) for cost in costs])
        for at, sent in waits:
            free[rank] = np.maximum(free[rank], ends[at] + message if sent else ends[at])
        free[rank] = free[rank] + durations[key]
        ends.append(free[rank])
    return np.max(free, axis=0) + np.array([sum(step_end(setup, table)) for setup in setups])


def rates(setup: Setup, draws: Draws, real_routing: bool = False) -> np.ndarray:
    """Tokens per second per GPU under every draw."""
    return setup.step_tokens / step_seconds(list(drawn(setup, draws, real_routing))) / setup.layout.world


SHARE = 0.9
"""Coverage of every interval of hours and dollars."""


@dataclass(frozen=True)
class Quantiles:
    """Median and the middle `SHARE`."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Quantiles:
        return cls(*(float(q) for q in np.quantile(values, (0.05, 0.5, 0.95))))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def percentile(values: np.ndarray, value: float) -> float:
    """Share of the values below `value`, 0 to 100."""
    return float(100 * np.mean(values < value))


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; ties are ranked in order of position."""
    a, b = (np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float) for values in (x, y))
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(x) else 0.0


def next_one(ratios: Sequence[float], share: float = SHARE) -> Quantiles:
    """The prediction interval for one more ratio like these, by Student's t on their logarithms. `share`: coverage."""
    logs, n = np.log(ratios), len(ratios)
    middle = float(logs.mean())
    wide = float(stats.t.ppf(0.5 + share / 2, n - 1)) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return Quantiles(*(math.exp(middle + sign * wide) for sign in (-1, 0, 1)))
