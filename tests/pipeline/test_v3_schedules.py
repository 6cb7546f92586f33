"""The schedules of recipes/v3.toml against the published run (V3 4.2)."""

import math
from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe

T = 10**12


@pytest.fixture(scope="module")
def v3():
    return Recipe.load(Path(__file__).parents[2] / "recipes" / "v3.toml").stage("pretrain")


def published_lr(tokens: float) -> float:
    """After the warm-up: constant to 10T, cosine over 4.3T, two constant tails."""
    if tokens < 10 * T:
        return 2.2e-4
    if tokens < 14.3 * T:
        return 2.2e-5 + 0.5 * (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * (tokens - 10 * T) / (4.3 * T)))
    return 2.2e-5 if tokens < 14.633 * T else 7.3e-6


def test_learning_rate(v3):
    def lr(tokens):
        return v3.learning_rate(int(tokens), 2000, v3.tokens)

    late = {9.99 * T: 2.2e-4, 12.15 * T: 1.21e-4, 14.5 * T: 2.2e-5, 14.7 * T: 7.3e-6}
    for tokens, rate in late.items():
        assert published_lr(tokens) == pytest.approx(rate, rel=1e-9) == lr(tokens)
    assert lr(14.3 * T - 1) == pytest.approx(2.2e-5, rel=1e-6), "the cosine ends where the tail begins"
    for tokens in range(30 * 10**9, v3.tokens, 10**10):
        assert lr(tokens) == pytest.approx(published_lr(tokens), rel=1e-9)


def test_the_batch_ramp_gives_the_derived_step_count_and_the_warm_up_is_linear_in_steps(v3):
    """V3 4.2: linearly during the first 2K steps, while the batches grow."""
    tokens = steps = 0
    while tokens < 469e9:
        rate = v3.learning_rate(tokens, steps, v3.tokens)
        assert rate == pytest.approx(2.2e-4 * min(1, steps / 2000), rel=1e-12), steps
        tokens += int(v3.batch_rows(tokens)) * 4096
        steps += 1
        if steps == 2000:
            assert tokens == pytest.approx(28.1e9, rel=0.01)
    assert v3.batch_rows(0) == 3072 and v3.batch_rows(tokens) == 15360
    assert steps == pytest.approx(15.0e3, rel=0.01)
    rest = (14.8 * T - tokens) / (15360 * 4096)
    assert rest == pytest.approx(227.8e3, rel=0.001) and steps + rest == pytest.approx(243e3, rel=0.002)


def test_lambda_and_gamma(v3):
    assert [v3.mtp_lambda(at) for at in (0, 10 * T - 1, 10 * T)] == [0.3, 0.3, 0.1]
    assert [v3.gamma(at) for at in (0, int(14.3 * T) - 1, int(14.3 * T))] == [0.001, 0.001, 0.0]
