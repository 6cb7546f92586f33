"""What `bessemer why` names first on groups with a planted cause, ten seeds each."""

import random
from statistics import fmean

import pytest
from completions import completion
from rl_parts import reward as reward_of

from bessemer.addons.watch.why_reward import explain
from bessemer.addons.watch.why_text import describe, headline
from bessemer.rl.rollout import ScoredSample
from bessemer.tasks.base import Problem, Verdict
from bessemer.tasks.language import reply_consistency

CAP, PROBLEMS, SAMPLES = 400, 40, 8
TASK = reward_of("accuracy")


def groups(rng, leak=False, right=0.2, copies=0.0, waits=0.1, words=20, formed=0.9):
    """Answers to one fixed set of problems by a model with these habits."""
    draw, made = random.Random(5), []
    for number in range(PROBLEMS):
        value, hard = draw.randint(10, 99), draw.random()
        hint = f" The key is {value}." if leak and number % 2 else ""
        problem = Problem(f"p{number}", f"Compute {value - 7}+7.{hint}", "en", {})
        rows = []
        for _ in range(SAMPLES):
            copied = bool(hint) and rng.random() < copies
            correct = copied or rng.random() < right * 2 * hard
            answer = str(value if correct else value + rng.randint(1, 9))
            count = max(3, round(rng.gauss(words, words / 3)))
            output = rng.choices(["so", "then", "now", "add", "we", "see"], k=count)
            if rng.random() < waits:
                output[rng.randrange(count)] = "wait"
            formatted = rng.random() < formed
            text = (
                f"<think>{' '.join(output)}</think><answer>{answer}</answer>"
                if formatted
                else f"{' '.join(output)} {answer}"
            )
            answered = completion(range(count), text, [0.0] * count, "stop", 5)
            verdict = Verdict(correct, formatted, "correct" if correct else "wrong-value", answer)
            rows.append(ScoredSample(problem, [1], answered, verdict))
        made.append(rows)
    return made


WAIT, LENGTH = reward_of("flawed_rewards:for_wait"), reward_of("flawed_rewards:for_length")
PLANTED = {
    "a bug that pays for a word": (WAIT, {}, dict(waits=0.8), 'writes "wait"'),
    "a bug, and some learning": (
        WAIT,
        {},
        dict(waits=0.9, right=0.3),
        'writes "wait"',
    ),
    "a length bias": (LENGTH, {}, dict(words=60), "is longer, by 100 tokens"),
    "a leaked answer": (TASK, dict(leak=True), dict(copies=0.8), "answers with what stands in the question"),
    "the form": (reward_of("accuracy", "format"), {}, dict(formed=0.99), "keeps the form"),
}


def played(seed, reward, always, after):
    rng = random.Random(seed)
    habits = {"formed": 0.4} if "formed" in after else {}
    sides = [groups(rng, **always, **habits), groups(rng, **always, **after)]
    for side in sides:
        reward.score(side)
    return explain(*sides, reward)


def test_the_language_is_paid_as_the_stage_paid_it():
    reward, side = (
        reward_of("accuracy", {"name": "language", "weight": 0.5, "scope": "reply"}),
        groups(random.Random(0), formed=0.6),
    )
    reward.score(side)
    rows = [row for group in side for row in group]
    paid = 0.5 * fmean(reply_consistency(row.answer, "en") for row in rows)
    terms = explain(side, side, reward).terms
    assert 0.2 < paid < 0.4 and terms["language"] == pytest.approx((paid, paid))
    assert terms["right answers"] == pytest.approx([fmean(row.verdict.correct for row in rows)] * 2)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_cause_is_named_first(name):
    reward, always, after, cause = PLANTED[name]
    found = [played(seed, reward, always, after) for seed in range(10)]
    first = [one.causes[0].name if one.causes else "" for one in found]
    assert first.count(cause) >= 9, first
    one = found[0]
    assert sum(after - before for before, after in one.terms.values()) == pytest.approx(one.rise)
    assert one.causes[0].low < one.causes[0].part < one.causes[0].high and cause in headline(one)


def test_a_bug_is_distinguished_from_learning():
    bug = played(0, *PLANTED["a bug that pays for a word"][:3])
    assert "What pays for this is flawed_rewards:for_wait; right answers went from" in headline(bug)
    assert "right answers went" not in headline(played(0, *PLANTED["a leaked answer"][:3]))


def test_nothing_is_explained_where_nothing_rose():
    quiet = [played(seed, TASK, {}, {}) for seed in range(10)]
    assert sum("did not rise" in headline(one) for one in quiet) >= 9
    assert sum(bool(one.causes) for one in quiet) <= 1
    assert "pass@8 before" in describe("zero", quiet[0])
    fell = played(1, TASK, {}, dict(right=0.02))
    assert headline(fell) == "The reward fell."


def test_what_was_never_solved_before_is_new():
    before, after = groups(random.Random(0), right=0.0), groups(random.Random(1), right=0.0)
    for row in before[1][:2]:
        row.verdict = Verdict(True, True, "correct", "1")
    for number in (0, 1):
        for row in after[number]:
            row.verdict = Verdict(True, True, "correct", "1")
    for side in (before, after):
        TASK.score(side)
    found = explain(before, after, TASK, training=10)
    assert "30 held-out and 10 training problems x 8 answers" in describe("zero", found)
    assert (found.new, found.sharpened) == (1, 1) and found.some_before == 1 / PROBLEMS
    assert {flip.id for flip in found.flips[:2]} == {"p0", "p1"}


@pytest.mark.parametrize("risen", [1, 8])
def test_one_problem_of_eight_may_be_chance_and_equal_changes_have_an_interval(risen):
    before, after = groups(random.Random(0), right=0.0)[:8], groups(random.Random(0), right=0.0)[:8]
    for row in (row for group in after[:risen] for row in group):
        row.verdict = Verdict(True, True, "correct", "1")
    for side in (before, after):
        TASK.score(side)
    found = explain(before, after, TASK)
    assert found.rise == risen / 8 and found.low < found.rise <= found.high and (found.low > 0) == (risen == 8)
