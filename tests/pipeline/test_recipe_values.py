"""Quantities and schedules as people write them."""

import math
from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe
from bessemer.config.units import Points, Steps, parse_bytes, parse_seconds, parse_tokens, show_seconds, show_tokens
from bessemer.errors import UserError


@pytest.mark.parametrize(
    ("text", "count"),
    [("8M", 8_000_000), ("200K", 200_000), ("1.5B", 1_500_000_000), ("14.8T", 14_800_000_000_000),
     ("1.1b", 1_100_000_000),
     (12, 12), (8e6, 8_000_000), ("0", 0), ("1_000", 1000), (" 2 M ", 2_000_000), ("3e3", 3000)],
)  # fmt: skip
def test_tokens(text, count):
    parsed = parse_tokens(text)
    assert parsed == count and isinstance(parsed, int)


@pytest.mark.parametrize("text", ["8X", "", "M", "-3", "1.5", 0.3, True, None, [], "8 M tokens", "1.2.3M", "0.0001K",
                                  "1e5000000", "1e999998", 1e19])  # fmt: skip
def test_tokens_refused(text):
    with pytest.raises(UserError, match="8M"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "size"), [("64MB", 64_000_000), ("1.5 gb", 1_500_000_000), ("2K", 2000), (7, 7), ("9B", 9)]
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "1TB", True, "1e3x"])
def test_bytes_refused(text):
    with pytest.raises(UserError, match="64MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("8m", 480), ("1h30m", 5400), ("2d", 172800), ("250ms", 0.25), (12, 12), ("1.5", 1.5), ("8", 8)],
)
def test_seconds(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["soon", "8x", "m8", "", True, None, "-3s", "1h30"])
def test_seconds_refused(text):
    with pytest.raises(UserError, match="90s"):
        parse_seconds(text)


def test_points_are_linear_between_and_flat_outside():
    lr = Points([["10", 0.0], ["20", 1.0], ["1K", 0.5]])
    assert [lr(0), lr(10), lr(15), lr(20), lr(510), lr(1000), lr(10**12)] == [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.5]


def test_points_may_jump_and_may_be_a_number():
    gamma = Points([["0", 0.001], ["100", 0.001], ["100", 0.0]])
    assert gamma(99) == pytest.approx(0.001) and gamma(100) == 0.0
    assert Points(3)(12345) == 3.0


def test_a_point_may_be_reached_by_a_cosine():
    """Against the formula. A schedule without a cosine is written, and thus fingerprinted, as it used to be."""
    lr = Points([["10", 3.0], ["30", 1.0, "cosine"], ["50", 2.0]])
    expected = [1.0 + (1 + math.cos(math.pi * (at - 10) / 20)) for at in range(10, 31)]
    assert [lr(at) for at in range(10, 31)] == pytest.approx(expected, rel=1e-12)
    assert (lr(0), lr(40), lr(99)) == (3.0, 1.5, 2.0)
    assert lr.plain() == [[10, 3.0], [30, 1.0, "cosine"], [50, 2.0]] and Points(lr.plain()) == lr == Points(lr)
    straight = Points([["10", 3.0], ["30", 1.0], ["50", 2.0]])
    assert lr != straight and straight.plain() == [[10, 3.0], [30, 1.0], [50, 2.0]]


def test_a_cosine_survives_the_run_s_own_recipe():
    path = Path(__file__).parents[2] / "recipes" / "v3.toml"
    recipe = Recipe.load(path)
    assert "cosine" in str(recipe.stage("pretrain").lr)
    assert Recipe.parse(recipe.to_toml()).stage("pretrain").lr == recipe.stage("pretrain").lr


@pytest.mark.parametrize(
    ("points", "words"),
    [([["5", 1.0], ["2", 1.0]], "sort the points"), ([], "points in consumed tokens"), ([["5"]], "pair"),
     ([["x", 1.0]], "tokens are 'x'"), ([["5", "y"]], "value is 'y'"), ([["5", float("nan")]], "value is nan"),
     ([["-1", 2.0]], "tokens are '-1'"),
     ("fast", "points in consumed tokens"),
     ([["1", 1.0], ["1", 2.0], ["1", 3.0]], "jump"), (True, "a number"),
     ([["1", 1.0], ["2", 2.0, "cosin"]], 'third element is \'cosin\', which can only be "cosine"'),
     ([["1", 1.0, "cosine"]], "point 1: a cosine comes from a point before it"),
     ([["1", 1.0], ["1", 2.0, "cosine"]], "point 2: a cosine comes from a point before it")],
)  # fmt: skip
def test_points_refused(points, words):
    with pytest.raises(UserError, match=words):
        Points(points)


def test_steps_have_no_cosine():
    with pytest.raises(UserError, match=r"point 2: .*in steps"):
        Steps([["0", 128], ["2M", 256, "cosine"]])


def test_shown_for_people():
    assert [show_tokens(n) for n in (7, 950, 1500, 8_000_000, 14.8e12)] == ["7", "950", "1.5K", "8M", "14.8T"]
    # the unit is that of the rounded number
    assert [show_tokens(n) for n in (999, 999.7, 999_499, 999_936, 999.7e6)] == ["999", "1K", "999K", "1M", "1B"]
    assert [show_tokens(n) for n in (999.7e9, 999.7e12, 1234.5e12)] == ["1T", "1000T", "1234T"]
    assert [show_seconds(s) for s in (2.34, 42, 95, 3725)] == ["2.3s", "42s", "1m 35s", "1h 02m"]
