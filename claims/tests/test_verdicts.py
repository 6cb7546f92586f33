"""Verdicts follow from the evidence by rules fixed in advance."""

import pytest

from bessemer_claims.registry import ClaimEntry, ClaimRule, Part, PublishedScore, Rules, rules
from bessemer_claims.verdict import (
    ClaimVerdict,
    Evidence,
    Measured,
    Outcome,
    as_printed,
    combine,
    computed,
    judge,
    run,
    score,
)

HOLDS, WEAK, UNCLEAR, FAILS, OPEN = Outcome.HOLDS, Outcome.WEAK, Outcome.UNCLEAR, Outcome.FAILS, Outcome.OPEN
GAIN = Part(kind="R", side="above", metric="gain", threshold=0.0, margin=0.1)
BOUND = Part(kind="R", side="below", metric="harm", threshold=0.25, margin=0.25)
EQUAL = Part(kind="R", side="equal", metric="gap", threshold=0.0, margin=0.1)
CONTROLLED = GAIN.model_copy(update={"negative": "nothing"})
CLEAR = (1.0, 1.1, 0.9)


@pytest.mark.parametrize(
    ("outcomes", "verdict", "of_all"),
    [
        ([HOLDS, HOLDS], ClaimVerdict.SHOWN, ClaimVerdict.SHOWN),
        ([HOLDS, OPEN], ClaimVerdict.PART, ClaimVerdict.PART),
        ([HOLDS, WEAK], ClaimVerdict.PART, ClaimVerdict.PART),
        ([HOLDS, FAILS], ClaimVerdict.PART, ClaimVerdict.CONTRADICTED),
        ([OPEN, FAILS], ClaimVerdict.CONTRADICTED, ClaimVerdict.CONTRADICTED),
        ([WEAK], ClaimVerdict.PART, ClaimVerdict.PART),
        ([UNCLEAR, OPEN], ClaimVerdict.NOT_RUN, ClaimVerdict.NOT_RUN),
        ([UNCLEAR], ClaimVerdict.NOT_SHOWN, ClaimVerdict.NOT_SHOWN),
        ([Outcome.UNKNOWABLE], ClaimVerdict.NOT_TESTABLE, ClaimVerdict.NOT_TESTABLE),
    ],
)
def test_parts_make_a_verdict(outcomes, verdict, of_all):
    assert combine(outcomes) is verdict and combine(outcomes, needs_all=True) is of_all


@pytest.mark.parametrize(
    ("part", "measured", "outcome"),
    [
        (GAIN, Measured(CLEAR), HOLDS),
        (GAIN, Measured([-1.0, -1.1, -0.9]), FAILS),
        (GAIN, Measured([1.0, -1.1, 0.4]), UNCLEAR),
        (GAIN, Measured([1.0, 1.1]), WEAK),  # only two seeds
        (GAIN, Measured([1.0]), WEAK),
        (GAIN, Measured(CLEAR, positive=[1.0, -1.0, 0.0]), UNCLEAR),  # the positive control shows no effect
        (GAIN, Measured(CLEAR, negative=CLEAR), UNCLEAR),  # the negative control shows an effect
        (GAIN, Measured(CLEAR, positive=CLEAR, negative=[0.1, -0.1, 0.05]), HOLDS),
        (CONTROLLED, Measured(CLEAR, negative=[0.1, -0.1, 0.05]), HOLDS),
        (CONTROLLED, Measured(CLEAR), WEAK),  # its control has not been run
        (CONTROLLED, Measured(CLEAR, negative=[1.0]), WEAK),  # one seed of it can never show an effect
        (GAIN, Measured(CLEAR, earlier=True), WEAK),  # measured before the rules were fixed
        (GAIN, None, OPEN),
        (GAIN.model_copy(update={"paper": 5.0}), Measured(CLEAR), WEAK),  # less than half the paper's effect
        (GAIN.model_copy(update={"paper": 1.9}), Measured(CLEAR), HOLDS),
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
        ("below", 5, 46.6, 86.1, 541, HOLDS),
        ("equal", 5, 79.8, 79.2, 30, UNCLEAR),
        ("equal", 5, 90.8, 91.8, 14042, HOLDS),
        ("equal", 5, 46.6, 86.1, 541, FAILS),
    ],
)
def test_published_scores_by_their_number_of_problems(side, margin, first, second, problems, outcome):
    part = Part(kind="B", side=side, threshold=0.0, margin=margin)
    assert score(part, PublishedScore(on="x", problems=problems, one=first, other=second)).outcome is outcome


def test_an_audit_and_a_run_are_judged_together():
    claim = ClaimEntry(
        kinds="AR", experiment="E1", text=["a", "b"], paper="", source="s", audit="holds", found=["a", "b"]
    )
    table = Rules(confidence=0.95, seeds=3, smaller=2, aa_confidence=0.99, claim={"Q1": ClaimRule(parts=[GAIN])})
    assert judge("Q1", claim, Evidence(), table)[0] is ClaimVerdict.PART
    assert judge("Q1", claim, Evidence(measured={"gain": Measured(CLEAR)}), table)[0] is ClaimVerdict.SHOWN
    fails = Evidence(measured={"gain": Measured([-1.0, -1.1, -0.9])})
    assert judge("Q1", claim, fails, table)[0] is ClaimVerdict.PART
