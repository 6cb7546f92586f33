"""Each part of a claim is judged by rules fixed in advance."""

import pytest

from bessemer_claims.registry import ClaimEntry, ClaimRule, Part, PublishedScore, rules
from bessemer_claims.verdict import (
    Doubt,
    Evidence,
    Measured,
    Outcome,
    as_printed,
    computed,
    corrected,
    documented,
    judge,
    run,
    score,
    seen,
)

HOLDS, WEAK, UNCLEAR, FAILS, OPEN = Outcome.HOLDS, Outcome.WEAK, Outcome.UNCLEAR, Outcome.FAILS, Outcome.OPEN
GAIN = Part(kind="R", side="above", metric="gain", threshold=0.0, margin=0.1)
FALL = Part(kind="R", side="below", metric="loss", threshold=0.0, margin=0.1)
BOUND = Part(kind="R", side="below", metric="harm", threshold=0.25, margin=0.0, harm=True)
EQUAL = Part(kind="R", side="equal", metric="gap", threshold=0.0, margin=0.1)
CONTROLLED = GAIN.model_copy(update={"negative": "nothing"})
CLEAR = (1.0, 1.1, 0.9)


@pytest.mark.parametrize(
    ("part", "measured", "outcome"),
    [
        (GAIN, Measured(CLEAR), HOLDS),
        (GAIN, Measured([-1.0, -1.1, -0.9]), FAILS),
        (GAIN, Measured([0.05, 0.06, 0.04]), FAILS),  # there is an effect, but smaller than matters
        (GAIN, Measured([0.12, 0.13, 0.09]), UNCLEAR),  # beyond 0, but perhaps smaller than matters
        (FALL, Measured([-1.0, -1.1, -0.9]), HOLDS),
        (FALL, Measured([-0.12, -0.13, -0.09]), UNCLEAR),
        (GAIN, Measured([1.0, -1.1, 0.4]), UNCLEAR),
        (GAIN, Measured([1.0, 1.1]), WEAK),  # only two seeds
        (GAIN, Measured([1.0]), WEAK),
        (GAIN, Measured(CLEAR, positive=[1.0, -1.0, 0.0]), UNCLEAR),  # the positive control shows no effect
        (GAIN, Measured(CLEAR, positive=[0.05, 0.06, 0.04]), UNCLEAR),  # or one that is smaller than matters
        (GAIN, Measured(CLEAR, negative=CLEAR), UNCLEAR),  # the negative control shows an effect
        (GAIN, Measured(CLEAR, negative=[0.05, 0.06, 0.04]), UNCLEAR),  # even a small one
        (GAIN, Measured(CLEAR, positive=CLEAR, negative=[0.1, -0.1, 0.05]), HOLDS),
        (CONTROLLED, Measured(CLEAR, negative=[0.1, -0.1, 0.05]), HOLDS),
        (CONTROLLED, Measured(CLEAR), WEAK),  # its control has not been run
        (CONTROLLED, Measured(CLEAR, negative=[1.0]), WEAK),  # one seed of it can never show an effect
        (GAIN, None, OPEN),
        (CONTROLLED, Measured([-1.0, -1.1, -0.9]), UNCLEAR),  # what lacks its control contradicts nothing either
        (GAIN, Measured([2.0, 2.0, 2.0]), HOLDS),  # the same in every run
        (GAIN, Measured([0.0, 0.0, 0.0]), FAILS),
        (GAIN, Measured([0.0, 0.0, 0.0], positive=[0.0, 0.0, 0.0]), UNCLEAR),  # no run could have shown it
        (BOUND, Measured([0.05, 0.06, 0.04], positive=[0.9, 1.0, 1.1]), HOLDS),
        (BOUND, Measured([0.05, 0.06, 0.04], positive=[0.9, -1.0, 0.1]), UNCLEAR),  # blind: harm would go unnoticed
        (BOUND, Measured([0.9, 1.0, 1.1]), FAILS),
        (EQUAL, Measured([0.01, -0.01, 0.0]), HOLDS),
        (BOUND, Measured([0.05, 0.06, 0.04], negative=[0.01, -0.01, 0.0]), HOLDS),
        (BOUND, Measured([0.05, 0.06, 0.04], negative=[0.2, 0.21, 0.19]), UNCLEAR),  # harm where none is possible
        (EQUAL, Measured([0.01, -0.5, 0.3]), UNCLEAR),
        (EQUAL, Measured([0.045, -0.045, 0.0]), HOLDS),  # by two one-sided tests, not by the 95 % interval
        (EQUAL, Measured([0.5, 0.52, 0.51]), FAILS),
    ],
)
def test_a_run_against_its_rule(part, measured, outcome):
    assert run(part, measured, rules()).outcome is outcome


def test_what_is_the_same_in_every_run_has_no_interval():
    finding = run(GAIN, Measured([2.0, 2.0, 2.0]), rules())
    assert finding.interval is finding.p is finding.visible is None and Doubt.ALIKE in finding.doubts
    assert finding.value == 2.0 and finding.seeds == 3


def test_a_part_that_holds_alone_may_not_survive_the_correction():
    for values, outcome in ((CLEAR, HOLDS), ([-1.0, -1.1, -0.9], FAILS)):
        alone = run(GAIN, Measured(values), rules())
        assert alone.outcome is outcome and 0 < alone.p < 0.05
        assert corrected(alone, 0.05, rules()).outcome is outcome
        chance = corrected(alone, 0.06, rules())
        assert chance.outcome is UNCLEAR and Doubt.CHANCE in chance.doubts and (chance.p, chance.q) == (alone.p, 0.06)
    assert corrected(alone, None, rules()) == alone


@pytest.mark.parametrize(
    ("part", "values"),
    [(GAIN, CLEAR), (GAIN, [0.2, 0.1, 0.3]), (FALL, [-0.3, -0.2, -0.4]), (EQUAL, [0.01, -0.03, 0.02]),
     (EQUAL, [0.3, 0.5, 0.2]), (BOUND, [0.1, 0.05, 0.2])],
)  # fmt: skip
def test_the_p_value_is_of_the_question_that_the_interval_answers(part, values):
    """It is below 0.05 exactly when the part holds or fails alone."""
    for wider in (0.3, 1.0, 3.0, 10.0):
        middle = sum(values) / len(values)
        finding = run(part, Measured([middle + wider * (value - middle) for value in values]), rules())
        assert (finding.p < 0.05) == (finding.outcome in (HOLDS, FAILS)), wider


def test_printed_figures_are_compared_to_their_last_digit():
    exact = Part(kind="X", metric="kv", side="equal", printed="70.272")
    assert as_printed(70.2719999, "70.272") == "70.272" and as_printed(671.026, "671") == "671"
    assert computed(exact, {"kv": 70.272}).outcome is HOLDS
    wrong = computed(exact, {"kv": 70.2731})
    assert wrong.outcome is FAILS and wrong.exact
    assert computed(exact, {}).outcome is OPEN


def test_the_planner_has_no_interval():
    part = Part(kind="S", metric="factor", side="above", threshold=1)
    assert computed(part, {"factor": 9.0}).outcome is WEAK and computed(part, {"factor": 0.5}).outcome is UNCLEAR
    view = Part(kind="S", metric="x", side="between", low="low", high="high")
    assert computed(view, {"x": 2.0, "low": 1.0, "high": 3.0}).outcome is WEAK
    assert computed(view, {"x": 4.0, "low": 1.0, "high": 3.0}).outcome is FAILS


@pytest.mark.parametrize(
    ("side", "margin", "first", "second", "problems", "outcome"),
    [
        ("above", 5, 71.0, 15.6, 30, HOLDS),
        ("above", 5, 26.8, 20.7, 164, UNCLEAR),
        ("above", 5, 53.3, 50.0, 14042, FAILS),  # a gain that is smaller than matters
        ("below", 5, 46.6, 86.1, 541, HOLDS),
        ("equal", 5, 79.8, 79.2, 30, UNCLEAR),
        ("equal", 5, 90.8, 91.8, 14042, HOLDS),
        ("equal", 5, 46.6, 86.1, 541, FAILS),
    ],
)
def test_published_scores_by_their_number_of_problems(side, margin, first, second, problems, outcome):
    part = Part(kind="B", side=side, threshold=0.0, margin=margin)
    assert score(part, PublishedScore(on="x", problems=problems, one=first, other=second)).outcome is outcome


def test_an_audit_and_a_run_answer_different_questions():
    claim = ClaimEntry(
        kinds="AR", experiment="E1", text=["a", "b"], paper="", source=["v3: Table 1"], audit="holds", found=["a", "b"]
    )
    table = rules().model_copy(update={"claim": {"Q1": ClaimRule(parts=[GAIN])}})
    for values, answer in ((None, "not-asked"), (CLEAR, "yes"), ([-1.0, -1.1, -0.9], "no")):
        measured = {} if values is None else {"gain": Measured(values)}
        findings = judge("Q1", claim, Evidence(measured=measured), table)
        assert documented(findings) == "yes" and seen(findings) == answer
