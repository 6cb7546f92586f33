"""Tokenizer: lossless, deterministic, V3's pre-split, control tokens only by id, the same ids in transformers."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import chat
from bessemer.data.tokenizer import SMALLEST, Tokenizer
from bessemer.errors import UserError

# Any text that UTF-8 can hold, with the dangerous pieces made likely.
PIECES = st.sampled_from(
    [*chat.ADDED, "\n", " ", "  ", "123", "4567", "你好", "ひらがな", "😀", "a.\n", "é", "<", "｜>"]
)
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=12).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_decode_undoes_encode_and_no_control_id_comes_out(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_special(i) for i in ids)
    assert ids.count(tokenizer.think_id) == text.count("<think>")
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


def test_ids_are_where_the_contract_says(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert [tokenizer.special_id(content) for content in chat.ADDED] == list(range(len(chat.ADDED)))
    assert tokenizer.vocab_size == 1024
    assert chat.BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def test_skip_special_drops_control_tokens_and_keeps_think(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("<think>2</think>"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "<think>2</think>"
    assert tokenizer.decode(ids, skip_special=False) == f"{chat.BOS}<think>2</think>{chat.EOS}{chat.PAD}"


def test_control_text_is_plain_text(tokenizer):
    assert tokenizer.special_id(chat.USER) not in tokenizer.encode(chat.USER)
    assert len(tokenizer.encode(chat.USER)) > 1


def test_numbers_up_to_three_digits_are_one_token_longer_ones_are_cut_in_threes():
    texts = [f"{n} and {n}" for n in range(1000)]
    tokenizer = Tokenizer.train(texts, 1261)
    assert all(len(tokenizer.encode(str(n))) == 1 for n in range(1000))
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["123", "456", "7"]


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("abc123def", ["abc", "123", "def"]),
        ("a 12", ["a", " ", "12"]),
        ("他说hello", ["他说", "hello"]),
        ("ok.\n\nnext", ["ok", ".\n\n", "next"]),
        ("x = y", ["x", " =", " y"]),
        ("f(x)", ["f", "(x", ")"]),
        ("a\n  b", ["a", "\n", " ", " b"]),
    ],
)
def test_pre_split_matches_that_of_v3(tokenizer, text, cuts):
    pieces = [text[start:end] for _, (start, end) in tokenizer._tok.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == cuts


def test_training_is_deterministic_across_processes_and_threads(texts, tmp_path):
    program = (
        "import sys, json; from bessemer.data.tokenizer import Tokenizer\n"
        "print(Tokenizer.train(json.load(open(sys.argv[1])), 700).fingerprint)"
    )
    (tmp_path / "texts.json").write_text(json.dumps(texts[:500]))
    runs = {
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / "texts.json"],
            env=os.environ | {"RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for threads in ("1", "2")
    }
    assert runs == {Tokenizer.train(texts[:500], 700).fingerprint}


def test_batch_encoding_equals_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts[:50]) == [tokenizer.encode(text) for text in texts[:50]]


def test_save_load_and_transformers_agree(tokenizer, texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id) == (0, 1, 2)
    for text in [*texts[:30], "<think>a</think> b", "  two  blanks ", "1234567 你好\n\n"]:
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert reference(text)["input_ids"] == ids  # in particular no BOS
        assert reference.decode([*ids, 1], skip_special_tokens=True) == text
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["add_bos_token"] is False


def test_chat_style_travels_with_the_directory(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    assert Tokenizer.load(tmp_path / "a").chat_style == "zero"
    loaded = Tokenizer.load(tmp_path / "a")
    loaded.chat_style = "r1"
    loaded.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").chat_style == "r1"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text().replace("Assistant:", "Bot:"))
    assert Tokenizer.load(tmp_path / "b").chat_style is None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_damaged_directory_is_an_error_that_names_the_file(tokenizer, tmp_path, name, damage):
    tokenizer.save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.write_text("{}")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)


def test_spare_rows_of_an_embedding_have_no_text(tokenizer):
    ids = tokenizer.encode("a tin")
    for spare in (tokenizer.vocab_size, 129_279):
        assert tokenizer.decode([ids[0], spare, *ids[1:], spare]) == "a tin"


def test_user_mistakes_have_a_message(tokenizer):
    with pytest.raises(UserError, match=str(SMALLEST)):
        Tokenizer.train(["a"], 100)
    with pytest.raises(UserError, match="outside the vocabulary of 1024"):
        tokenizer.token_bytes(1024)
    with pytest.raises(UserError, match="outside the vocabulary of 1024"):
        tokenizer.decode([-1])
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.warns(UserWarning, match="give only"):
        Tokenizer.train(["aa bb"], 400)


def test_unmarked_control_tokens_of_foreign_files_become_control(tokenizer, tmp_path):
    """The hub's own tokenizer.json leaves <｜User｜> unmarked; loaded unchanged, a text could write a turn."""
    tokenizer.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = token["id"] < 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_id(chat.USER) not in loaded.encode(chat.USER)
    assert loaded.encode("<think>") == [loaded.think_id]
