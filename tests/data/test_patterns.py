"""Regular expressions from foreign tokenizers are tried in another process before they are used."""

import json

import hf_tokenizers as houses
import pytest

from bessemer.addons.families import patterns
from bessemer.data.tokenizer import OtherSplit, Tokenizer
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def with_pattern(directory, pattern):
    houses.byte_level(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [rule, spec["pre_tokenizer"]]}
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    return directory


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(a|a)*b", r"(?=(\s+)+b)", "("])
def test_patterns_that_explode_are_refused(tmp_path, pattern):
    with pytest.raises(UserError, match=r"tokenizer.json.*pre-tokenizer"):
        load_tokenizer(with_pattern(tmp_path / "model", pattern))


def test_usual_patterns_pass_and_our_own_need_no_trial(tmp_path, monkeypatch):
    assert load_tokenizer(with_pattern(tmp_path / "model", QWEN)).encode("it's 12")
    monkeypatch.setattr(patterns, "_child", None)
    own = Tokenizer.train(houses.TEXTS, 300)
    own.save(tmp_path / "own")
    assert load_tokenizer(tmp_path / "own").encode("a") == own.encode("a")
    with pytest.raises(TypeError):
        patterns.check({"normalizer": {"pattern": {"Regex": "a"}}}, "here")


def test_a_pattern_that_waits_for_its_text_is_an_error_when_that_comes(tmp_path, capfd):
    tok = load_tokenizer(with_pattern(tmp_path / "model", "(Q|Q)*Z"))
    assert tok.encode("a quiet text")
    with pytest.raises(UserError, match="tokenizer fails"):
        tok.encode("Q" * 48 + "! Z")
    capfd.readouterr()  # the library's own stack


def test_a_tokenizer_with_our_tokens_and_another_split_is_read_by_the_add_on(tmp_path):
    Tokenizer.train(houses.TEXTS, 300).save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][2]["pattern"]["Regex"] = QWEN
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(OtherSplit, match=r"tokenizer\.json .*load_tokenizer"):
        Tokenizer.load(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.chat_style == "zero" and read.decode(read.encode("it's 12")) == "it's 12"
