"""The curves of a rollout: means over all samples."""

from types import SimpleNamespace

import pytest
from completions import completion

from bessemer.rl.monitor import rollout_metrics
from bessemer.rl.rollout import Rollout, ScoredSample
from bessemer.tasks.base import Problem, Verdict


def sampled(
    text, *, reward=0.0, correct=False, formatted=False, tokens=4, end="stop", language=0.5, preference=None, meta=None
):
    made = completion([5] * tokens, text, None, end, 3)
    return ScoredSample(
        Problem("p", "", "en", meta or {}), [1, 2, 3], made, Verdict(correct, formatted, "", None), reward,
        language=language, preference=preference,
    )  # fmt: skip


def metrics(groups, max_resamples=1, has_contrast=False):
    settings = SimpleNamespace(max_resamples=max_resamples)
    return rollout_metrics(Rollout(groups, n_problems=7, cap=64, step=0), settings, has_contrast)


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
    found = metrics(groups)
    assert found == pytest.approx({
        "rl/reward": 2.2 / 4,
        "rl/accuracy": 0.5,
        "rl/format": 0.5,
        "rl/length": 24.0,
        "rl/language": 0.5,
        "rl/truncated": 0.25,
        "rl/cap": 64,
    })  # fmt: skip


def test_credit_has_a_curve_of_its_own():
    right, near = sampled("a", correct=True), sampled("b")
    assert "rl/score" not in metrics([[right, near]])
    near.verdict = Verdict(False, True, "wrong-value", "b", partial=0.9)
    found = metrics([[right, near]])
    assert (found["rl/accuracy"], found["rl/score"]) == (0.5, 0.95)


def test_samples_of_a_reward_model_do_not_count_as_wrong():
    rows = [sampled("", correct=True), sampled(""), sampled("", preference=0.25), sampled("", preference=0.75)]
    found = metrics([rows])
    assert found["rl/accuracy"] == 0.5 and found["rl/preference"] == 0.5
    assert "rl/preference" not in metrics([rows[:2]])
    assert metrics([rows[2:]])["rl/accuracy"] == 0.0  # nothing was verified


def test_groups_without_contrast_and_problems_asked_are_counted_where_they_can_differ():
    groups = [[sampled("", reward=1.0), sampled("", reward=0.0)], [sampled("", reward=1.0), sampled("", reward=1.0)]]
    assert not {"rl/dead_groups", "rl/problems_asked"} & metrics(groups).keys()
    counted = metrics(groups, max_resamples=2, has_contrast=True)
    assert (counted["rl/dead_groups"], counted["rl/problems_asked"]) == (0.5, 7)
