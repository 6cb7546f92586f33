"""Signatures: they estimate similarity as promised, and depend only on the text."""

import random

import numpy as np

from bessemer.addons.curate.duplicates import SignatureShape, keys, signed
from bessemer.addons.curate.words import words as words_of

SHAPE = SignatureShape()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _jaccard(first: str, second: str, n: int = 5) -> float:
    def runs(text: str) -> set:
        words = text.split()
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    return len(runs(first) & runs(second)) / len(runs(first) | runs(second))


def signatures(texts):
    return signed(words_of(texts), len(texts), SHAPE)


def _changed(text: str, words: int, draw: random.Random) -> str:
    pieces = text.split()
    for at in draw.sample(range(len(pieces)), words):
        pieces[at] = "".join(draw.choices(LETTERS, k=12))
    return " ".join(pieces)


def test_equal_places_estimate_the_jaccard_similarity():
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(LETTERS, k=6)) for _ in range(5000)]
    errors, truths = [], []
    for _ in range(200):
        text = " ".join(draw.choices(vocabulary, k=200))
        changed = _changed(text, draw.randint(1, 25), draw)
        signs, _ = signatures([text, changed])
        truths.append(_jaccard(text, changed))
        errors.append((signs[0] == signs[1]).mean() - truths[-1])
    spread = np.sqrt(np.mean([j * (1 - j) for j in truths]) / SHAPE.permutations)
    assert abs(np.mean(errors)) < 4 * spread / np.sqrt(200)
    assert np.std(errors) < 1.3 * spread


def test_a_signature_depends_on_its_text_alone():
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefghij", k=draw.randint(0, 300))) for _ in range(40)] + ["", "one", "，。"]
    together, any_together = signatures(texts)
    for number, text in enumerate(texts):
        alone, any_alone = signatures([text])
        assert any_alone[0] == any_together[number]
        if any_alone[0]:
            assert (alone[0] == together[number]).all()
    assert any_together[-3:].tolist() == [False, True, False]


def test_short_texts_have_one_shingle_and_chinese_counts_characters():
    signs, _ = signatures(["one two", "one two", "one three", "狮子和老鼠", "狮子和老虎"])
    assert (signs[0] == signs[1]).all()
    assert (signs[0] == signs[2]).mean() < 0.1
    assert (signs[3] == signs[4]).mean() < 0.1  # five characters are one shingle, and these differ in one character
    assert keys(signs, SHAPE).shape == (SHAPE.bands, 5)
