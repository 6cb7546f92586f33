"""Packing and rows: no token lost, none doubled, waste small, damage noticed, held-out by text alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import corpus, rows
from bessemer.data.document import Document
from bessemer.data.encoded import is_heldout
from bessemer.data.packing import Packer
from bessemer.errors import UserError


def pack(lengths, row_length, window):
    """Pack documents whose tokens are all different; rows as lists of lists of tokens."""
    packer, made, start = Packer(row_length, window), [], 1
    for length in lengths:
        made += packer.add(np.arange(start, start + length))
        start += length
    made += packer.flush()
    return packer, [[piece.tolist() for piece in row] for row in made]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(2, 16), st.integers(1, 8))
def test_packing_keeps_every_token_once_and_cuts_only_what_is_too_long(lengths, row_length, window):
    packer, made = pack(lengths, row_length, window)
    tokens = sorted(token for row in made for piece in row for token in piece)
    assert tokens == list(range(1, sum(lengths) + 1))
    assert all(0 < sum(map(len, row)) <= row_length for row in made)
    pieces = {tuple(piece) for row in made for piece in row}
    start = 1
    for length in lengths:
        for cut in range(start, start + length, row_length):
            assert tuple(range(cut, min(cut + row_length, start + length))) in pieces
        start += length
    assert packer.rows == len(made)
    assert packer.waste == pytest.approx(1 - sum(lengths) / (row_length * len(made)) if made else 0)


def test_packing_takes_the_tightest_row():
    # Rows open with room 4 and 3 when the piece of 3 comes: it belongs into the room of 3.
    _, made = pack([6, 7, 3], 10, window=8)
    assert sorted([len(piece) for piece in row] for row in made) == [[6], [7, 3]]


def test_the_window_bounds_what_is_open():
    packer = Packer(10, window=4)
    for _ in range(100):
        list(packer.add(np.arange(6)))
        assert len(packer._open) <= 4


@pytest.fixture(scope="module")
def built(documents, tokenizer, tmp_path_factory):
    return corpus.build(documents, tokenizer, 64, tmp_path_factory.mktemp("corpus") / "c", heldout=0.1)


def content(part):
    return part.take(np.arange(part.n_rows))


def documents_of(part, tokenizer):
    """The documents that lie whole in the rows, as ids."""
    found = []
    for row in content(part).tolist():
        current = None
        for token in row:
            if token == tokenizer.bos_id:
                current = []
            elif token == tokenizer.eos_id and current is not None:
                found.append(tuple(current))
                current = None
            elif current is not None:
                current.append(token)
    return found


def test_rows_hold_exactly_the_documents(built, documents, tokenizer):
    sides = {"train": [], "heldout": []}
    for document in documents:
        sides["heldout" if is_heldout(document.text, 0.1) else "train"].append(document)
    for name, part in (("train", built.train), ("heldout", built.heldout)):
        mine = sides[name]
        assert part.facts["documents"] == len(mine) > 0
        assert part.facts["bytes"] == sum(len(document.text.encode()) for document in mine)
        ids = [tuple(tokenizer.encode(document.text)) for document in mine]
        assert part.facts["tokens"] == sum(len(i) + 2 for i in ids) == int((content(part) != 2).sum())
        assert sorted(documents_of(part, tokenizer)) == sorted(i for i in ids if len(i) + 2 <= 64)
        assert part.waste == pytest.approx(1 - part.facts["tokens"] / content(part).size, abs=1e-6)
        assert [tuple(ids[1:-1].tolist()) for ids in part.documents()] == ids
        assert sum(counts["tokens"] for counts in part.facts["domains"].values()) == part.facts["tokens"]
    assert built.train.waste < 0.05


def test_the_heldout_share_is_about_what_was_asked_and_is_decided_by_the_text():
    texts = [f"text {n}" for n in range(4000)]
    held = {text for text in texts if is_heldout(text, 0.02)}
    assert 40 < len(held) < 130  # 80 expected, standard deviation 9
    assert held <= {text for text in texts if is_heldout(text, 0.05)}


def test_a_batch_counts_neither_padding_nor_first_tokens(built):
    last = built.train.n_rows - 1  # the emptiest row is closed last
    batch = built.train.batch([last, 0])
    assert batch.tokens_BT.tolist() == content(built.train)[[last, 0]].tolist()
    assert batch.tokens_BT[0, -1] == 2
    expected = (batch.tokens_BT != 2).float()
    expected[:, 0] = 0
    assert (batch.loss_BT == expected).all() and batch.segments_BT is None


def test_the_same_build_gives_the_same_bytes_and_replaces_the_old(built, documents, tokenizer, tmp_path):
    first = corpus.build(documents[:100], tokenizer, 64, tmp_path / "c")
    again = corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0.1)
    assert first.train.n_rows < again.train.n_rows
    assert again.meta == built.meta
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.lock", "c"]


def test_limits(documents, tokenizer, tmp_path):
    few = corpus.build(documents, tokenizer, 64, tmp_path / "a", limit_documents=10, heldout=0)
    assert few.train.facts["documents"] == 10 and few.heldout.n_rows == 0
    some = corpus.build(documents, tokenizer, 64, tmp_path / "b", limit_tokens=2000, heldout=0)
    longest = max(len(tokenizer.encode(document.text)) for document in documents) + 2
    assert 2000 <= some.train.facts["tokens"] < 2000 + longest


@pytest.mark.parametrize("name", ["train-00000.tokens", "heldout-00000.tokens", "train-00000.ends.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damage_is_an_error_that_names_the_file(documents, tokenizer, tmp_path, name, damage):
    corpus.build(documents[:300], tokenizer, 64, tmp_path / "c", heldout=0.2)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[0] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        corpus.load(tmp_path / "c")


def test_a_build_that_fails_leaves_the_old_corpus(documents, tokenizer, tmp_path):
    good = corpus.build(documents[:50], tokenizer, 64, tmp_path / "c")

    def breaking():
        yield from documents[50:100]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        corpus.build(breaking(), tokenizer, 64, tmp_path / "c")
    assert corpus.load(tmp_path / "c").meta == good.meta
    assert not (tmp_path / ".c.building").exists()


def test_mistakes(documents, tokenizer, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for call, word in [
        (lambda: corpus.build(documents, tokenizer, 64, tmp_path / "mine"), "is not a corpus"),
        (lambda: corpus.build(documents, tokenizer, 1, tmp_path / "c"), "row_length"),
        (lambda: corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=1.0), "heldout"),
        (lambda: corpus.build([], tokenizer, 64, tmp_path / "c"), "no training document"),
        (lambda: corpus.build([Document(" \n", "own")], tokenizer, 64, tmp_path / "c"), "no training document"),
        (lambda: corpus.build(documents, tokenizer, 64, tmp_path / "c", fim_rate=2), "fim_rate"),
        (lambda: rows.open_rows(tmp_path / "mine"), "not a finished corpus"),
    ]:
        with pytest.raises(UserError, match=word):
            call()
    assert not (tmp_path / "c").exists()


def test_large_vocabularies_use_four_bytes(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda self: 65536))
    wide = corpus.build(documents[:20], tokenizer, 64, tmp_path / "c")
    assert wide.train.take([0]).dtype == np.uint32
    assert json.loads((tmp_path / "c" / "meta.json").read_text())["dtype"] == "<u4"
