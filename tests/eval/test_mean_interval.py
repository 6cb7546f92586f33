"""Intervals of a mean over problems, against Student's, every resample, and the truth."""

from itertools import product
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from scipy import stats

from bessemer.addons.evals.mean_interval import bootstrap, mean_interval, widened, wilson
from bessemer.errors import UserError


def test_an_empty_sample_has_no_mean():
    with pytest.raises(UserError):
        mean_interval([])


def test_none_and_all_right_have_an_interval():
    """0 of 6 does not mean that nothing will ever be right, and one more right sample must not narrow the interval."""
    none, all_ = mean_interval([0.0] * 6), mean_interval([1.0] * 6)
    assert none[:2] == (0.0, 0.0) and none[2] == pytest.approx(0.390, abs=1e-3), "Wilson's, as tables print it"
    assert (all_[0], all_[2]) == (1.0, 1.0) and all_[1] == pytest.approx(1 - none[2])
    assert mean_interval([0.125] + [0.0] * 5)[2] > none[2]
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("n", [6, 20, 60])
def test_the_interval_covers_the_truth(share, n):
    """For problems that are right or wrong. The bootstrap alone covers a share of 0.02 in 20 problems a third of the
    time."""
    draw = np.random.default_rng(5)
    covered = [low <= share <= high for _ in range(200) for _, low, high in [mean_interval(draw.random(n) < share)]]
    assert np.mean(covered) > 0.88


@pytest.mark.parametrize("n", [6, 8, 12])
def test_the_interval_of_rates_over_few_problems_is_wide_enough(n):
    """The bootstrap alone covers 87 to 92 %."""
    rates = np.random.default_rng(1).beta(0.6, 0.9, size=(600, n))
    actual = [mean_interval(values) for values in rates]
    assert np.mean([low <= 0.4 <= high for _, low, high in actual]) > 0.925
    assert all(0 <= low <= mean <= high <= 1 for mean, low, high in actual)


@pytest.mark.parametrize("n", [3, 8, 30, 300])
def test_widened_reaches_as_far_as_student_s_interval(n):
    """For values whose resampled means are normal."""
    low, high = widened(1.0, 1.0 - 1.96 * (n - 1) ** 0.5, 1.0 + 1.96 * (n - 1) ** 0.5, n)
    assert (high - 1, 1 - low) == pytest.approx([n**0.5 * stats.t.ppf(0.975, n - 1)] * 2, rel=0.04 if n == 3 else 0.001)
    assert widened(1.0, 1.0, 1.0, 1) == (1.0, 1.0)


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(0).random(300).tolist()
    mean, low, high = mean_interval(values)
    half = NormalDist().inv_cdf(0.975) * stdev(values) / 300**0.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert (mean, low, high) == mean_interval(values)
    assert mean_interval(values, seed=1) != (mean, low, high)


def test_interval_against_every_resample():
    """Four values have 256 resamples: the ends are the exact 2.5 % and 97.5 % points of their means."""
    values = [0.0, 0.25, 0.5, 1.0]
    means = [fmean(picks) for picks in product(values, repeat=4)]
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    for seed in range(5):
        mean, low, high = bootstrap(values, seed, resamples=20_000)
        assert mean == 0.4375 and (low, high) == pytest.approx(tuple(expected), abs=1 / 16)
        assert min(means) <= low < mean < high <= max(means)
