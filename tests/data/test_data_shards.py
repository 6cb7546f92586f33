"""Shards: many form one corpus, rows of any length hold the same documents, and damage is noticed on reading."""

import json
import os
import random

import numpy as np
import pytest

from bessemer.data import corpus, shards
from bessemer.data.corpus import Augment, tokenise
from bessemer.data.encoder import Encoder
from bessemer.data.plans import plan_files, write_plan
from bessemer.data.rows import open_rows
from bessemer.errors import UserError


def content(rows):
    return rows.take(np.arange(rows.n_rows))


def split(documents, tokenizer, folder, row_length=64):
    """The same documents in shards of a hundred, as parallel processes would write them."""
    folder.mkdir()
    done = []
    for number, first in enumerate(range(0, len(documents), 100)):
        writer = shards.ShardWriter(folder, "train", number, shards.dtype_of(tokenizer))
        for document, _, ids in tokenise(
            documents[first : first + 100], Encoder(tokenizer), 0.0, Augment(tokenizer, 0, 0)
        ):
            writer.add(ids, document.domain, len(document.text.encode()))
        done.append(writer.finish())
        write_plan(folder, folder / f"rows-{row_length}", writer.name, shards.dtype_of(tokenizer), row_length)
    shards.seal(folder, tokenizer, row_length, {"train": done})


def tokens_of(rows):
    return sorted(token for token in content(rows).ravel().tolist() if token != rows.pad_id)


def test_many_shards_are_one_corpus(documents, tokenizer, tmp_path):
    single = corpus.build(documents, tokenizer, 64, tmp_path / "one", heldout=0)
    split(documents, tokenizer, tmp_path / "many")
    sharded = open_rows(tmp_path / "many")
    assert len(sharded.facts["shards"]) > 3
    for key in ("documents", "tokens", "bytes", "domains"):
        assert sharded.facts[key] == single.train.facts[key]
    assert tokens_of(sharded) == tokens_of(single.train)
    assert [ids.tolist() for ids in sharded.documents()] == [ids.tolist() for ids in single.train.documents()]
    first = [len(np.load(plan_files(tmp_path / "many" / "rows-64", name)[1])) for name in sharded._names]
    across = [first[0], first[0] - 1, 0, sharded.n_rows - 1]  # rows on both sides of a shard border, in any order
    assert (sharded.take(across) == content(sharded)[across]).all()
    with pytest.raises(IndexError):
        sharded.take([sharded.n_rows])


def test_rows_of_another_length_need_no_other_copy(documents, tokenizer, tmp_path):
    built = corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0.1)
    before = sorted(path.name for path in (tmp_path / "c").iterdir())
    wide = open_rows(tmp_path / "c", "train", 256, plans=tmp_path / "plans")
    fresh = corpus.build(documents, tokenizer, 256, tmp_path / "fresh", heldout=0.1)
    assert (content(wide) == content(fresh.train)).all()
    assert tokens_of(wide) == tokens_of(built.train)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == before
    assert wide.waste < built.train.waste + 0.05


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_shard_that_changes_under_a_running_job_is_named(documents, tokenizer, tmp_path, damage):
    rows = corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0).train
    path = tmp_path / "c" / "train-00000.tokens"
    good = content(rows)
    with path.open("r+b") as file:
        if damage == "flip":
            file.seek(path.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
        else:
            file.truncate(path.stat().st_size // 2)
    wrong = []
    for row in range(rows.n_rows):
        try:
            assert (rows.take([row]) == good[row]).all()
        except UserError as error:
            assert "train-00000.tokens was altered" in str(error)
            wrong.append(row)
    assert len(wrong) == 1 if damage == "flip" else len(wrong) > 1


def test_large_corpora_are_compared_by_size_unless_hashing_is_requested(documents, tokenizer, tmp_path, monkeypatch):
    corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0)
    path = tmp_path / "c" / "train-00000.tokens"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        open_rows(tmp_path / "c")
    monkeypatch.setattr(shards, "CHECKED_BYTES", 0)
    open_rows(tmp_path / "c")
    with pytest.raises(UserError, match="sha256"):
        shards.check(tmp_path / "c", shards.read_meta(tmp_path / "c"))


def test_truncated_plans_are_rebuilt(documents, tokenizer, tmp_path):
    rows = corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0).train
    pieces, counts = plan_files(tmp_path / "c" / "rows-64", "train-00000")
    pieces.unlink()
    assert (content(open_rows(tmp_path / "c")) == content(rows)).all()
    counts.write_bytes(counts.read_bytes()[:50])
    with pytest.raises(UserError, match="delete that folder"):
        open_rows(tmp_path / "c")


def test_a_link_stands_for_its_corpus_until_that_is_built_again(documents, tokenizer, tmp_path):
    built = corpus.build(documents, tokenizer, 64, tmp_path / "c", heldout=0.1)
    shards.link(tmp_path / "link", tmp_path / "c", 128)
    linked = corpus.load(tmp_path / "link")
    assert linked.train.row_length == 128 and tokens_of(linked.train) == tokens_of(built.train)
    assert linked.heldout.n_rows > 0 and (tmp_path / "link" / "rows-128").is_dir()
    assert not (tmp_path / "c" / "rows-128").exists()
    corpus.build(documents[:200], tokenizer, 64, tmp_path / "c")
    with pytest.raises(UserError, match="was rebuilt"):
        corpus.load(tmp_path / "link")


def everything(folder):
    built = corpus.load(folder)
    return [
        [
            rows.facts,
            rows.tokenizer,
            rows.bytes_per_token,
            content(rows).tolist(),
            [d.tolist() for d in rows.documents()],
        ]
        for rows in (built.train, built.heldout)
    ]


def test_one_wrong_bit_in_any_file_is_a_message(documents, tokenizer, tmp_path):
    """Also in meta.json, which holds its own checksum."""
    corpus.build(documents[:60], tokenizer, 32, tmp_path / "c", heldout=0.3)
    good, chance = everything(tmp_path / "c"), random.Random(4)
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert len(files) == 9
    harmless = 0
    for path in files:
        data = path.read_bytes()
        headers = list(range(0, 128, 3)) if path.suffix == ".npy" else []
        flips = 120 if path.name == "meta.json" else 25
        for offset in [*headers, *(chance.randrange(len(data)) for _ in range(flips))]:
            flipped = data[:offset] + bytes([data[offset] ^ 1 << chance.randrange(8)]) + data[offset + 1 :]
            path.write_bytes(flipped)
            try:
                assert everything(tmp_path / "c") == good, f"{path.name}, byte {offset}: not noticed"
                harmless += 1
            except UserError as error:
                assert any(word in str(error) for word in ("altered", "broken", "missing", "bytes"))
        path.write_bytes(data)
    assert everything(tmp_path / "c") == good
    assert harmless < 5, "white space in a header"


def test_metadata_without_checksum_is_still_validated(documents, tokenizer, tmp_path):
    corpus.build(documents[:60], tokenizer, 32, tmp_path / "c", heldout=0.3)
    good, path = everything(tmp_path / "c"), tmp_path / "c" / "meta.json"
    facts = json.loads(path.read_text())
    del facts["checksum"], facts["format"]
    path.write_text(json.dumps(facts))
    assert everything(tmp_path / "c") == good
    shard = facts["parts"]["train"]["shards"][0]
    for wrong in ({"name": "../../secret"}, {"tokens": -1}, {"sha256": 5}, {"name": "train-99999"}, {"bytes": "a"}):
        path.write_text(json.dumps(facts).replace(json.dumps(shard), json.dumps(shard | wrong)))
        with pytest.raises(UserError, match=r"broken|missing|bytes"):
            everything(tmp_path / "c")


def test_facts_that_are_none(tmp_path):
    for text in (
        "[]",
        "{}",
        '{"parts": {"train": {}}}',
        json.dumps({"parts": {"train": {"shards": 1}, "heldout": {}}}),
    ):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(UserError, match=r"meta\.json is broken"):
            open_rows(tmp_path)
