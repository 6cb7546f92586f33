"""Sandboxes that serve one program after another: the verdicts of new ones, and nothing passes from one to the next."""

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from contextvars import Context
from itertools import chain, repeat
from multiprocessing import get_context

import pytest

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.sandbox import judge, judge_program, warm

from . import hostile_contestants as contestants
from .hostile_programs import HOSTILE
from .test_contest import SCAN, TESTS
from .test_sandbox import RIGHT, below, isolated
from .test_sandbox import TESTS as CALLS
from .test_sandbox import complaints as complaints_of_new

KEPT = 2  # the launcher and process 1


@pytest.fixture(autouse=True)
def sandboxes():
    """The processes of the kept sandboxes, as (pid, start time)."""
    children = below(os.getpid())
    with warm.kept():
        yield lambda: below(os.getpid()) - children


def complaints(names, isolation):
    with warm.kept():
        judge(RIGHT, "f", CALLS, seconds=5, isolation=isolation)
        before = below(os.getpid())
        faults = complaints_of_new(names, isolation)
        return faults + ([] if below(os.getpid()) == before else ["it is another sandbox"])


@isolated
def test_hostile_functions_leave_a_sandbox_as_it_was(isolation):
    """All of them in turn in four sandboxes, with the right answer after each."""
    shares = [list(HOSTILE)[first::4] for first in range(4)]
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        assert list(chain.from_iterable(pool.map(complaints, shares, repeat(isolation)))) == []


@isolated
def test_hostile_contestants_leave_a_sandbox_as_it_was(isolation, sandboxes):
    assert judge_program(contestants.RIGHT, TESTS, seconds=10, isolation=isolation).correct
    before = sandboxes()
    for name, (source, reason) in contestants.HOSTILE.items():
        judgement = judge_program(source, TESTS, seconds=0.5 if reason == "timeout" else 10, isolation=isolation)
        assert judgement.reason == reason and judgement.passed < 2, (name, judgement)
        assert sandboxes() == before, name
    assert judge_program(contestants.RIGHT, TESTS, seconds=10, isolation=isolation).correct


@isolated
def test_no_channel_leads_from_one_program_to_the_next(isolation):
    program = contestants.passing(contestants.CHANNELS)
    for _ in range(3):
        judgement = judge_program(program, TESTS[:1], seconds=10, isolation=isolation)
        assert judgement.reason == "correct", judgement


LEAVES = """
import builtins, os, sys, time
builtins.left = sys.left = 1
os.environ["LEFT"] = "1"
open("/tmp/left", "w").write("left")
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
def f(word):
    return word[::-1]
"""
FINDS = """
import builtins, os, resource, sys
def f(word):
    found = [name for name in ("left",) if hasattr(builtins, name) or hasattr(sys, name)]
    found += [name for name in os.environ if name == "LEFT"] + os.listdir("/tmp")
    for pid in set(range(2, 400)) - {os.getpid()}:
        try:
            os.kill(pid, 0)
            found.append(f"process {pid}")
        except ProcessLookupError:
            pass
        except PermissionError:
            found.append(f"process {pid} of another")
    found += [] if os.getpid() == 2 else [f"it is process {os.getpid()}"]
    free = os.statvfs("/tmp")
    return found + [free.f_bavail == free.f_blocks]
"""


@isolated
def test_nothing_a_function_leaves_survives(isolation, sandboxes):
    assert judge(LEAVES, "f", [(["abc"], "cba")], seconds=10, isolation=isolation).correct
    before = sandboxes()
    verdict = judge(FINDS, "f", [(["abc"], [True])], seconds=10, isolation=isolation)
    assert verdict.correct, verdict.detail
    assert sandboxes() == before and len(before) == KEPT


@isolated
@pytest.mark.parametrize("imports", [False, True])
def test_the_memory_of_a_program_holds_nothing_of_the_one_before(isolation, imports):
    how = {"seconds": 10, "isolation": isolation, "imports": imports}
    word = "a-word-nobody-has"
    judgement = judge_program(f"# {word} in a source\nprint(input())", [(f"{word} in an input", "x")], **how)
    assert word in judgement.detail
    scan = SCAN.replace(
        "given.encode() in memory", repr(word[:9]) + ".encode()+" + repr(word[9:]) + ".encode() in memory"
    )
    own = "another-" + "word"
    judgement = judge_program(scan.replace("given[::-1]", "given"), [(own, "?")], **how)
    assert judgement.detail == "True False True\n", "its own input is there, so the right places are searched"


@isolated
def test_verdicts_and_their_details_match_those_of_new_sandboxes(isolation, sandboxes):
    programs = [
        "print(input())", "1/0", "print(7", "import sys; sys.exit(3)", "import os; os._exit(3)", "while 1: pass",
        "x = 'a' * 10**10", "print('x' * 10**6)", "import random; print(len({random.random()}))",
    ]  # fmt: skip
    functions = [f"def f(n):\n    {body}" for body in
                 ("return n * n + 1", "return 1 // 0", "import os; os._exit(3)", "while 1: pass", "return 'a' * 10**10",
                  "open('/tmp/a', 'w').write('1'); return n * n + 1", "import sys; sys.exit(4)")]  # fmt: skip

    def verdicts():
        results = [judge_program(program, [("1", "1")] * 2, seconds=0.7, isolation=isolation) for program in programs]
        results += [judge(program, "f", CALLS, seconds=0.7, isolation=isolation) for program in functions]
        return [(program.reason, program.passed, program.detail) for program in results]

    in_one = verdicts()
    assert len(sandboxes()) == KEPT
    assert in_one == Context().run(verdicts), "a fresh context keeps none"
    assert len(sandboxes()) == KEPT


@isolated
def test_a_sandbox_that_was_killed_is_replaced(isolation, sandboxes):
    assert judge(RIGHT, "f", CALLS, seconds=10, isolation=isolation).correct
    before = sandboxes()
    for pid, _ in before:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert judge(RIGHT, "f", CALLS, seconds=10, isolation=isolation).correct
    assert len(before) == len(sandboxes()) == KEPT and not sandboxes() & before


@isolated
def test_random_numbers_differ_from_program_to_program(isolation):
    source = "import random\ndef f():\n    return random.getrandbits(64)"
    drawn = {judge(source, "f", [([], 0)], seconds=10, imports=True, isolation=isolation).detail for _ in range(3)}
    assert len(drawn) == 3


def test_without_isolation_nothing_is_kept(sandboxes):
    assert judge(RIGHT, "f", CALLS, seconds=10, isolation="none").correct
    assert not sandboxes()
    assert sandbox.LEVELS[-1] == "none"
