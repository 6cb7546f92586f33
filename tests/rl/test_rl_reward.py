"""A sample's reward: the paper's sum, a reward model's share, the control arms."""

import math
from pathlib import Path

import pytest
from completions import completion
from rl_parts import reward, rewarded

from bessemer.errors import UserError
from bessemer.rl.reward import Reward
from bessemer.rl.rollout import ScoredSample, in_form
from bessemer.tasks.base import Problem, Verdict


def sampled(correct=False, formatted=False, language=0.5, tokens=(5, 6), partial=None, **meta):
    made, verdict = completion(tokens, "text", prompt_tokens=3), Verdict(correct, formatted, "", None, partial=partial)
    return ScoredSample(Problem("p/0", "ask", "en", meta), [0], made, verdict, language=language)


COIN = f"{Path(__file__).parents[2] / 'recipes' / 'coin.py'}:coin"
FOUR = [(True, True), (True, False), (False, True), (False, False)]


def test_accuracy_format_and_language_are_added():
    rows = [sampled(c, f) for c, f in FOUR]
    assert rewarded(rows, "accuracy", "format") == [2.0, 1.0, 1.0, 0.0]  # the paper: equal weights
    assert rewarded(rows, "accuracy", ("format", 0.1)) == [1.1, 1.0, 0.1, 0.0]
    assert rewarded(rows, "accuracy", ("format", 0.1), "language") == [1.6, 1.5, 0.6, 0.5]


@pytest.mark.parametrize(
    ("verdict", "begun", "expected"),
    [
        (Verdict(False, True, "wrong-value", "x", False, 0.9), "", (False, 0.9, "wrong-value")),
        (Verdict(False, False, "text-before", "x", False, 0.9), "", (False, 0.0, "text-before")),
        (Verdict(False, True, "wrong-value", "x", True, 0.9), "", (False, 0.0, "text-around")),
        (Verdict(False, True, "wrong-value", "x", True, 0.9), "<think>", (False, 0.9, "wrong-value")),
        (Verdict(True, True, "correct", "x", True, 1.0), "", (False, 0.0, "text-around")),
        (Verdict(True, True, "correct", "x", False, 1.0), "", (True, 1.0, "correct")),
        (Verdict(True, False, "no-think", "x"), "", (False, 0.0, "no-think")),
        (Verdict(True, True, "correct", "x", True), "<think>", (True, 1.0, "correct")),
        (Verdict(False, True, "wrong-value", "x", True), "", (False, 0.0, "wrong-value")),
    ],
)
def test_credit_needs_the_form_where_accuracy_does(verdict, begun, expected):
    actual = in_form(verdict, begun)
    assert (actual.correct, actual.score, actual.reason) == expected


class Judge:
    def __init__(self, value):
        self.value, self.heard = value, []

    def score(self, items):
        self.heard.append(items)
        return [self.value(answer) for _, answer in items]


def test_a_judge_pays_the_prompts_of_its_aim_and_the_verifier_the_others():
    helpful, harmless = Judge(lambda answer: 0.75), Judge(lambda answer: 0.25)
    groups = [[sampled(True, True, aim="helpful"), sampled(True, True, aim="helpful")],
              [sampled(False, True, aim="harmless")], [sampled(True, False)]]  # fmt: skip
    paid = reward("accuracy", ("format", 0.5))
    paid.set_preferences(groups, {"helpful": helpful, "harmless": harmless})
    paid.score(groups)
    assert [[row.reward for row in group] for group in groups] == [[1.25, 1.25], [0.75], [1.0]]
    assert [[row.preference for row in group] for group in groups] == [[0.75, 0.75], [0.25], [None]]
    assert helpful.heard == [[("ask", "text")] * 2] and harmless.heard == [[("ask", "text")]]
    assert rewarded([sampled(True, True, aim="helpful")], "accuracy", ("format", 0.5)) == [1.5], "without a judge"


def test_a_reward_that_is_no_number_names_its_source():
    groups = [[sampled(aim="helpful")]]
    Reward.set_preferences(groups, {"helpful": Judge(lambda answer: math.nan)})
    with pytest.raises(UserError, match=r"p/0 is nan; .*finite"):
        reward("accuracy").score(groups)


def test_the_control_arms_do_not_look_at_the_verdict():
    rows = [sampled(c, f) for c, f in FOUR]
    assert rewarded(rows, "format") == [1.0, 0.0, 1.0, 0.0]
    many = [[sampled(c, f, tokens=(n,)) for c, f in FOUR for n in range(200)]]
    reward(COIN).score(many)
    right = [row.reward for row in many[0] if row.verdict.correct]
    wrong = [row.reward for row in many[0] if not row.verdict.correct]
    assert set(right) == {0.0, 1.0}
    assert abs(sum(right) / 400 - 0.5) < 0.1 and abs(sum(wrong) / 400 - 0.5) < 0.1
    repeated = [row.reward for row in many[0]]
    reward(COIN).score(many)
    assert repeated == [row.reward for row in many[0]], "a coin that falls the same in a resumed run"
