"""The counts for a hand-written trace, and for the ways in which a policy may drift from the form."""

from bessemer.addons.tasks.countdown_diagnosis import Diagnosis, diagnose, rates
from bessemer.tasks import Problem
from bessemer.tasks.countdown_expressions import all_tries

PROBLEM = Problem("p", "", "en", {"numbers": [3, 7, 6], "target": 27})


def test_a_trace_with_every_kind_of_event():
    trace = (
        "(3+7)+6=10+6=16:27 low wait\n"  # a miss judged correctly
        "(7+3)+6=10+6=16:27 high\n"  # repeated, with a wrong verdict
        "(3*6)+7=18+7=26:27 yes;"  # a miscalculation and a false yes
        "hmm\n"
        "6-(7-3)=6-4=2:26 low\n"  # the wrong target
        "(3*7)+6=21+6=27:27 yes"
    )
    diagnosis = diagnose(PROBLEM, f"<think>{trace}</think><answer>6+7*3</answer>")
    assert diagnosis == Diagnosis(
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
    rate = rates([diagnosis, diagnosis])
    assert rate["tries"] == 5 and rate["repeated"] == 0.2 and rate["low_high_given_miss"] == 0.5


def test_a_chain_of_five_numbers_and_its_returns():
    problem = Problem("p", "", "en", {"numbers": [8, 3, 2, 7, 1], "target": 24})
    trace = (
        "(((8-3)*2)+7)-1=5*2=10+7=17-1=16:24 low\n"
        "(((7+3)*2)+8)-1=10*2=20+8=28-1=27:24 high\n"
        "back (((8-3)*2)+7)+1=5*2=10+7=17+1=18:24 low\n"  # the first try with another operator: a return
        "back (((8-3)*2)+1)+7=5*2=10+1=11+7=18:24 low\n"  # of the last one: none
        "back (((1+2)*3)+7)+8=3*3=9+7=16+8=23:24 low\n"  # like none before, and miscalculated
        "(((8-3)*2)+7)=5*2=10+7=17:24 low\n"  # four of the five numbers
        "(((8-2)*3)+7)-1=6*3=18+7=24-1=24:24 yes"  # two miscalculations
    )
    diagnosis = diagnose(problem, f"<think>{trace}</think><answer>(((8-2)*3)+7)-1</answer>")
    assert (diagnosis.tries, diagnosis.returned, diagnosis.unread, diagnosis.right_numbers) == (6, 1, 1, 6)
    assert (diagnosis.steps, diagnosis.steps_right, diagnosis.hits, diagnosis.answered_yes) == (24, 21, 1, 1)
    short = diagnose(problem, "<think>((8-3)*2)+7=5*2=10+7=17:24 low</think><answer>1</answer>")
    assert (short.tries, short.right_numbers, short.steps_right, short.gave_up) == (1, 0, 3, 1)


def test_giving_up_and_breaking_off_differ():
    line = "(3+7)+6=10+6=16:27小"
    assert diagnose(PROBLEM, f"<think>{line}</think><answer>3</answer>").gave_up == 1
    assert diagnose(PROBLEM, f"<think>{line}\n{line},等等\n").gave_up == 0
    assert diagnose(PROBLEM, f"<think>{line}\n{line},等等\n").waits == 1
    assert diagnose(PROBLEM, "<answer>3</answer>") == Diagnosis(responses=1)


def test_the_systematic_opening():
    diagnosis = diagnose(PROBLEM, "<think>order:7,6,3\n(7+6)+3=13+3=16:27 low</think><answer>7+6+3</answer>")
    assert (diagnosis.systematic, diagnosis.unread, diagnosis.tries, diagnosis.gave_up) == (1, 0, 1, 1)


def test_only_the_written_form_is_a_try():
    for line in (
        "3*7=21,21+6=27:27 yes",  # the form of earlier corpora
        "3*7+6=21+6=27:27 yes",
        "(3*7+6)=21+6=27:27 yes",
        "(3*7)+6=27:27 yes",
        "(03*7)+6=21+6=27:27 yes",
        "(3*7)+6=21+6=27:27",
        "(3/7)+6=21+6=27:27 yes",
        "x(3*7)+6=21+6=27:27 yes",
    ):
        diagnosis = diagnose(PROBLEM, f"<think>{line}</think><answer>(3*7)+6</answer>")
        assert (diagnosis.tries, diagnosis.unread, diagnosis.said_yes, diagnosis.answered_yes) == (0, 1, 0, 0), line


def test_the_answer_is_compared_with_the_last_yes():
    first, last = "(3*7)+6=21+6=27:27 yes", "(9*9)+9=81+9=90:27 yes"
    for trace, answer, is_copied in (
        (first, "6+7*3", 1),
        (first, "3*7", 0),
        (first, "nothing", 0),
        (f"{first}\n{last}", "(3*7)+6", 0),
        (f"{first}\n{last}", "9*9+9", 1),
    ):
        diagnosis = diagnose(PROBLEM, f"<think>{trace}</think><answer>{answer}</answer>")
        assert (diagnosis.said_yes, diagnosis.answered_yes) == (1, is_copied), (trace, answer)
    assert diagnose(PROBLEM, f"<think>{first}</think>").answered_yes == 0
    assert diagnose(PROBLEM, f"<think>{first}\n(3+7)+6=10+6=16:27 low</think><answer>3*7+6</answer>").said_yes == 0


def test_everything_a_try_writes_is_read_back():
    for numbers in ((3, 6, 7), (1, 1, 1), (2, 9, 15), (15, 15, 15)):
        problem = Problem("p", "", "en", {"numbers": list(numbers), "target": 27})
        for attempt in (t for original in all_tries(numbers) for t in (original, original.swapped())):
            steps, claimed, _ = attempt.write()
            diagnosis = diagnose(problem, f"<think>{steps}:27{' low' if claimed < 27 else ' high'}</think>")
            counts = (diagnosis.tries, diagnosis.linked, diagnosis.right_numbers, diagnosis.steps_right)
            assert counts == (1, 1, 1, 2), steps


def test_hostile_traces_are_quick_and_harmless():
    for text in [
        "",
        "<think>",
        "<think>" + "3+" * 300_000,
        "<think>" + "(3+7)+6=" * 100_000,
        "<think>" + "\n" * 300_000,
        "1" * 10**6,
        "<think>٣+٤=٧",
    ]:
        assert diagnose(PROBLEM, text).tries == 0
    endless = "(9999*9999)*9999=9999+0=0:9999 yes" + "!" * 1000
    assert diagnose(PROBLEM, f"<think>{endless}</think>").tries == 1
    assert rates([])["tries"] is None
