"""Mixture: exact shares, every row once an epoch, the same rows for any batch size."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import shards
from bessemer.data.mixture import Mixture, Span, by_size
from bessemer.data.rows import open_rows, permute
from bessemer.errors import UserError

FOLDER = tempfile.TemporaryDirectory()


def part(n_rows, mark, row_length=4, tokenizer="t"):
    """Rows whose tokens are their part and number, then what padding also is; the last place is padding."""
    folder = Path(FOLDER.name) / f"{mark}-{row_length}-{tokenizer}"
    folder.mkdir()
    writer = shards.ShardWriter(folder, "train", 0, np.dtype("<u2"))
    for number in range(n_rows):
        writer.add([mark, number, *[2] * (row_length - 3)], "own", 1)
    meta = SimpleNamespace(vocab_size=1000, pad_id=2, fingerprint=tokenizer)
    shards.seal(folder, meta, row_length, {"train": [writer.finish()]})
    return open_rows(folder)


PARTS = {"b": part(37, 101), "a": part(10, 100), "c": part(500, 102)}
WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}
LARGE = {"a": part(1000, 110), "b": part(9000, 111)}
GOLDEN_10 = [4, 8, 0, 6, 5, 7, 2, 9, 1, 3]
GOLDEN_ROWS = [("b", 15), ("c", 343), ("b", 6), ("b", 15)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(n, key):
    images = permute(np.arange(n), n, key)
    assert sorted(images.tolist()) == list(range(n))
    # It gives the same images element by element.
    assert permute(np.array([n - 1]), n, key)[0] == images[-1]


def test_permute_is_what_it_was():
    """A run resumed years later must read the same rows."""
    assert permute(np.arange(10), 10, 1).tolist() == GOLDEN_10
    mixture = Mixture(PARTS, WEIGHTS, seed=7)
    assert [mixture.locate(n) for n in (0, 1, 2, 12345)] == GOLDEN_ROWS


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 9))
def test_rows_do_not_depend_on_the_batch_size(first, n_rows, step):
    mixture = Mixture(PARTS, WEIGHTS, seed=7)
    full = mixture.batch(first, n_rows)
    pieces = [mixture.batch(n, min(step, first + n_rows - n)) for n in range(first, first + n_rows, step)]
    assert full.tokens_BT.tolist() == [row for piece in pieces for row in piece.tokens_BT.tolist()]
    for offset in (0, n_rows - 1):
        name, row = mixture.locate(first + offset)
        assert full.tokens_BT[offset, :2].tolist() == [{"a": 100, "b": 101, "c": 102}[name], row]


def test_shares_are_exact_over_a_period():
    mixture = Mixture(PARTS, WEIGHTS, seed=3)
    assert mixture.realised(0, 1000) == WEIGHTS
    assert mixture.realised(777, 3000) == WEIGHTS
    assert mixture.realised(0, 50) == pytest.approx(WEIGHTS, abs=0.25)
    assert mixture.epochs(2500)["a"] == pytest.approx(2500 * 0.2 / 10, rel=0.05)


def test_every_row_comes_once_an_epoch_in_a_new_order():
    mixture = Mixture(PARTS, WEIGHTS, seed=3)
    seen = {name: [] for name in PARTS}
    for n in range(4000):
        name, row = mixture.locate(n)
        seen[name].append(row)
    for name, rows in PARTS.items():
        epochs = [seen[name][i : i + rows.n_rows] for i in range(0, len(seen[name]), rows.n_rows)]
        complete = [epoch for epoch in epochs if len(epoch) == rows.n_rows]
        assert len(complete) >= 2
        assert all(sorted(epoch) == list(range(rows.n_rows)) for epoch in complete)
        assert complete[0] != complete[1]


def test_a_batch_weighs_tokens_but_not_padding():
    batch = Mixture(PARTS, WEIGHTS).batch(0, 2)
    assert batch.tokens_BT[:, 2:].tolist() == [[2, 2]] * 2 and batch.loss_BT.tolist() == [[0, 1, 1, 0]] * 2


def test_weights_that_do_not_sum_to_one_are_normalised_and_reported():
    with pytest.warns(UserWarning, match="sum to 10, not 1"):
        mixture = Mixture(PARTS, {"a": 2, "b": 3, "c": 5})
    assert mixture.realised(0, 1000) == pytest.approx(WEIGHTS)


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ({"a": 0, "b": 0.5, "c": 0.5}, "weight of a is 0"),
        ({"a": -1, "b": 1, "c": 1}, "weight of a is -1"),
        ({"a": float("nan"), "b": 1, "c": 1}, "weight of a is nan"),
        ({"a": 0.5, "b": 0.5}, "no weight for c"),
        ({**WEIGHTS, "cc": 0.1}, "did you mean 'c'"),
        ({"a": 0.0001, "b": 0.4999, "c": 0.5}, "below 1/1000"),
    ],
)
def test_bad_weights(weights, word):
    with pytest.raises(UserError, match=word):
        Mixture(PARTS, weights)


@pytest.mark.parametrize(
    ("odd", "word"),
    [(part(3, 9, row_length=5), "length 5"), (part(3, 9, tokenizer="u"), "tokenizers"), (part(0, 9), "no rows")],
)
def test_parts_must_be_alike(odd, word):
    with pytest.raises(UserError, match=word):
        Mixture({"a": PARTS["a"], "odd": odd}, {"a": 0.5, "odd": 0.5})


def ramp(points):
    """A piecewise linear function of tokens through these points."""
    return lambda tokens: float(np.interp(tokens, *zip(*points, strict=True)))


ROWS, LENGTH = 8000, 4
CHANGING = {"a": 0.2, "b": ramp([(0, 0.0), (ROWS * LENGTH, 0.6)]), "c": ramp([(0, 0.8), (ROWS * LENGTH, 0.2)])}


def test_shares_follow_weights_that_change():
    mixture = Mixture(PARTS, CHANGING, seed=3, span=Span(ROWS))
    for first in range(0, ROWS, 1000):
        middle = (first + 500) * LENGTH
        expected = {"a": 0.2, "b": CHANGING["b"](middle), "c": CHANGING["c"](middle)}
        assert mixture.realised(first, 1000) == pytest.approx(expected, abs=0.01)
    overall = mixture.realised(0, ROWS)
    assert overall == pytest.approx({"a": 0.2, "b": 0.3, "c": 0.5}, abs=1 / ROWS * 3), "nothing is lost to rounding"


def test_a_cap_is_kept_and_the_others_take_over():
    mixture = Mixture(PARTS, WEIGHTS, seed=3, span=Span(ROWS, caps={"a": 3, "b": 10}))
    assert mixture.epochs(ROWS) == pytest.approx({"a": 3, "b": 10, "c": (ROWS - 30 - 370) / 500})
    assert set(mixture.ended) == {"a", "b"} and mixture.ended["a"] < mixture.ended["b"] < ROWS * LENGTH
    locations = [mixture.locate(n) for n in range(2000)]
    rows = [row for name, row in locations if name == "a"]
    assert sorted(rows) == sorted(list(range(10)) * 3), "every row as often as the cap says"
    early = mixture.realised(0, 100)
    assert early == pytest.approx(WEIGHTS, abs=0.02), "before that the weights hold"


@pytest.mark.parametrize("rows", [5, 993, 1000])  # the last period of 32 rows is not whole
def test_a_run_may_read_all_that_its_cap_allows(rows):
    mixture = Mixture({"a": LARGE["a"]}, {"a": 1.0}, seed=3, span=Span(rows, caps={"a": 1}))
    assert len({mixture.locate(n) for n in range(rows)}) == rows and not mixture.ended
    assert mixture.batch(rows - 1, 2).tokens_BT.shape == (2, 4), "a control reads one row further"


@pytest.mark.parametrize(("need", "reaches"), [(995, False), (1000, False), (1003, True)])
def test_a_cap_is_reached_only_if_rows_are_missing_before_the_end(need, reaches):
    mixture = Mixture(LARGE, {"a": 0.5, "b": 0.5}, seed=3, span=Span(2 * need, caps={"a": 1}))
    assert set(mixture.ended) == ({"a"} if reaches else set())
    assert mixture.epochs(2 * need)["a"] == pytest.approx(min(need, 1000) / 1000, abs=1e-3)


def test_data_that_ends_is_refused_and_says_when():
    with pytest.raises(UserError, match=r"[\d,]+ tokens.*raise a cap"):
        Mixture(PARTS, WEIGHTS, span=Span(ROWS, caps={"a": 1, "b": 1, "c": 2}))


def test_spans_continue_where_the_previous_one_ended():
    uninterrupted = Mixture(PARTS, WEIGHTS, seed=3, span=Span(ROWS, caps={"c": 4}))
    read = {"a": 2.0, "b": 0.0, "c": 3.9}
    later = Mixture(PARTS, WEIGHTS, seed=3, span=Span(ROWS, first_token=99, caps={"c": 4}, read=read))
    assert later.epochs(0) == pytest.approx(read)
    assert later.epochs(ROWS)["c"] == 4 == uninterrupted.epochs(ROWS)["c"]
    assert later.ended["c"] < uninterrupted.ended["c"]


@pytest.mark.parametrize(
    ("weights", "caps", "word"),
    [
        ({"a": ramp([(0, 0), (1, 0)]), "b": 0, "c": 0}, {}, "all weights are 0 at"),
        ({"a": ramp([(0, -1), (1, -1)]), "b": 1, "c": 1}, {}, "weight of a is -1 at"),
        (WEIGHTS, {"d": 1}, "a cap for 'd'"),
        (WEIGHTS, {"a": 0}, "cap of a is 0"),
    ],
)
def test_bad_schedules(weights, caps, word):
    with pytest.raises(UserError, match=word):
        Mixture(PARTS, weights, span=Span(ROWS, caps=caps))


def test_scheduled_weights_not_summing_to_one_are_reported_with_position():
    with pytest.warns(UserWarning, match=r"sum to 0\.\d+ at [\d,]+ tokens"):
        Mixture(PARTS, {**WEIGHTS, "a": ramp([(0, 0.1), (1, 0.1)])}, span=Span(ROWS))


def test_weights_by_size():
    size = {name: part.facts["tokens"] for name, part in PARTS.items()}
    assert by_size(PARTS, 1.0) == pytest.approx({name: n / sum(size.values()) for name, n in size.items()})
    assert by_size(PARTS, 0.0) == pytest.approx(dict.fromkeys(PARTS, 1 / 3))
    assert by_size(PARTS, 0.5)["a"] > by_size(PARTS, 1.0)["a"]
