"""Power, seeds needed and answers of a study's rules, against simulation, scipy's t test and closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from bessemer.addons.evals.intervals import Interval
from bessemer.addons.study.file import RuleTable
from bessemer.addons.study.rule import StudyVerdict, answer, compare, power, verdict
from bessemer.addons.study.seeds import chance_beyond, chance_within, fewest

DRAWS = 40_000


def rule(side: str = "above", by: float = 0.0, expected: float = 0.1, name: str = "it rises") -> RuleTable:
    return RuleTable(name=name, first="a", second="b", side=side, by=by, expected=expected)


def simulated(n: int, mean: float, spread: float, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The t intervals of many studies of n seeds."""
    draws = np.random.default_rng(0).normal(mean, spread, (DRAWS, n))
    reach = stats.t.ppf((1 + confidence) / 2, n - 1) * draws.std(1, ddof=1) / math.sqrt(n)
    return draws.mean(1) - reach, draws.mean(1) + reach


@pytest.mark.parametrize("n, effect, confidence", [(3, 1.5, 0.95), (5, 1.0, 0.95), (10, 0.8, 0.9)])
def test_power_is_the_share_of_simulated_studies(n, effect, confidence):
    low, high = simulated(n, effect, 1.0, confidence)
    error = 4 * math.sqrt(0.25 / DRAWS)
    assert chance_beyond(n, effect, 1.0, confidence) == pytest.approx(np.mean(low > 0), abs=error)
    low, high = simulated(n, 0.2, 1.0, confidence)
    inside = np.mean((low > -1.6) & (high < 1.6))
    assert chance_within(n, 0.2, 1.6, 1.0, confidence) == pytest.approx(inside, abs=error)


def test_without_an_effect_power_is_the_error_of_one_side():
    assert chance_beyond(7, 0.0, 1.0, 0.95) == pytest.approx(0.025, abs=1e-6)
    assert chance_beyond(1, 5.0, 1.0) == 0 == chance_within(1, 0.0, 1.0, 0.1)
    assert chance_beyond(4, 0.1, 0.0) == 1 == chance_within(4, 0.0, 0.1, 0.0)


def test_seeds_needed_is_the_first_number_with_the_power():
    needed = fewest(lambda n: chance_beyond(n, 0.1, 0.1), 0.8)
    assert needed is not None
    assert chance_beyond(needed, 0.1, 0.1) >= 0.8 > chance_beyond(needed - 1, 0.1, 0.1)
    # the textbook's normal approximation, (1.96 + 0.84)^2 = 7.85, and two more for the t distribution
    assert needed == 10
    assert fewest(lambda n: chance_beyond(n, 0.001, 1.0), 0.8) is None


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_rule_holds_where_a_t_test_rejects(side):
    rng = np.random.default_rng(1)
    sign, seen = (1 if side == "above" else -1), set()
    for _ in range(60):
        values = sign * rng.normal(0.12, 0.08, 4)
        found = compare(rule(side, sign * 0.05, sign * 0.1), dict(enumerate(values)), [], 0.95, 0.8)
        alternative = "greater" if side == "above" else "less"
        p = stats.ttest_1samp(values, sign * 0.05, alternative=alternative).pvalue
        assert (found.verdict is StudyVerdict.HOLDS) == (p < 0.025)
        interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert found.interval == pytest.approx((values.mean(), *interval))
        assert found.chance == pytest.approx(power(found.rule, 4, values.std(ddof=1), 0.95))
        seen.add(found.verdict)
    assert seen >= {StudyVerdict.HOLDS, StudyVerdict.UNCLEAR}


def test_the_three_answers_of_an_interval():
    interval = Interval(0.2, 0.1, 0.3)
    assert [answer("above", 0.0, by, interval) for by in (0.05, 0.2, 0.35)] == ["holds", "unclear", "fails"]
    assert [answer("below", by, 0.0, interval) for by in (0.05, 0.2, 0.35)] == ["fails", "unclear", "holds"]
    assert [answer("equal", 0.0, by, interval) for by in (0.05, 0.2, 0.35)] == ["fails", "unclear", "holds"]


def test_failing_is_corrected_for_the_number_of_rules_and_holding_is_not():
    values = dict(enumerate([-0.020, -0.010, -0.029, -0.004]))  # p = 0.03 on the wrong side, as an interval at 95 %
    alone = compare(rule(), values, [], 0.93, 0.8)
    assert alone.verdict is StudyVerdict.FAILS
    assert compare(rule(), values, [], 0.93, 0.8, rules=4).verdict is StudyVerdict.UNCLEAR
    right = {seed: -value for seed, value in values.items()}
    assert compare(rule(), right, [], 0.93, 0.8, rules=4).verdict is StudyVerdict.HOLDS


def test_few_seeds_and_missing_runs_cannot_tell():
    assert compare(rule(), {1: 0.5, 2: 0.5001}, [], 0.95, 0.8).verdict is StudyVerdict.UNCLEAR
    four = {1: 0.5, 2: 0.51, 3: 0.52, 4: 0.5}
    assert compare(rule(), four, [], 0.95, 0.8).verdict is StudyVerdict.HOLDS
    missing = compare(rule(), four, [5], 0.95, 0.8)
    assert missing.verdict is StudyVerdict.UNCLEAR and "seed 5" in missing.doubts[0]
    assert compare(rule(), {}, [1, 2], 0.95, 0.8).interval is None


def test_a_control_that_does_not_hold_blinds_the_study():
    four = {1: 0.5, 2: 0.51, 3: 0.52, 4: 0.5}
    holds, control = (compare(rule(name=name), four, [], 0.95, 0.8) for name in ("it rises", "it is seen"))
    assert verdict([holds], [control])[0] is StudyVerdict.HOLDS
    blind = compare(rule(name="it is seen"), {seed: -value for seed, value in four.items()}, [], 0.95, 0.8)
    said, why = verdict([holds], [blind])
    assert said is StudyVerdict.UNCLEAR and "it is seen" in why[0]
    assert verdict([holds, blind], [control])[0] is StudyVerdict.FAILS
