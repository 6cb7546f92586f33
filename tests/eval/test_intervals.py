"""Intervals from a few seeds and over problems: closed forms, and coverage in a thousand simulated runs."""

import math

import numpy as np
import pytest
from scipy import stats

from bessemer.addons.evals import intervals as ours

RUNS = 1000


@pytest.mark.parametrize(
    ("values", "confidence", "low", "high"),
    [
        ([0.3, -0.1, 0.45, 0.2], 0.95, -0.15712416172529256, 0.5821241617252926),
        ([0.3, -0.1, 0.45, 0.2], 0.99, -0.46589045822681396, 0.890890458226814),
        ([0.8, 1.4, 0.2], 0.95, -0.690482627050197, 2.290482627050197),
        ([0.01, 0.02], 0.99, -0.3032837058143562, 0.33328370581435623),
    ],
)
def test_the_interval_over_seeds_is_students(values, confidence, low, high):
    """scipy's interval, and that of the closed form which reports printed before (Abramowitz and Stegun 26.7.3)."""
    interval = ours.over_seeds(values, confidence)
    assert interval[1:] == pytest.approx((low, high), rel=1e-12)
    assert interval[1:] == pytest.approx(tuple(stats.ttest_1samp(values, 0.0).confidence_interval(confidence)))
    assert ours.smallest_visible(values, confidence) == pytest.approx((high - low) / 2)
    assert math.isinf(ours.smallest_visible(values[:1]))


def test_newcombes_own_example():
    """Newcombe 1998, Table II, case (a) is 56/70 - 48/80; for equal groups, 56/70 - 42/70 by statsmodels' formula."""
    l1, u1 = (bound for bound in stats.binomtest(56, 70).proportion_ci(method="wilson"))
    l2, u2 = (bound for bound in stats.binomtest(42, 70).proportion_ci(method="wilson"))
    low, high = 0.2 - math.hypot(0.8 - l1, u2 - 0.6), 0.2 + math.hypot(u1 - 0.8, 0.6 - l2)
    assert ours.shares_apart(0.8, 0.6, 70) == pytest.approx((0.2, low, high), abs=1e-4)


def test_intervals_cover_95_in_100():
    """In 1,000 simulated studies: over seeds with a normal metric, and over the problems of a benchmark."""
    rng = np.random.default_rng(1)
    seeds = rng.normal(0.7, 0.3, size=(RUNS, 3))
    covered = sum(one.low <= 0.7 <= one.high for one in map(ours.over_seeds, seeds.tolist()))
    assert 0.93 * RUNS < covered < 0.97 * RUNS
    one, other = rng.binomial(198, 0.75, RUNS) / 198, rng.binomial(198, 0.71, RUNS) / 198
    covered = sum(
        gap.low <= 0.04 <= gap.high for gap in (ours.shares_apart(a, b, 198) for a, b in zip(one, other, strict=True))
    )
    assert 0.93 * RUNS < covered < 0.975 * RUNS


def test_bootstrap_over_problems_covers():
    """Whether rows ask for the same problems, as in two languages, or for others, as in two tasks, one of them small;
    what single answers to very few problems say is not overrated."""
    rng = np.random.default_rng(2)
    for tasks, problems, samples in (
        (["a"], [60], 16), (["a", "a"], [60, 60], 16), (["a", "b"], [60, 60], 16), (["a"], [8], 16),
        (["a", "b"], [60, 8], 16), (["a", "b"], [60, 3], 1), (["a", "b"], [60, 1], 1), (["a", "b", "c"], [60, 2, 2], 1),
    ):  # fmt: skip
        ends = []
        for _ in range(RUNS // 2):
            ease = {task: rng.beta(2, 2, count) for task, count in zip(tasks, problems, strict=True)}
            rows = [(task, dict(enumerate(rng.binomial(samples, ease[task]) / samples))) for task in tasks]
            ends.append(ours.stratified(rows))
            assert ours.problems_of(rows) == sum(map(len, ease.values()))
        covered = sum(one.low <= 0.5 <= one.high for one in ends)
        least, most = (0.91, 0.98) if samples > 1 else (0.85, 1)  # very few answers have few different means
        assert least * len(ends) < covered <= most * len(ends)
        assert all(-0.05 < one.low <= one.middle <= one.high < 1.05 for one in ends)


def test_a_draw_may_miss_all_problems_of_a_language():
    english, chinese = ({problem: problem % 2 for problem in range(count)} for count in (40, 2))
    middle, low, high = ours.stratified([("a", english), ("a", chinese)])
    assert middle == 0.5 and 0.2 < low < 0.35 and 0.65 < high < 0.8
