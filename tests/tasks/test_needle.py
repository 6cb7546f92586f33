"""The needle task: where the needle is placed, what a page contains, and that pages never contain test items."""

import re

import pytest

from bessemer.addons.tasks.needle import ADJECTIVES, SENTENCE, SPEAKERS, STEM, WORDS, Needle
from bessemer.errors import UserError
from bessemer.tasks.base import split_of_text

TEXTS = {
    "train": [f"Story {n}. " + " ".join(f"A{n} went to B{i}, and came back." for i in range(20)) for n in range(9)],
    "test": [f"Tale {n}! " + " ".join(f"C{n} saw D{i}; nothing came of it." for i in range(30)) for n in range(4)],
}
NEEDLE = re.compile(r"The (\w+ \w+) says (\w+)\. ?")


@pytest.fixture(scope="module")
def task():
    return Needle(TEXTS)


def test_words_are_distinguished():
    for words in (ADJECTIVES, SPEAKERS, WORDS):
        assert len(set(words)) == len(words) and all(word.isalpha() for word in words)
    assert not set(WORDS) & {*ADJECTIVES, *SPEAKERS}


@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_the_needle_lies_at_its_depth_and_the_prompt_fits(task, depth, measure):
    size = 3000 if measure is len else 500
    for index in range(10):
        problem = task.hidden("test", index, size, depth, 6, measure=measure)
        text, _, begun = problem.prompt.rpartition("\n")
        assert size - 60 < measure(problem.prompt) <= size
        assert begun == STEM.format(key=problem.meta["key"])
        needle = SENTENCE.format(key=problem.meta["key"], word=problem.meta["word"])
        needles = list(NEEDLE.finditer(text))
        assert len(needles) == 6 and [match[0].strip() for match in needles].count(needle) == 1
        assert len({match[2] for match in needles}) == len({match[1].split()[1] for match in needles}) == 6
        if depth in (0.0, 1.0):  # the very first needle, the very last one
            assert needles[0 if depth == 0 else -1][0].strip() == needle
        length_before, length = (len(NEEDLE.sub("", part)) for part in (text[: text.index(needle)], text))
        assert length_before / length == pytest.approx(depth, abs=0.03)


def test_pages_and_test_problems_share_neither_text_nor_keys(task):
    pages = [task.document(i) for i in range(300)]
    assert not any("Tale" in page or re.search(r"C\d saw", page) for page in pages)
    assert any("Story" in page for page in pages)
    trained_keys = {match[1] for page in pages for match in NEEDLE.finditer(page)}
    prompts = [task.problem("test", i).prompt for i in range(50)]
    test_keys = {match[1] for prompt in prompts for match in NEEDLE.finditer(prompt)}
    assert len(trained_keys) > 300 and len(test_keys) > 50
    assert not trained_keys & test_keys
    assert {split_of_text(f"needle {key}") for key in test_keys} == {"test"}
    assert not any("Story" in prompt for prompt in prompts)


def test_every_needle_of_a_page_is_repeated_consistently():
    task = Needle(TEXTS, shortest=100, longest=4000)
    times = []
    for index in range(100):
        page = task.document(index)
        words_of: dict[str, list[str]] = {}
        for match in NEEDLE.finditer(page):
            words_of.setdefault(match[1], []).append(match[2])
        assert 2 <= len(words_of) <= 32
        assert all(len(set(words)) == 1 and len(words) in (2, 3) for words in words_of.values())
        times += map(len, words_of.values())
        assert len(page) < 1.1 * 4000
    assert 0.4 < times.count(3) / len(times) < 0.6
    sizes = sorted(len(task.document(index)) for index in range(200))
    assert sizes[50] < 500 < 900 < sizes[150]  # log-uniform: 250, 630, 1580


def test_pages_of_one_needle():
    for index in range(30):
        needles = NEEDLE.findall(Needle(TEXTS, most=1.0, longest=2000.0).document(index))
        assert len(set(needles)) == 1 and len(needles) in (2, 3)
        assert len(NEEDLE.findall(Needle(TEXTS, most=1.0, times=6.0, longest=2000.0).document(index))) == 6


def test_a_search_for_test_problems_finds_none_on_a_page(task):
    problem = task.train_problem(3, 0, None)
    assert problem.prompt == task.document(3) and problem.prompt != task.document(3, seed=1)


@pytest.mark.parametrize(
    ("answer", "correct", "formatted", "reason"),
    [
        (" {word}. And so on", True, True, "correct"),
        ("\n{word}", True, False, "correct"),
        (" {word}s.", False, True, "wrong-value"),
        (" the {word}.", False, False, "wrong-value"),
        (" 47 {word}", False, False, "no-answer"),
        ("", False, False, "no-answer"),
    ],
)
def test_verdicts(task, answer, correct, formatted, reason):
    problem = task.problem("test", 3)
    verdict = task.verify(problem, answer.format(**problem.meta))
    assert (verdict.correct, verdict.formatted, verdict.reason) == (correct, formatted, reason)


def test_impossible_settings_are_errors():
    with pytest.raises(UserError, match="8 needles do not fit into 200"):
        Needle(TEXTS).hidden("test", 0, 200, 0.5, 8)
    with pytest.raises(UserError, match="no text for its test split"):
        Needle({"train": TEXTS["train"]}).problem("test", 0)
    with pytest.raises(UserError, match="shortest <= longest"):
        Needle(TEXTS, shortest=900.0)
    with pytest.raises(UserError, match="times 1; set at least 0, and at least 2"):
        Needle(TEXTS, times=1.0)
    with pytest.raises(UserError, match="most is 41; set it between 1 and 40"):
        Needle(TEXTS, most=41.0)
    with pytest.raises(UserError, match="did you mean 'longest'"):
        Needle(TEXTS, longets=900.0)
    with pytest.raises(UserError, match="use at most 40"):
        Needle(TEXTS).hidden("test", 0, 10**6, 0.5, 100)
