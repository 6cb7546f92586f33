"""Judged answers in rows: pairs stay whole and adjacent, and marks are on last tokens."""

import pytest

from bessemer.addons.r1 import preference_rows
from bessemer.errors import UserError

BOS, PAD = 0, 2
T = 32


def text(number, length):
    return [BOS, *(3 + (number * 7 + i) % 50 for i in range(length - 1))]


PAIRS = [(text(n, 4 + n % 9), text(n + 100, 3 + n * 5 % 11)) for n in range(60)]


def build(units, folder, kind, row_length=T):
    facts = preference_rows.build(units, row_length, PAD, folder)
    return facts, preference_rows.load(folder, kind, seed=3)


def test_every_pair_once_with_its_rival(tmp_path):
    units = [[(good, preference_rows.GOOD), (bad, preference_rows.BAD)] for good, bad in PAIRS]
    facts, rows = build(
        [*units, [(text(1, 20), preference_rows.GOOD), (text(2, 20), preference_rows.BAD)]],
        tmp_path,
        preference_rows.PairRows,
    )
    assert (facts["units"], facts["too_long"]) == (60, 1)
    batch = rows.batch(0, rows.n_rows)
    assert batch.n_loss_tokens == 60

    def read(row, last):
        segment = batch.segments_BT[row] == batch.segments_BT[row, last]
        return batch.tokens_BT[row, : last + 1][segment[: last + 1]].tolist()

    pairs_read = []
    for row, last in batch.loss_BT.nonzero().tolist():
        rival = int(batch.extras["rival_BT"][row, last])
        assert batch.segments_BT[row, rival] == batch.segments_BT[row, last] + 1
        pairs_read.append((read(row, last), read(row, rival)))
    assert sorted(pairs_read) == sorted((good, bad) for good, bad in PAIRS)
    again = [batch.tokens_BT.tolist() for batch in (rows.batch(2, 3), rows.batch(0, rows.n_rows).rows(2, 5))]
    assert again[0] == again[1]
    assert sorted(rows.batch(0, rows.n_rows).tokens_BT.tolist()) == sorted(
        rows.batch(rows.n_rows, rows.n_rows).tokens_BT.tolist()
    ), "the second epoch reads every row once too"


def test_labels_sit_on_last_tokens(tmp_path):
    units = [[(text(n, 5 + n % 3), preference_rows.GOOD if n % 3 else preference_rows.BAD)] for n in range(40)]
    facts, rows = build(units, tmp_path, preference_rows.LabelRows)
    batch = rows.batch(0, rows.n_rows)
    assert batch.n_loss_tokens == facts["units"] == 40
    assert batch.extras["safe_BT"].sum() == sum(n % 3 > 0 for n in range(40))
    assert not (batch.extras["safe_BT"] * (batch.loss_BT == 0)).any()
    for row, last in batch.loss_BT.nonzero().tolist():
        ends = last + 1 == T or int(batch.tokens_BT[row, last + 1]) in (BOS, PAD)
        assert ends, "the mark is on the last token of its text"


def test_nothing_that_fits_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"preference.*8 tokens.*row_length"):
        build([[(text(0, 9), preference_rows.GOOD)]], tmp_path, preference_rows.LabelRows, row_length=8)
    with pytest.raises(UserError, match="not a single preference answer"):
        build([], tmp_path, preference_rows.LabelRows)
    with pytest.raises(UserError, match="has no packed answers"):
        preference_rows.load(tmp_path / "nowhere", preference_rows.PairRows, 0)


def test_pairs_and_labelled_texts_are_counted_by_row(tmp_path):
    pairs = [[(good, preference_rows.GOOD), (bad, preference_rows.BAD)] for good, bad in PAIRS]
    labelled = [[(good, preference_rows.GOOD if n % 3 else preference_rows.BAD)] for n, (good, _) in enumerate(PAIRS)]
    for name, units, kind in (("p", pairs, preference_rows.PairRows), ("l", labelled, preference_rows.LabelRows)):
        _, rows = build(units, tmp_path / name, kind)
        assert rows.examples().sum() == 60
        of_step, row = rows.rows_of_steps(8, epochs=1), 0
        counts = []
        while row < rows.n_rows:
            counts.append(rows.batch(row, of_step(row)).n_loss_tokens)
            row += of_step(row)
        assert sum(counts) == 60 and all(abs(sum(counts[: n + 1]) - 8 * (n + 1)) < 8 for n in range(len(counts) - 1))
