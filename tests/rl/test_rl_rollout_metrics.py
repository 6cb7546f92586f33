"""The curves of a rollout: means over all samples, and the words that count as reflection."""

import pytest
from completions import completion

from bessemer.rl.monitor import rollout_metrics
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict


def sampled(
    text, *, reward=0.0, correct=False, formatted=False, tokens=4, end="stop", language=0.5, preference=None, meta=None
):
    made = completion([5] * tokens, text, None, end, 3)
    return ScoredSample(
        Problem("p", "", "en", meta or {}), [1, 2, 3], made, Verdict(correct, formatted, "", None), reward,
        language=language, preference=preference,
    )  # fmt: skip


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
    found = rollout_metrics(groups)
    words = {name: found.pop(name) for name in list(found) if name.startswith("rl/words/")}
    assert len(words) == 11 and words.pop("rl/words/wait") == 0.5 and set(words.values()) == {0.0}
    assert found == pytest.approx({
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


def test_credit_has_a_curve_of_its_own():
    right, near = sampled("a", correct=True), sampled("b")
    assert "rl/score" not in rollout_metrics([[right, near]])
    near.verdict = Verdict(False, True, "wrong-value", "b", partial=0.9)
    found = rollout_metrics([[right, near]])
    assert (found["rl/accuracy"], found["rl/score"]) == (0.5, 0.95)


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
    assert rollout_metrics([[sampled(text)]])["rl/reflective_words"] == count


def test_what_a_reward_model_judged_is_not_counted_as_wrong():
    rows = [sampled("", correct=True), sampled(""), sampled("", preference=0.25), sampled("", preference=0.75)]
    found = rollout_metrics([rows])
    assert found["rl/accuracy"] == 0.5 and found["rl/preference"] == 0.5
    assert "rl/preference" not in rollout_metrics([rows[:2]])
    assert rollout_metrics([rows[2:]])["rl/accuracy"] == 0.0  # nothing was verified


def test_inside_a_countdown_trace():
    meta = {"numbers": [3, 7, 6], "target": 27}
    right = "<think>(3*7)+6=21+6=27:27 yes</think><answer>(3*7)+6</answer>"
    wrong = "<think>(3*7)-6=21-6=15:27 low\n(3*6)+7=18+7=26:27 low</think><answer>(3*6)+7</answer>"
    found = rollout_metrics([[sampled(right, meta=meta), sampled(wrong, meta=meta), sampled("no trace")]])
    traces = {name.removeprefix("rl/trace/"): value for name, value in found.items() if "/trace/" in name}
    assert traces == pytest.approx({
        "step_right": 5 / 6, "right_numbers": 1.0, "yes_given_hit": 1.0, "yes_given_miss": 0.0, "repeated": 0.0,
        "gave_up": 1 / 2,
    })  # fmt: skip
    assert not any("/trace/" in name for name in rollout_metrics([[sampled("no trace")]]))
