"""Packing and rows: no token lost or repeated, little waste, damage noticed, held-out chosen by text alone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import corpus
from bessemer.data import rows as packing
from bessemer.data.corpus import is_heldout
from bessemer.data.documents import Document
from bessemer.data.plans import best_fit
from bessemer.errors import UserError


def pack(lengths, row_length):
    """Rows as lists of token ranges."""
    return list(best_fit(np.array(lengths, dtype=np.int64), row_length).rows())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(2, 16))
def test_packing_keeps_every_token_and_splits_only_overlong_documents(lengths, row_length):
    rows = pack(lengths, row_length)
    tokens = sorted(token for row in rows for piece in row for token in piece)
    assert tokens == list(range(sum(lengths)))
    assert all(0 < sum(map(len, row)) <= row_length for row in rows)
    pieces = {(piece.start, piece.stop) for row in rows for piece in row}
    start = 0
    for length in lengths:
        for cut in range(start, start + length, row_length):
            assert (cut, min(cut + row_length, start + length)) in pieces
        start += length
    firsts = [min(piece.start for piece in row) for row in rows]
    assert firsts == sorted(firsts), "rows come in the order of their first document"
    # What best-fit decreasing guarantees: no two rows would fit into one.
    room = sorted(row_length - sum(map(len, row)) for row in rows)
    assert len(room) < 2 or room[-1] + room[-2] < row_length or row_length - room[-1] > room[-2]


def test_packing_takes_the_tightest_row():
    # Rows with room for 4 and for 3 exist when the piece of 3 comes: it belongs in the latter.
    assert pack([6, 7, 3], 10) == [[range(6)], [range(6, 13), range(13, 16)]]


def test_little_is_padded():
    lengths = np.random.default_rng(0).integers(10, 300, 5000)
    for row_length in (256, 1024, 4096):
        assert sum(lengths) / (len(pack(lengths, row_length)) * row_length) > 0.995


def test_rows_of_samples_are_written_in_groups(monkeypatch, tmp_path):
    samples = [np.full(n, n, dtype="<u4") for n in (3, 4, 5, 6, 7, 8)]
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 12)
    with (tmp_path / "rows").open("w+b") as file:
        rows, waste = packing.write_rows(iter(samples), 8, 0, np.dtype("<u4"), file)
        file.seek(0)
        actual = np.frombuffer(file.read(), "<u4").reshape(rows, 8)
    assert sorted(actual[actual > 0].tolist()) == sorted(token for sample in samples for token in sample.tolist())
    assert actual[0].tolist() == [3] * 3 + [5] * 5, "the first group packs by itself"
    assert waste == pytest.approx((actual == 0).mean())


@pytest.fixture(scope="module")
def built(documents, tokenizer, tmp_path_factory):
    return corpus.build(documents, tokenizer, 64, tmp_path_factory.mktemp("corpus") / "c", heldout=0.1)


def content(part):
    return part.take(np.arange(part.n_rows))


def documents_of(part, tokenizer):
    """The documents that lie entirely within the rows, as ids."""
    documents = []
    for row in content(part).tolist():
        current = None
        for token in row:
            if token == tokenizer.bos_id:
                current = []
            elif token == tokenizer.eos_id and current is not None:
                documents.append(tuple(current))
                current = None
            elif current is not None:
                current.append(token)
    return documents


def test_rows_hold_exactly_the_documents(built, documents, tokenizer):
    sides = {"train": [], "heldout": []}
    for document in documents:
        sides["heldout" if is_heldout(document.text, 0.1) else "train"].append(document)
    for name, part in (("train", built.train), ("heldout", built.heldout)):
        side = sides[name]
        assert part.facts["documents"] == len(side) > 0
        assert part.facts["bytes"] == sum(len(document.text.encode()) for document in side)
        ids = [tuple(tokenizer.encode(document.text)) for document in side]
        assert part.facts["tokens"] == sum(len(i) + 2 for i in ids) == int((content(part) != 2).sum())
        assert sorted(documents_of(part, tokenizer)) == sorted(i for i in ids if len(i) + 2 <= 64)
        assert part.waste == pytest.approx(1 - part.facts["tokens"] / content(part).size, abs=1e-6)
        assert [tuple(ids[1:-1].tolist()) for ids in part.documents()] == ids
        assert sum(counts["tokens"] for counts in part.facts["domains"].values()) == part.facts["tokens"]
    assert built.train.waste < 0.05


def test_heldout_share_is_close_to_the_request_and_depends_on_text_alone():
    texts = [f"text {n}" for n in range(4000)]
    held_out = {text for text in texts if is_heldout(text, 0.02)}
    assert 40 < len(held_out) < 130  # 80 expected, standard deviation 9
    assert held_out <= {text for text in texts if is_heldout(text, 0.05)}


def test_a_batch_counts_neither_padding_nor_first_tokens(built):
    emptiest = int((content(built.train) == 2).sum(1).argmax())
    batch = built.train.batch([emptiest, 0])
    assert batch.tokens_BT.tolist() == content(built.train)[[emptiest, 0]].tolist()
    assert batch.tokens_BT[0, -1] == 2
    expected = (batch.tokens_BT != 2).float()
    expected[:, 0] = 0
    assert (batch.loss_BT == expected).all() and batch.segments_BT is None


def test_segments_never_mix_documents_even_without_bos(built, tokenizer):
    rows = built.train
    batch = rows.batch(range(rows.n_rows), masked=True)
    documents_read = [document.tobytes() for document in rows.documents()]
    middles = 0
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        assert segments_T[0] == 0 and set(segments_T.diff().tolist()) <= {0, 1}
        for segment in segments_T.unique():
            ids = tokens_T[(segments_T == segment) & (tokens_T != rows.pad_id)].numpy()
            middles += ids[0] != tokenizer.bos_id and int(segment) > 0
            assert any(ids.astype(rows._dtype).tobytes() in entry for entry in documents_read)
    assert middles > 3, "some follow another document in their row"
    order = [5, 0, 3]
    assert np.array_equal(rows.documents_of(order), batch.segments_BT[order])
    assert rows.batch(order).segments_BT is None


def test_rebuilding_gives_the_same_bytes_and_replaces_the_old(built, documents, tokenizer, tmp_path):
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
        (lambda: corpus.build([], tokenizer, 64, tmp_path / "c"), "no training documents"),
        (lambda: corpus.build([Document(" \n", "own")], tokenizer, 64, tmp_path / "c"), "no training documents"),
        (lambda: corpus.build(documents, tokenizer, 64, tmp_path / "c", fim_rate=2), "fim_rate"),
        (lambda: packing.open_rows(tmp_path / "mine"), "not a finished corpus"),
    ]:
        with pytest.raises(UserError, match=word):
            call()
    assert not (tmp_path / "c").exists()


def test_large_vocabularies_use_four_bytes(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda self: 65536))
    wide = corpus.build(documents[:20], tokenizer, 64, tmp_path / "c")
    assert wide.train.take([0]).dtype == np.uint32
    assert json.loads((tmp_path / "c" / "meta.json").read_text())["dtype"] == "<u4"
