"""Documents are encoded with the tokenizer's own ids, also by gigatoken if it is installed."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.accelerate import gigatoken_encoder
from bessemer.data import encoder as encoders
from bessemer.data.encoder import Encoder
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError

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
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


PARTS = st.one_of(st.sampled_from(ALPHABET), st.sampled_from(["<think>", "</think>", "<｜User｜>", "<thi", "nk>"]))


@given(st.lists(st.lists(PARTS, max_size=40).map("".join), max_size=6))
@settings(deadline=None, max_examples=300)
def test_ids_match_those_of_the_tokenizer(tokenizer, encoder, texts):
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == tokenizer.encode_batch(texts)


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
    actual = Encoder(other).encode_batch(texts)
    assert [ids.tolist() for ids in actual] == other.encode_batch(texts)
    assert len(other.encode("<t>")) == 1 and len(other.encode("[<t>]")) > 3


class Upper:
    """A faster implementation that serves texts in capitals."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, texts):
        self.asked += texts
        return self.tokenizer.encode_batch(texts) if all(map(str.isupper, texts)) else None


def test_a_faster_implementation_encodes_what_it_can(tokenizer, monkeypatch):
    fast = Upper(tokenizer)
    monkeypatch.setattr(encoders, "faster", lambda _: fast)
    encoder = Encoder(tokenizer)
    assert encoder.encode_batch(["ABC"]) == tokenizer.encode_batch(["ABC"])
    assert encoder.encode_batch(["abc"])[0].tolist() == tokenizer.encode("abc")
    assert fast.asked == ["ABC", "abc"]


def test_gigatoken_cuts_around_every_character(tokenizer, monkeypatch):
    """Its tables may have another Unicode version than the library's; also after its cache has been reset."""
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(gigatoken_encoder, "MOST_CHARACTERS", 1 << 16)
    encode = gigatoken_encoder.faster(tokenizer)
    assert encode is not None, f"install gigatoken=={gigatoken_encoder.GIGATOKEN}"
    points = [chr(p) for p in (*range(0x3400), *range(0x3400, 0x32000, 17)) if not 0xD800 <= p < 0xE000]
    texts = [f"a{c}b {c} 1{c}2{c}\n{c}" for c in points]
    for start in range(0, len(texts), 1 << 12):
        some = texts[start : start + (1 << 12)]
        assert [ids.tolist() for ids in encode(some)] == tokenizer.encode_batch(some)


def test_added_tokens_that_meet_are_not_left_to_gigatoken():
    meet = gigatoken_encoder.can_overlap
    assert meet("<t>", "[<t>]") and meet("x[", "[<t>]") and not meet("<think>", "</think>")
    assert not any(meet("<think>", control) for control in ("<｜User｜>", "<｜tool▁sep｜>"))


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(UserError, match="a lone surrogate"):
        Encoder(tokenizer).encode_batch(["good", "bad \ud800"])


def test_another_pre_split_is_left_to_the_tokenizer(tokenizer):
    spec = dict(tokenizer.spec, normalizer={"type": "NFC"})
    other = Tokenizer(spec, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "")
    assert gigatoken_encoder.has_v3_split(tokenizer) and not gigatoken_encoder.has_v3_split(other)
    assert Encoder(other).encode_batch(SAMPLES)[0].tolist() == other.encode(SAMPLES[0])


def test_encoding_loads_no_torch(tokenizer, tmp_path):
    """The workers of `bessemer data build` encode, and would each hold it."""
    tokenizer.save(tmp_path)
    program = (
        "import sys\n"
        "from bessemer.data.encoder import Encoder\n"
        "from bessemer.data.tokenizer import Tokenizer\n"
        "Encoder(Tokenizer.load(sys.argv[1])).encode_batch(['a text'])\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
