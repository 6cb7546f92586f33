"""What the curves of a rollout count in its texts: tries, words of reflection, countdown traces."""

import pytest
from completions import completion

from bessemer.addons.watch.text_metrics import counts_of, text_metrics
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict


def sampled(text, meta=None):
    return ScoredSample(Problem("p", "", "en", meta or {}), [1], completion([5], text), Verdict(False, True, "", None))


def measured(*rows):
    return text_metrics(map(counts_of, rows))


def test_means_over_all_samples():
    found = measured(
        sampled("<think>(1+2)+3=3+3=6:9 low wait\n(1*2)+3=2+3=5:9 low</think><answer>1+2+3</answer>"),
        sampled("<think>a\nb\nc</think><answer>9</answer>"),
        sampled("<think></think><answer>9</answer>"),
        sampled("<think>no end, wait"),
    )
    words = {name: found.pop(name) for name in list(found) if name.startswith("rl/words/")}
    assert len(words) == 11 and words.pop("rl/words/wait") == 0.5 and set(words.values()) == {0.0}
    assert found == {"rl/think_share": 0.75, "rl/tries": 6 / 4, "rl/reflective_words": 0.5}


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
    assert measured(sampled(text))["rl/reflective_words"] == count


def test_words_are_counted_inside_a_countdown_trace():
    meta = {"numbers": [3, 7, 6], "target": 27}
    right = "<think>(3*7)+6=21+6=27:27 yes</think><answer>(3*7)+6</answer>"
    wrong = "<think>(3*7)-6=21-6=15:27 low\n(3*6)+7=18+7=26:27 low</think><answer>(3*6)+7</answer>"
    found = measured(sampled(right, meta), sampled(wrong, meta), sampled("no trace"))
    traces = {name.removeprefix("rl/trace/"): value for name, value in found.items() if "/trace/" in name}
    assert traces == pytest.approx({
        "step_right": 5 / 6, "right_numbers": 1.0, "yes_given_hit": 1.0, "yes_given_miss": 0.0, "repeated": 0.0,
        "returned": 0.0, "gave_up": 1 / 2,
    })  # fmt: skip
    assert not any("/trace/" in name for name in measured(sampled("no trace")))
