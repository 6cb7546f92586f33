"""Words as numbers: the same words as addons/tasks/readable, found all at once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.curate.words import words
from bessemer.addons.tasks import readable

# what both agree on: readable.words leaves out other alphabets, which are letters here too
SHARED = "aAzZ éÉ ñ Ж б λ 09 7 你 好 の カ -+*/=<>^%×÷ , . ! ? ' \n\t ， 。 “ （".replace(" ", "") + "  "
texts = st.text(alphabet=SHARED, max_size=60)


@given(st.lists(texts, max_size=6))
@settings(deadline=None, max_examples=200)
def test_words_match_those_of_readable_answers(many):
    block = words(many)
    expected = [(number, word) for number, text in enumerate(many) for word in readable.words(text)]
    assert block.texts_W.tolist() == [number for number, _ in expected]
    assert block.lengths_W.tolist() == [len(word) for _, word in expected]
    number_of: dict[str, int] = {}
    for (_, word), number in zip(expected, block.hashes_W.tolist(), strict=True):
        assert number_of.setdefault(word, number) == number
    assert len(set(number_of.values())) == len(number_of)


def test_a_word_has_one_number_wherever_it_stands():
    alone = words(["lantern"]).hashes_W[0]
    block = words(["x" * 1000 + " a lantern", "Lantern, again: lantern"])
    assert (block.hashes_W == alone).sum() == 3


def test_other_scripts_are_words_too():
    assert len(words(["שלום עולם"]).hashes_W) == 2
    assert len(words(["สวัสดี"]).hashes_W) == 6  # written without spaces, so split into characters
