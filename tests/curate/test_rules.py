"""Quality rules: every one can fail, and good texts in both languages break none."""

import random

import pytest
from made_texts import prose

from bessemer.addons.curate import filters

GOOD = prose(1)
CHINESE = (
    "从前有一只狮子住在山里，他每天早上都要到河边去喝水。有一天，他在河边看见一只老鼠正在搬运粮食，就问他为什么这样辛苦。"
    "老鼠回答说，冬天快要来了，如果现在不准备，到时候全家人就会挨饿。狮子听了觉得很有道理，于是决定帮助老鼠一起搬。"
    "他们一直干到太阳下山，终于把所有的粮食都放进了洞里。后来下起大雪，狮子找不到食物，老鼠便把自己的那一份分给了他。"
)
DRAW = random.Random(0)


def _words(n: int, length: int) -> str:
    return " ".join("".join(DRAW.choices("abcdefghijklmnop", k=length)) for _ in range(n))


LINES = GOOD.replace(". ", ".\n")
BREAKS = {
    "min_words": "The lion and the fox.",
    "max_words": _words(100_001, 1),
    "min_mean_word": _words(300, 2),
    "max_mean_word": _words(300, 12),
    "max_symbols": GOOD + " #" * 60,
    "max_bullets": "\n".join(f"- {line}" for line in LINES.split("\n")),
    "max_ellipses": LINES.replace(".\n", "...\n"),
    "min_alphabetic": GOOD + " 12" * 200,
    "min_stop_words": _words(200, 5),
    "max_repeated_lines": LINES + "\n" + "\n".join(["short"] * 9),
    "max_repeated_line_characters": LINES + "\n" + LINES,
    "max_repeated_paragraphs": "\n\n".join([GOOD, prose(2), GOOD, GOOD]),
    "max_top_2_words": GOOD + " very well" * 60,
    "max_top_3_words": GOOD + " very very well" * 60,
    "max_top_4_words": GOOD + " very well and good" * 40,
    "max_repeated_5_words": GOOD + " " + prose(3) + " " + GOOD,
    "max_repeated_10_words": GOOD + " " + GOOD,
    "min_ended_lines": LINES.replace(".\n", "\n").rstrip("."),
    "max_short_lines": GOOD + "\n" + "\n".join(f"item {i}." for i in range(30)),
    "min_sentences": " ".join(GOOD.replace(".", ",").split()),
    "max_lorem_ipsum": GOOD + " Lorem ipsum dolor.",
    "max_curly_brackets": GOOD + " {",
    "max_line": "x = 1\n" * 50 + "y" * 1001,
    "max_mean_line": GOOD,
    "min_alphanumeric": "!!!!" + "?" * 40 + "a",
}


def test_every_rule_is_tested():
    assert set(BREAKS) == set(filters.RULES)


@pytest.mark.parametrize("rule", filters.RULES)
def test_a_rule_fails_on_what_it_is_for(rule):
    assert filters.broken(BREAKS[rule], {rule: filters.RULES[rule].number}) == rule


def test_good_texts_break_no_rule():
    assert filters.broken(GOOD, filters.preset("web")) is None
    assert filters.broken(CHINESE, filters.preset("web")) is None
    assert filters.broken("def f(x):\n    return x + 1\n", filters.preset("code")) is None


def test_the_first_rule_in_order_is_named_and_numbers_can_be_set():
    assert filters.broken("", filters.preset("web")) == "min_words"
    assert filters.broken(GOOD, {"min_words": 10_000}) == "min_words"
    assert filters.broken("The fox.", {"min_words": 2}) is None
