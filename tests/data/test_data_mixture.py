"""Mixture: exact shares, every row once an epoch, the same rows whatever the batch size."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import shards
from bessemer.data.mixture import Mixture, permute
from bessemer.data.rows import open_rows
from bessemer.errors import UserError

FOLDER = tempfile.TemporaryDirectory()


def part(n_rows, mark, row_length=4, tokenizer="t"):
    """Rows that carry their part and number as tokens; the last token is padding."""
    folder = Path(FOLDER.name) / f"{mark}-{row_length}-{tokenizer}"
    folder.mkdir()
    writer = shards.Writer(folder, "train", 0, np.dtype("<u2"))
    for number in range(n_rows):
        writer.add([mark, number, *[2] * (row_length - 3)], "own", 1)
    made = SimpleNamespace(vocab_size=1000, pad_id=2, fingerprint=tokenizer)
    shards.seal(folder, made, row_length, {"train": [writer.finish()]})
    return open_rows(folder)


PARTS = {"b": part(37, 101), "a": part(10, 100), "c": part(500, 102)}
WEIGHTS = {"a": 0.2, "b": 0.3, "c": 0.5}
GOLDEN_10 = [4, 8, 0, 6, 5, 7, 2, 9, 1, 3]
GOLDEN_ROWS = [("b", 15), ("c", 343), ("b", 6), ("b", 15)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63 - 1))
def test_permute_is_a_permutation(n, key):
    images = permute(np.arange(n), n, key)
    assert sorted(images.tolist()) == list(range(n))
    # Element by element it is the same function.
    assert permute(np.array([n - 1]), n, key)[0] == images[-1]


def test_permute_mixes():
    """Neighbours do not stay neighbours, and a place says nothing about its image."""
    n = 10_000
    images = permute(np.arange(n), n, 5)
    assert np.mean(np.abs(np.diff(images)) == 1) < 0.001
    assert abs(np.corrcoef(np.arange(n), images)[0, 1]) < 0.03  # 3 standard deviations
    assert np.mean(images == permute(np.arange(n), n, 6)) < 0.001


def test_permute_is_what_it_was():
    """A run resumed years later must read the same rows."""
    assert permute(np.arange(10), 10, 1).tolist() == GOLDEN_10
    mixture = Mixture(PARTS, WEIGHTS, seed=7)
    assert [mixture.locate(n) for n in (0, 1, 2, 12345)] == GOLDEN_ROWS


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 9))
def test_rows_do_not_depend_on_the_batch_size(first, n_rows, step):
    mixture = Mixture(PARTS, WEIGHTS, seed=7)
    whole = mixture.batch(first, n_rows)
    pieces = [mixture.batch(n, min(step, first + n_rows - n)) for n in range(first, first + n_rows, step)]
    assert whole.tokens_BT.tolist() == [row for piece in pieces for row in piece.tokens_BT.tolist()]
    for offset in (0, n_rows - 1):
        name, row = mixture.locate(first + offset)
        assert whole.tokens_BT[offset, :2].tolist() == [{"a": 100, "b": 101, "c": 102}[name], row]


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
        whole = [epoch for epoch in epochs if len(epoch) == rows.n_rows]
        assert len(whole) >= 2
        assert all(sorted(epoch) == list(range(rows.n_rows)) for epoch in whole)
        assert whole[0] != whole[1]


def test_the_seed_matters_and_the_order_of_the_dictionaries_does_not():
    places = [Mixture(PARTS, WEIGHTS, seed=s)._locate(np.arange(500)) for s in (1, 2)]
    assert (places[0][1] != places[1][1]).any() and (places[0][0] != places[1][0]).any()
    turned = Mixture(dict(reversed(PARTS.items())), dict(reversed(WEIGHTS.items())), seed=1)
    assert (turned._locate(np.arange(500))[1] == places[0][1]).all()


def test_a_batch_weighs_tokens_but_not_padding():
    batch = Mixture(PARTS, WEIGHTS).batch(0, 2)
    assert batch.loss_BT.tolist() in ([[0, 1, 0, 0]] * 2, [[0, 0, 0, 0], [0, 1, 0, 0]])


def test_weights_that_do_not_sum_to_one_are_shares_and_said_so():
    with pytest.warns(UserWarning, match="sum to 10, not 1"):
        mixture = Mixture(PARTS, {"a": 2, "b": 3, "c": 5})
    assert mixture.weights == pytest.approx(WEIGHTS)


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
