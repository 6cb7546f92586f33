"""Last digits of sums: thoughts go step by step, guesses are right by chance, words are in the requested language."""

import re

import pytest

from bessemer.addons.tasks.sums import WORDS
from bessemer.tasks import get
from bessemer.tasks.language import consistency


def digits_in(text, language):
    names = WORDS[language]
    return [names.index(word) for word in re.findall("|".join(names), text)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages(language):
    task = get("sums", languages=[language], slip=0.2)
    pages = [task.written(i) for i in range(3000)]
    guesses = [page for page in pages if page.author == "direct"]
    assert 0.36 < len(guesses) / 3000 < 0.44
    assert 0.07 < sum(task.verify(page.problem, page.response).correct for page in guesses) / len(guesses) < 0.13
    slips = 0
    for page in (page for page in pages if page.author == "thinking"):
        digits_asked, digits_written = (digits_in(text, language) for text in (page.problem.prompt, page.response))
        assert digits_asked == page.problem.meta["digits"] and len(digits_asked) == 4 and len(digits_written) == 9
        before, added, after = digits_written[::3], digits_written[1::3], digits_written[2::3]
        assert before == [digits_asked[0], *after[:-1]] and added == digits_asked[1:]
        slips += sum((a + b - c) % 10 != 0 for a, b, c in zip(before, added, after, strict=True))
        assert page.response.endswith(f"<answer>{after[-1]}</answer>") and consistency(page.response, language) == 1
    assert 0.15 < slips / (3 * (3000 - len(guesses))) < 0.25


def test_values_splits_and_languages_that_mix():
    task = get("sums", other_language=1.0, direct=0.0, slip=0.0)
    sets = {split: set() for split in ("train", "test")}
    for split, values in sets.items():
        for i in range(2000):
            problem = task.problem(split, i)
            values.add(tuple(sorted(problem.meta["digits"])))
            assert problem.meta["value"] == sum(problem.meta["digits"]) % 10
    assert not sets["train"] & sets["test"]
    shares = [consistency(page.response, page.problem.language) for page in map(task.written, range(300))]
    assert 0.4 < sum(shares) / 300 < 0.6
    assert all(task.verify(page.problem, page.response).sound for page in map(task.written, range(50)))
