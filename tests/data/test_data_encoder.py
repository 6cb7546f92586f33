"""The fast encoder gives the tokenizer's own ids, whatever the text."""

import random
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from bessemer.data import encoder
from bessemer.data import encoder as fast
from bessemer.data.tokenizer import CJK, DIGITS, WORDS, Tokenizer
from bessemer.errors import UserError

SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated") for rule in (DIGITS, CJK, WORDS)])
# at least one character of every kind that a rule distinguishes
ALPHABET = 'aZéλж\u0301ªẞ0９½;.("#_-、。“€+ \n\r\t\x0b\x85\xa0\u3000\u2028\x00\x1f\u200b\xad你龥好〇のゟカー・㐀𠀀🙂﷽'
SAMPLES = [
    "Hello, world! (this is) a test.\n\n  Indented:\n\tTab\r\n", "3.14159 1234567 12a 1 000", "x_1 == 'abc'; y += 2",
    "你好，世界。abc你好123", "  \n \n  a", "a  ", "...\n\n\n b", "(word) (wordé) ((word", "\u200bword \u200b\u200b x",
    "<think>yes</think> no", "<｜User｜>x", " ", "", "\n", "e\u0301e\u0301 \u0301", ". a .a ..a . .a",
    "a\u3000b \u3000 c",
    "don't I'm _foo -bar \"quote", "def f(x):\n    return x\n\n\nclass A:\n    pass\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    draw = random.Random(0)
    texts = [*SAMPLES, *("".join(draw.choices(ALPHABET + "abcdefgh  ", k=80)) for _ in range(200))]
    return Tokenizer.train(texts * 3, 900)


@pytest.fixture(scope="module")
def encoders(tokenizer) -> list[fast.Encoder]:
    """One encoder that may use gigatoken, and one that may not."""
    both = [fast.Encoder(tokenizer), fast.Encoder(tokenizer)]
    both[1]._gigatoken = None
    return both


def _pieces(text: str) -> list[str]:
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    places = encoder.cuts(points, encoder.kinds()[points]).tolist()
    return [text[start:end] for start, end in pairwise(places)]


@given(st.text(alphabet=ALPHABET, min_size=1, max_size=24))
@settings(deadline=None, max_examples=1500)
def test_cuts_are_those_of_the_three_expressions(text):
    assert _pieces(text) == [piece for piece, _ in SPLIT.pre_tokenize_str(text)]


@given(st.text(min_size=1, max_size=40))
@settings(deadline=None, max_examples=150)
def test_cuts_of_any_text(text):
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    if (encoder.kinds()[points] != encoder.NEW).all():
        assert _pieces(text) == [piece for piece, _ in SPLIT.pre_tokenize_str(text)]


def test_kinds_are_those_of_the_library():
    points = [p for p in range(0x3400) if unicodedata.category(chr(p)) not in ("Cn", "Cs")]
    text = "".join(map(chr, points))
    table = encoder.kinds()
    for pattern, kinds in (
        (r"\p{L}", [encoder.LETTER]),
        (r"\p{M}", [encoder.MARK]),
        (r"\p{N}", [encoder.DIGIT]),
        (r"[\p{P}\p{S}]", [encoder.PUNCTUATION]),
        (r"\s", [encoder.BREAK, encoder.BLANK, encoder.SPACE]),
    ):
        left = set(
            "".join(piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text))
        )
        ours = {chr(p) for p in points if table[p] in kinds}
        han = {chr(p) for p in points if table[p] in (encoder.HAN, encoder.HAN_SIGN)}
        assert set(text) - left - han == ours - han, pattern


PARTS = st.one_of(st.sampled_from(ALPHABET), st.sampled_from(["<think>", "</think>", "<｜User｜>", "<thi", "nk>"]))


@given(st.lists(st.lists(PARTS, max_size=40).map("".join), max_size=6))
@settings(deadline=None, max_examples=300)
def test_ids_are_those_of_the_tokenizer(tokenizer, encoders, texts):
    """Also through gigatoken, if it is installed."""
    for one in encoders:
        assert [ids.tolist() for ids in one.encode_batch(texts)] == tokenizer.encode_batch(texts)


def test_words_that_a_polynomial_takes_for_each_other(tokenizer):
    """Thue-Morse words and their complements: modulo a power of two, no base tells them apart."""
    word = "".join("ab"[n.bit_count() % 2] for n in range(2048))
    texts = [word, word.translate(str.maketrans("ab", "ba"))]
    for text, ids in zip(texts, encoder.Encoder(tokenizer).encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text


def test_added_tokens_inside_one_another(tokenizer):
    """The leftmost wins, and of several there the longest; one inside a control token is text, as that is."""
    added = [("<t>", False), ("<t>x", False), ("[<t>]", True), ("x[", False)]
    tokens = [
        {"id": tokenizer.vocab_size + n, "content": content, "special": special, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for n, (content, special) in enumerate(added)
    ]  # fmt: skip
    spec = dict(tokenizer.spec, added_tokens=[*tokenizer.spec["added_tokens"], *tokens])
    other = Tokenizer(spec, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "")
    texts = ["<t>", "a <t>x b", " [<t>] ", "x[<t>]<t>", "<t><t>x<t", "[<t> ]x[", "<t>x[<t>]"]
    found = fast.Encoder(other).encode_batch(texts)
    assert [ids.tolist() for ids in found] == other.encode_batch(texts)
    assert len(other.encode("<t>")) == 1 and len(other.encode("[<t>]")) > 3


def test_what_is_remembered_changes_nothing(tokenizer, monkeypatch):
    encoder = fast.Encoder(tokenizer)
    assert encoder.has_v3_split
    monkeypatch.setattr(fast, "MOST_PIECES", 40)
    for _ in range(3):
        for text in SAMPLES:
            assert encoder.encode_batch([text])[0].tolist() == tokenizer.encode(text), text
    assert encoder.encode_batch([]) == []
    new = "a\U00016d40b"  # a letter only since Unicode 16
    assert encoder.encode_batch(["x", new, "y z"])[1].tolist() == tokenizer.encode(new)


def test_gigatoken_cuts_around_every_character(tokenizer, monkeypatch):
    """Its tables may have another Unicode version than the library's; also after its cache has been reset."""
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast, "MOST_CHARACTERS", 1 << 16)
    encoder = fast.Encoder(tokenizer)
    assert encoder._gigatoken is not None, f"install gigatoken=={fast.GIGATOKEN}"
    points = [chr(p) for p in (*range(0x3400), *range(0x3400, 0x32000, 17)) if not 0xD800 <= p < 0xE000]
    texts = [f"a{c}b {c} 1{c}2{c}\n{c}" for c in points]
    for start in range(0, len(texts), 1 << 12):
        some = texts[start : start + (1 << 12)]
        assert [ids.tolist() for ids in encoder.encode_batch(some)] == tokenizer.encode_batch(some)


def test_added_tokens_that_meet_are_not_left_to_gigatoken():
    assert fast._meet("<t>", "[<t>]") and fast._meet("x[", "[<t>]") and not fast._meet("<think>", "</think>")
    assert not any(fast._meet("<think>", control) for control in ("<｜User｜>", "<｜tool▁sep｜>"))


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(UserError, match="a lone surrogate"):
        fast.Encoder(tokenizer).encode_batch(["good", "bad \ud800"])


def test_another_pre_split_is_left_to_the_tokenizer(tokenizer):
    spec = dict(tokenizer.spec, normalizer={"type": "NFC"})
    other = Tokenizer(spec, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "")
    assert not fast.Encoder(other).has_v3_split
    assert fast.Encoder(other).encode_batch(SAMPLES)[0].tolist() == other.encode(SAMPLES[0])
