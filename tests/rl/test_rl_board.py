"""The curves of a rollout: means over all samples, and the words that count as reflection."""

import pytest

from bessemer.infer.engine import Completion
from bessemer.rl import board
from bessemer.rl.rollout import Sampled
from bessemer.tasks.base import Problem, Verdict


def sampled(text, *, reward=0.0, correct=False, formatted=False, tokens=4, end="stop", language=0.5):
    completion = Completion([5] * tokens, text, [-1.0] * tokens, [-1.0] * tokens, end, 3)
    return Sampled(
        Problem("p", "", "en"), [1, 2, 3], completion, Verdict(correct, formatted, "", None), reward, language=language
    )


def test_means_over_all_samples_of_all_groups():
    groups = [
        [
            sampled("<think>(1+2)+3=3+3=6:9 low wait\n(1*2)+3=2+3=5:9 low</think><answer>1+2+3</answer>",
                    reward=0.1, formatted=True, tokens=30),
            sampled("<think>a\nb\nc</think><answer>9</answer>", reward=1.1, correct=True, formatted=True, tokens=10),
        ],
        [
            sampled("<think></think><answer>9</answer>", reward=1.0, correct=True, tokens=6),
            sampled("<think>no end, wait", tokens=50, end="length"),
        ],
    ]  # fmt: skip
    assert board.of_rollout(groups) == pytest.approx({
        "rl/reward": 2.2 / 4,
        "rl/accuracy": 0.5,
        "rl/format": 0.5,
        "rl/length": 24.0,
        "rl/think_share": 0.75,
        "rl/language": 0.5,
        "rl/truncated": 0.25,
        "rl/tries": 6 / 4,
        "rl/reflective_words": 0.5,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("wait mistake however but retry error verify wrong evaluate check", 10),
        ("Wait, but WAIT", 3),
        ("waiter, butter, checks, rewrongly", 0),
        ("27 low wait\n28 high", 1),
        ("小,等等\n大,等等", 2),
        ("大wait小", 1),
    ],
)
def test_the_paper_s_ten_words_and_the_chinese_one(text, count):
    assert board.of_rollout([[sampled(text)]])["rl/reflective_words"] == count
