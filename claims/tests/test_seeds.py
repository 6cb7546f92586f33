"""Tests over a few seeds against scipy and by hand, and how rarely the rules show an effect that is not there."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from bessemer.addons.study.seeds import alike, corrected, equivalent, p_equivalent, p_value, seeds_for
from bessemer_claims.registry import Part, rules
from bessemer_claims.verdict import Measured, Outcome, run, self_test

RUNS = 1000


@pytest.mark.parametrize(
    ("values", "p"),
    [
        ([0.3, -0.1, 0.45, 0.2], 0.40418253827636574), ([0.8, 1.4, 0.2], 0.18071196962708624),
        ([0.01, 0.02], 0.037405118482553235), ([0.4], 1.0), ([0.4, 0.4], 0.0), ([0.1, 0.1], 1.0),
    ],
)  # fmt: skip
def test_a_p_value_is_what_cards_printed_before_scipy(values, p):
    assert p_value(values, 0.1) == pytest.approx(p, rel=1e-12)


def test_equivalence_is_two_one_sided_tests():
    for values in ([0.1, 0.3, -0.2, 0.15], [0.8, 1.4, 0.2, 0.9]):
        p = max(
            stats.ttest_1samp(values, -1.0, alternative="greater").pvalue,
            stats.ttest_1samp(values, 1.0, alternative="less").pvalue,
        )
        assert equivalent(values, 0.0, 1.0) == (p < 0.05)
    assert not equivalent([0.0], 0.0, 10.0), "one seed says nothing"


def test_benjamini_and_hochberg_by_hand():
    """p times n over its rank, no larger than that of a larger p."""
    assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert corrected([0.9, 0.8]) == pytest.approx([0.9, 0.9]) and corrected([]) == []


def test_of_what_survives_the_correction_few_are_false():
    """A third of 60 questions have an effect; of those found, no more than about the allowed share have none."""
    rng = np.random.default_rng(5)
    shares = []
    for _ in range(200):
        shift = np.where(np.arange(60) < 20, 5.0, 0.0)
        p = [p_value(values) for values in (shift[:, None] + rng.normal(0, 1, (60, 4))).tolist()]
        found = [index for index, q in enumerate(corrected(p)) if q <= 0.05]
        shares.append(sum(index >= 20 for index in found) / max(1, len(found)))
    assert 0 < statistics.fmean(shares) < 0.05


@pytest.mark.parametrize("values", [[0.1, 0.3, -0.2, 0.15], [0.8, 1.4, 0.2, 0.9]])
def test_seeds_that_could_see_a_margin(values):
    """By trying every number of seeds."""
    spread = statistics.stdev(values)
    for margin in (0.05, 0.4, 2.0):
        reach = (stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) for n in range(2, 5000))
        assert seeds_for(values, margin) == next(n for n, r in enumerate(reach, 2) if r <= margin)
    assert seeds_for(values, 0.0) is None and seeds_for([1.0], 1.0) is None and seeds_for([2.0, 2.0], 1.0) is None


def test_values_that_differ_by_rounding_alone_are_alike():
    assert alike([0.1 + 0.2, 0.3]) and not alike([0.3, 0.3001]) and not alike([0.3])
    assert p_equivalent([0.1, 0.3, -0.2], 0.0, 1.0) < 0.05


def test_rules_rarely_show_what_is_not_there():
    """At the edge of what matters a one-sided claim is found to hold, and to fail, in 2.5 % of studies each; without
    any effect it holds hardly ever. The A/A test fails in 5 %, and is none with few seeds."""
    rng = np.random.default_rng(3)
    part = Part(kind="R", side="above", metric="gain", threshold=0.0, margin=0.5)
    outcomes = [run(part, Measured(values), rules()).outcome for values in rng.normal(0.5, 1, (RUNS, 3)).tolist()]
    assert 0.01 * RUNS < outcomes.count(Outcome.HOLDS) < 0.045 * RUNS
    assert 0.01 * RUNS < outcomes.count(Outcome.FAILS) < 0.045 * RUNS
    outcomes = [run(part, Measured(values), rules()).outcome for values in rng.normal(0, 1, (RUNS, 10)).tolist()]
    assert outcomes.count(Outcome.HOLDS) < 0.005 * RUNS

    def fails(gaps):
        return self_test(gaps, rules(), "x", ("", ""), ("a", "b"), "n").agrees is False

    pairs = rng.normal(0, 1, (RUNS, 5)).tolist()
    assert 0.03 * RUNS < sum(map(fails, pairs)) < 0.07 * RUNS and not fails([5.0, 5.1, 4.9, 5.0])
    shifted = rng.normal(1.5, 1, (RUNS, 10)).tolist()
    assert sum(map(fails, shifted)) > 0.95 * RUNS, "a difference of 1.5 standard deviations is noticed"
