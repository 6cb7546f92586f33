"""Schedules against the published vectors (reference Z.1, C.1)."""

import pytest

from bessemer.errors import UserError
from bessemer.train.schedule import Points, T, v3_batch_rows, v3_gamma, v3_lr, v3_mtp_lambda


def test_v3_learning_rate():
    assert [v3_lr(0, 0), v3_lr(10**9, 1000), v3_lr(10**10, 2000)] == pytest.approx([0, 1.1e-4, 2.2e-4], rel=1e-12)
    late = {9.99 * T: 2.2e-4, 12.15 * T: 1.21e-4, 14.5 * T: 2.2e-5, 14.7 * T: 7.3e-6}
    for tokens, lr in late.items():
        assert v3_lr(int(tokens), 10**5) == pytest.approx(lr, rel=1e-9)
    assert v3_lr(int(14.3 * T) - 1, 10**5) == pytest.approx(2.2e-5, rel=1e-6), "the cosine ends where the tail begins"


def test_v3_batch_ramp_gives_the_derived_step_count():
    tokens = steps = 0
    while tokens < 469e9:
        tokens += v3_batch_rows(tokens) * 4096
        steps += 1
    assert v3_batch_rows(0) == 3072 and v3_batch_rows(tokens) == 15360
    assert steps == pytest.approx(15.0e3, rel=0.01)
    rest = (14.8 * T - tokens) / (15360 * 4096)
    assert rest == pytest.approx(227.8e3, rel=0.001) and steps + rest == pytest.approx(243e3, rel=0.002)
    assert all(v3_batch_rows(n * 10**9, multiple=128) % 128 == 0 for n in range(0, 500, 7))


def test_v3_lambda_and_gamma():
    assert [v3_mtp_lambda(0), v3_mtp_lambda(10 * T - 1), v3_mtp_lambda(10 * T)] == [0.3, 0.3, 0.1]
    assert [v3_gamma(0), v3_gamma(int(14.3 * T) - 1), v3_gamma(int(14.3 * T))] == [0.001, 0.001, 0.0]


def test_points_interpolate_clamp_and_jump():
    lr = Points([[100, 0.0], [200, 1.0], [300, 1.0], [300, 0.5], [400, 0.1]])
    assert [lr(0), lr(100), lr(150), lr(200), lr(250)] == [0, 0, 0.5, 1, 1]
    assert lr(299) == 1.0 and lr(300) == 0.5 and lr(350) == pytest.approx(0.3) and lr(10**15) == 0.1
    assert Points.constant(7)(123, 4) == 7


@pytest.mark.parametrize("points", [[], [[5, 1], [4, 1]], [[0]], [[0, float("nan")]], [[-1, 2]]])
def test_points_refuse_nonsense(points):
    with pytest.raises(UserError):
        Points(points)
