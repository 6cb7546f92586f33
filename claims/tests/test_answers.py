"""A claim has two answers: what documents say, and what runs show."""

import pytest

from bessemer_claims.registry import Part
from bessemer_claims.verdict import Documented, Outcome, PartFinding, Seen, documented, parts_held, seen

HOLDS, UNCLEAR, FAILS, OPEN = Outcome.HOLDS, Outcome.UNCLEAR, Outcome.FAILS, Outcome.OPEN
EXACT = Part(kind="X", metric="x", side="above", threshold=1)
RUN = Part(kind="R", metric="y", side="above", threshold=0.0, margin=0.1)


def of(part, *outcomes):
    return [PartFinding(part, outcome, "") for outcome in outcomes]


@pytest.mark.parametrize(
    ("outcomes", "any_holds", "all_must"),
    [
        ([], "unknown", "unknown"),
        ([HOLDS, HOLDS], "yes", "yes"),
        ([HOLDS, FAILS], "partly", "no"),
        ([HOLDS, UNCLEAR], "partly", "partly"),
        ([FAILS, FAILS], "no", "no"),
        ([FAILS, UNCLEAR], "unknown", "no"),  # one of several statements is wrong, of the rest nobody knows
        ([UNCLEAR], "unknown", "unknown"),
        ([Outcome.UNKNOWABLE], "unknown", "unknown"),
        ([HOLDS, Outcome.UNKNOWABLE], "yes", "yes"),
    ],
)
def test_what_documents_say(outcomes, any_holds, all_must):
    findings = of(EXACT, *outcomes) + of(RUN, FAILS)
    assert documented(findings) is Documented(any_holds) and documented(findings, True) is Documented(all_must)


@pytest.mark.parametrize(
    ("outcomes", "any_holds", "all_must"),
    [
        ([], "not-asked", "not-asked"),
        ([OPEN], "not-asked", "not-asked"),
        ([HOLDS, OPEN], "yes", "cannot-tell"),
        ([HOLDS, UNCLEAR], "cannot-tell", "cannot-tell"),
        ([Outcome.WEAK], "cannot-tell", "cannot-tell"),
        ([HOLDS, FAILS], "cannot-tell", "no"),
        ([FAILS, UNCLEAR], "no", "no"),
    ],
)
def test_what_runs_show(outcomes, any_holds, all_must):
    findings = of(RUN, *outcomes) + of(None, HOLDS)
    assert seen(findings) is Seen(any_holds) and seen(findings, True) is Seen(all_must)
    assert parts_held(findings, "seen") == (outcomes.count(HOLDS), len(outcomes))


@pytest.mark.parametrize("role", ["consistency", "prediction"])
def test_a_copy_that_equals_itself_decides_nothing(role):
    copied = EXACT.model_copy(update={"role": role})
    findings = of(copied, HOLDS, HOLDS)
    assert documented(findings) is Documented.UNKNOWN and seen(findings) is Seen.NOT_ASKED
