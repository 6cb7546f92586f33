"""Readability: each fault by name, the tasks' own pages pass, hostile text is fast, repetition against a count."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer import tasks
from bessemer.addons.tasks.ngrams import run_hashes
from bessemer.addons.tasks.readable import (
    READABLE,
    REASONS,
    ReadabilityLimits,
    has_code,
    longest_paragraph,
    readable,
    repeated,
    repeated_lines,
    words,
)
from bessemer.tasks.language import consistency

FINE = "<think>I add 2 and 3.\nThat is 5, and 5 is wanted.</think>\nThe answer is <answer>2+3</answer>."
SENTENCE = "we take the next pair of numbers and see what comes of it now, "


def thinks(thoughts, answer="<answer>5</answer>"):
    return f"<think>{thoughts}</think>{answer}"


@pytest.mark.parametrize(
    ("answer", "language", "reason"),
    [
        (FINE, "en", READABLE),
        (FINE, "zh", "mixed-language"),
        (thinks("先加二和三。\n得五。"), "zh", READABLE),
        (thinks("先加 two and three 得五"), "zh", "mixed-language"),
        (thinks("1+2=3\n3*4=12"), "zh", READABLE),
        ("Paris is the capital.", "en", READABLE),
        ("巴黎是首都。", "en", "mixed-language"),
        ("", "en", "blank"),
        (" \n\t", "en", "blank"),
        ("<think> </think><answer></answer>", "en", "blank"),
        ("...!?", "en", "blank"),
        (thinks("add <｜User｜> now"), "en", "control-text"),
        (thinks("add <|im_end|> now"), "en", "control-text"),
        (thinks("add \ufffd now"), "en", "control-text"),
        (thinks("add \x1b[31m now"), "en", "control-text"),
        (thinks("add \u202e now"), "en", "control-text"),
        ("<think>one<think>two</think><answer>5</answer>", "en", "control-text"),
        ("<answer>5</answer><think>late</think>", "en", "control-text"),
        ("<think>one more step and the cap came", "en", READABLE),
        ("step</think><answer>5</answer>", "en", READABLE),
        (thinks("I write:\n```python\nprint(1)\n```"), "en", "code"),
        (thinks("I write:\n~~~\nprint(1)\n~~~"), "en", "code"),
        (thinks("def add(a, b):\n    return a + b"), "en", "code"),
        (thinks("1+2=3", "\n\nSo the answer is <answer>3</answer>."), "zh", "mixed-language"),
        (thinks("1+2=3", "\n\n所以答案是<answer>3</answer>。"), "en", "mixed-language"),
        (thinks("1+2=3", "\n\n所以答案是<answer>3</answer>。"), "zh", READABLE),
        (thinks("真且假=假", "\n\n所以答案是<answer>false</answer>。"), "zh", READABLE),
        (thinks("1+2=3", "\n\n所以答案是 \\boxed{3\\text{ cm}}。"), "zh", READABLE),
        (thinks("1+2=3", "\n\n程序：\n```python\nprint(three)\n```"), "zh", READABLE),
        (thinks("if it is low:\nI try the next."), "en", READABLE),
        (thinks("I think.", "```python\nprint(1)\n```"), "en", READABLE),
        ("```python\nprint(1)\n```", "en", READABLE),
        (thinks("1+2=3 low\n1+2=3 low\n1*2=2 low"), "en", "repetitive"),
        (thinks("wait " * 30), "en", "repetitive"),
        (thinks("and so on and so on, " * 8), "en", "repetitive"),
        (thinks("wait wait wait, that is 5"), "en", READABLE),
        (thinks("我想想，" * 20), "zh", "repetitive"),
        (thinks(" ".join(f"{n} is odd," for n in range(1, 200, 2))), "en", "long-paragraph"),
        (thinks("\n".join(f"{n} is odd," for n in range(1, 200, 2))), "en", READABLE),
    ],
)
def test_each_fault_has_its_name(answer, language, reason):
    assert readable(answer, language) == (reason == READABLE, reason)
    assert reason in (READABLE, *REASONS)


def test_limits_are_adjustable():
    mixed = thinks("one two three four five six seven eight nine 十")
    assert not readable(mixed, "en").readable and readable(mixed, "en", ReadabilityLimits(consistency=0.9)).readable
    twice = thinks("a step\nb step\na step")
    assert not readable(twice, "en").readable and readable(twice, "en", ReadabilityLimits(repeated=0.34)).readable
    long = thinks(" ".join(f"number{n}" for n in "abcdefghijkl"))
    assert readable(long, "en").readable and not readable(long, "en", ReadabilityLimits(paragraph=10)).readable


@pytest.mark.parametrize("name", ["countdown", "arithmetic", "logic", "words", "code"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_pages_people_would_learn_from_are_readable(name, language):
    task = tasks.get(name, languages=[language])
    pages = [task.written(i, 3).response for i in range(300)]
    reasons = Counter(readable(page, language).reason for page in pages)
    assert reasons[READABLE] >= 0.98 * 300, reasons


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_repetition_is_counted(letters, n):
    runs = [tuple(letters[i : i + n]) for i in range(len(letters) - n + 1)]
    expected = sum(run in runs[:i] for i, run in enumerate(runs)) / len(runs) if runs else 0.0
    assert repeated(" ".join(letters), n) == pytest.approx(expected)
    lines = "\n".join(letters)
    expected_lines = sum(letter in letters[:i] for i, letter in enumerate(letters)) / len(letters) if letters else 0.0
    assert repeated_lines(lines) == pytest.approx(expected_lines)


def test_words_and_their_runs():
    assert words("Use 12, 3 to make: 15=12+3。用Ab十二") == [
        "use", "12", "3", "to", "make", "15", "=", "12", "+", "3", "用", "ab", "十", "二"
    ]  # fmt: skip
    numbers = {word: i for i, word in enumerate("abcd")}
    import numpy as np

    ids = np.array([numbers[c] for c in "abcabcd"], np.uint64)
    hashes = run_hashes(ids, 3).tolist()
    assert len(hashes) == 5 and hashes[0] == hashes[3] and len(set(hashes)) == 4
    assert len(run_hashes(ids, 8)) == 0 and len(run_hashes(ids[:0], 3)) == 0
    assert set(run_hashes(ids[::-1].copy(), 3).tolist()).isdisjoint(hashes[:3]), "order counts"


def test_paragraphs_and_code():
    assert [longest_paragraph(text) for text in ("a b c\n\nd e", "", "一二三四\n五")] == [3, 0, 4]
    assert not has_code("while we are here:\n\nlook") and has_code("for x in y:\n  if x > 2:")


@pytest.mark.parametrize(
    "text",
    ["wait " * 60_000, "<think>" * 40_000, "a\n" * 100_000, "`" * 300_000, "for " * 70_000, "def f(" * 50_000,
     "`" + "a b '" * 60_000 + "`", "return .a" * 40_000,
     "<｜" * 100_000, " " * 300_000 + "```", "\n \t" * 100_000, "if x" + " " * 300_000 + ":",
     "$" * 300_000, "\\[" * 150_000, "\\begin{a}" * 30_000, "$a" * 150_000, "\\text{" * 50_000, "\\a" * 150_000,
     "AB " * 100_000, "5cm" * 100_000, "```\n" * 75_000,
     "```\n" + "a" * 300_000 + "\n```", "```\n" + "one two " * 40_000 + "\n```"],
)  # fmt: skip
def test_hostile_text_is_judged_in_linear_time(text):
    began = time.process_time()
    readable("<think>" + text, "en")
    consistency("<think>" + text, "en")
    assert time.process_time() - began < 3
