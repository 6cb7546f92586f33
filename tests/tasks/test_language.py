"""Shares of words by language."""

import pytest

from bessemer.errors import UserError
from bessemer.tasks.language import consistency, reply_consistency, share


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("low high yes", 1.0),
        ("小大对", 0.0),
        ("low 小", 0.5),
        ("<think>3*7=21:27小\n21+6=27 yes</think><answer>27</answer>", 0.5),
        ("wait 等等 wait", 0.5),
        ("3*7=21", None),
        ("把n加1", 0.0),
        ("", None),
    ],
)
def test_share(text, english):
    assert share(text, "en") == (1.0 if english is None else english)
    assert share(text, "zh") == (1.0 if english is None else 1.0 - english)


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("`[x for x in a if x!=7]:f([7, 8])=[8]:[8]`对", 0.0),
        ("the rest, `'ab c d'.split()` yes", 1.0),
        ("`is this code`对么", 0.5),
    ],
)
def test_notation_of_code(text, english):
    assert (share(text, "en"), share(text, "zh")) == (english, 1.0 - english)


@pytest.mark.parametrize(
    "text",
    [
        "设\n\\begin{align}\nx&=1\\\\ y&=2\n\\end{align}\n所以",
        "设 2xy+3ab=7，sin A = 1/2，log 3",
        "速度是 50 km/h，面积 $16\\text{ cm}^2$。",
        "矩阵 $\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}$ 的行列式 $\\det A = ad - bc$",
        "所以\n```python\nfor i in range(3):\n    print(i)\n```\n得到",
        "过点P作PQ∥AB交AC于Q，连接BQ",
    ],
)
def test_notation_does_not_lower_chinese(text):
    assert share(text, "zh") == 1.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("对 $This is hidden English prose$", 5),
        ("对 $\\text{we first compute the sum}$", 5),
        ("对 \\[\\mathrm{hidden} = \\text{prose here}\\]", 3),
        ("对 \\this \\is \\hidden", 3),
        ("对 THIS IS HIDDEN", 3),
        ("对\n```\nwe first compute the whole sum\n```", 6),
        ("对 $\\begin{align} first we add them \\end{align}$", 4),
    ],
)
def test_notation_hides_no_prose(text, words):
    assert share(text, "zh") == 1 / (1 + words)


@pytest.mark.parametrize("text", ["Сначала сложим", "먼저 숫자를 더하고", "まずたして"])
def test_a_third_language_is_neither(text):
    assert share(text, "en") == share(text, "zh") == 0.0
    assert 0.0 < share(f"{text} first 再", "en") < 0.5
    assert share("first add αβ", "en") == 1.0, "Greek letters are mathematics"


def test_unknown_language():
    with pytest.raises(UserError):
        share("x", "fr")


@pytest.mark.parametrize(
    ("completion", "english"),
    [
        ("<think>1+2=3:9 low</think><answer>小 小 小</answer>", 1.0),
        ("<think>1+2=3:9 low\n1*2=2:9小</think><answer>3</answer>", 0.5),
        ("<think>1+2=3:9小 and the cap came", 4 / 5),
        ("<think>1+2=3</think><answer>3</answer>", 1.0),
        ("<think> </think><answer>3</answer>", 0.0),
        ("<think>\n</think>\n\nGood morning, Ann!", 1.0),
        ("<think>\n</think>\n\n早上好，Ann！", 0.25),
        ("<think>\n</think>\n\n", 0.0),
        ("<answer>3</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_consistency_reads_the_thoughts_and_of_a_greeting_the_summary(completion, english):
    assert consistency(completion, "en") == english


@pytest.mark.parametrize(
    ("completion", "english"),
    [
        ("<think>1+2=3</think>\n\nThe answer is <answer>3</answer>.", 1.0),
        ("<think>1+2=3</think>\n\n所以答案是<answer>3</answer>。", 0.0),
        ("<think>1+2=3 low</think>\n\n\\boxed{小} low 小", 0.5),
        ("<think>low 小</think>\n\nThe answer is <answer>3</answer>.", 0.5),
        ("<think>low</think><answer>小 小</answer>", 1.0),
        ("<think>low 小 and the cap came", 5 / 6),
        ("<answer>3</answer>", 0.0),
    ],
)
def test_of_a_reply_the_less_consistent_part_counts(completion, english):
    assert reply_consistency(completion, "en") == english
