"""The counts of one hand-written trace, and of the ways a policy may drift from the form."""

from bessemer.tasks import Problem
from bessemer.tasks.diagnose import Diagnosis, diagnose, rates

PROBLEM = Problem("p", "", "en", {"numbers": [3, 7, 6], "target": 27})


def test_a_trace_with_every_kind_of_event():
    trace = (
        "3+7=10,10+6=16:27 low wait\n"  # a right miss
        "7+3=10,10+6=16:27 high\n"  # repeated, wrong verdict
        "3*6=18,18+7=26:27 yes;"  # slip, false yes
        "hmm\n"
        "7-3=4,6-4=2:26 low\n"  # another target
        "3*7=21,21+6=27:27 yes"
    )
    got = diagnose(PROBLEM, f"<think>{trace}</think><answer>6+7*3</answer>")
    assert got == Diagnosis(
        responses=1,
        tries=5,
        repeated=1,
        steps=10,
        steps_right=9,
        linked=5,
        right_numbers=5,
        right_target=4,
        hits=1,
        yes_on_hit=1,
        misses=4,
        yes_on_miss=1,
        low_high_right=2,
        waits=1,
        unread=1,
        said_yes=1,
        answered_yes=1,
    )
    rate = rates([got, got])
    assert rate["tries"] == 5 and rate["repeated"] == 0.2 and rate["low_high_given_miss"] == 0.5


def test_giving_up_and_breaking_off_differ():
    line = "3+7=10,10+6=16:27小"
    assert diagnose(PROBLEM, f"<think>{line}</think><answer>3</answer>").gave_up == 1
    assert diagnose(PROBLEM, f"<think>{line}\n{line},等等\n").gave_up == 0
    assert diagnose(PROBLEM, f"<think>{line}\n{line},等等\n").waits == 1
    assert diagnose(PROBLEM, "<answer>3</answer>") == Diagnosis(responses=1)


def test_the_systematic_opening():
    got = diagnose(PROBLEM, "<think>order:7,6,3\n7+6=13,13+3=16:27 low</think><answer>7+6+3</answer>")
    assert (got.systematic, got.unread, got.tries, got.gave_up) == (1, 0, 1, 1)


def test_unlinked_steps_and_wrong_numbers_are_seen():
    got = diagnose(PROBLEM, "<think>3+7=10,11+6=17:27 low\n3+8=11,11+6=17:27 low</think>")
    assert (got.tries, got.linked, got.right_numbers) == (2, 1, 0)


def test_hostile_traces_are_quick_and_harmless():
    for text in ["", "<think>", "<think>" + "3+" * 300_000, "<think>" + "\n" * 300_000, "1" * 10**6, "<think>٣+٤=٧"]:
        assert diagnose(PROBLEM, text).tries == 0
    assert rates([])["tries"] is None
