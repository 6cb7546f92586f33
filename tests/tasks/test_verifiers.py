"""Verifiers: the same verdicts whatever their number, one lost answer at most, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
import tracemalloc
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hard_answers import Hard
from ranks import on_ranks

from bessemer import tasks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.tasks.verifiers import CRASHED, DIED, HUNG, MEMORY, CostlyTask, Verifiers
from bessemer.errors import UserError
from bessemer.eval.judging import judge_all
from bessemer.system import alive
from bessemer.tasks.base import Problem, Task, Verdict

SHARED = str(Path(__file__).parents[1] / "shared")
TASK = Hard()
PROBLEM = TASK.problem("train", 0)


@pytest.fixture(autouse=True)
def found_by_verifiers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([SHARED, *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture
def pool():
    pools = []

    def pool(n=1, **options):
        pools.append(Verifiers(n, **options))
        return pools[-1]

    yield pool
    for verifiers in pools:
        verifiers.close()


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Answers to code, to a program with tests on file, and to mathematics; right, wrong, hostile and repeated."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "maths.jsonl").write_text('{"question": "Factor $x^2-1$.", "answer": "(x-1)(x+1)"}\n' * 1)
    (folder / "code.jsonl").write_text(
        '{"prompt": "Double it.", "tests": [{"input": "1", "output": "2"}, {"input": "4", "output": "8"}]}\n'
    )
    maths, code = tasks.get(f"jsonl:{folder}/maths.jsonl@train"), tasks.get(f"code:{folder}/code.jsonl@train")
    written = {
        maths: ["(x+1)(x-1)", "(x-1)^2", "9^{9^{9^{9^{9}}}}", "x", "(1+x)(x-1)"],
        code: [
            "print(2*int(input()))",
            "print(2)",
            "import os; os.kill(os.getpid(), 9)",
            "1/0",
            "print(2*int(input()))",
        ],
        tasks.get("code"): [f"def f(x):\n    return {n}" for n in range(4)],
        tasks.get("arithmetic"): ["7", "8"],
    }
    return [
        (task, task.problem("train", 0), f"<think>t</think><answer>{text}</answer>")
        for task, texts in written.items()
        for text in texts
    ]


def test_the_number_of_verifiers_changes_nothing(asked, pool):
    expected = [task.verify(problem, answer) for task, problem, answer in asked]
    assert len({verdict.reason for verdict in expected}) >= 5
    for n in (1, 2, 4):
        verifiers_n = pool(n)
        futures = [verifiers_n.submit(*job) for job in reversed(asked)][::-1]
        assert [future.result(100).verdict for future in futures] == expected, n
    assert [job.verdict for job in judge_all(asked)] == expected


def shared(rank, asked):
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, 2, torch.device("cpu"))
    for job in asked[5:7] if rank else []:
        task, *answer = job
        task.begin(*answer)  # what this rank has generated
    own = []
    judged = Task.judged, CostlyTask.judged
    Task.judged = lambda *job: own.append(job[2]) or judged[0](*job)
    CostlyTask.judged = lambda *job: own.append(job[2]) or judged[1](*job)
    return judge_all(asked, ranks.share("verdicts")), own


def test_two_ranks_give_the_verdicts_of_one_and_each_judges_what_it_generated(asked):
    (verdicts_0, judged_0), (verdicts_1, judged_1) = on_ranks(2, shared, asked)
    assert verdicts_0 == verdicts_1 == judge_all(asked)
    assert len(judged_0) + len(judged_1) == len(asked) and {asked[5][2], asked[6][2]} <= set(judged_1)
    assert min(len(judged_0), len(judged_1)) >= len(asked) // 2 - 2


def test_an_answer_that_kills_or_hangs_a_verifier_makes_no_other_answer_wrong(pool, tmp_path):
    verifiers = pool(2, patience=3.0)
    texts = ["right", "die", "right", "memory", "crash", "hang", "wrong", f"once {tmp_path / 'seen'}", "right 2"]
    with pytest.warns(UserWarning, match="what a parser may raise"):
        verdicts = [future.result(60).verdict for future in [verifiers.submit(TASK, PROBLEM, text) for text in texts]]
    assert [verdict.reason for verdict in verdicts] == [
        "correct", DIED, "correct", MEMORY, CRASHED, HUNG, "wrong-value",
        "correct", "correct",
    ]  # fmt: skip
    assert verdicts[1] == Verdict(False, False, DIED, None)


def test_a_verifier_that_is_killed_costs_nothing(pool):
    verifiers = pool(1)
    first = int(verifiers.submit(TASK, PROBLEM, "right").result(60).verdict.answer)
    os.kill(first, signal.SIGKILL)
    second = int(verifiers.submit(TASK, PROBLEM, "right 2").result(60).verdict.answer)
    assert second != first and not alive(first)
    assert int(verifiers.submit(TASK, PROBLEM, "wrong").result(60).verdict.answer) == second, "it stays warm"
    verifiers.close()
    assert not alive(second)


def test_an_answer_is_not_wrong_because_the_verifiers_are_closed(pool):
    verifiers = pool(1)
    pid = int(verifiers.submit(TASK, PROBLEM, "right").result(60).verdict.answer)
    hangs = verifiers.submit(TASK, PROBLEM, "hang")
    time.sleep(1.0)  # until it is being judged; if it is not yet, nothing is found either
    verifiers.close()
    assert not alive(pid)
    with pytest.raises(TimeoutError):
        hangs.result(1.0)


def test_an_error_that_a_user_can_fix_stops_the_call(pool):
    with pytest.raises(UserError, match="mend this first"):
        pool().submit(TASK, PROBLEM, "mend").result(60)


def test_the_same_answer_is_judged_once(pool):
    verifiers = pool(1)
    twice = [verifiers.submit(TASK, PROBLEM, "right") for _ in range(3)]
    assert twice[0] is twice[1] is twice[2]
    assert verifiers.knows(TASK, PROBLEM, "right") and not verifiers.knows(TASK, PROBLEM, "wrong")
    assert verifiers.submit(TASK, Problem("other", "?", "en"), "right") is not twice[0]


def test_a_judgement_is_kept_until_it_is_asked_for(pool, monkeypatch):
    """A rollout of more answers than are kept was judged twice."""
    monkeypatch.setattr("bessemer.addons.tasks.verifiers.KEPT", 4)
    verifiers = pool(1)
    begun = [verifiers.submit(TASK, PROBLEM, f"wrong {n}") for n in range(12)]
    for future in begun:
        future.result(60)
    assert [verifiers.submit(TASK, PROBLEM, f"wrong {n}", waited_for=True) for n in range(12)] == begun
    assert [verifiers.knows(TASK, PROBLEM, f"wrong {n}") for n in range(12)] == [False] * 8 + [True] * 4


def test_a_task_that_cannot_be_pickled_is_judged_in_this_process(pool):
    class Local(Hard):
        """Pickle finds no class inside a function."""

    (judgement,) = judge_all([(Local(), PROBLEM, "right")])
    assert judgement.verdict.answer == str(os.getpid())
    assert pool(1).submit(TASK, PROBLEM, "right").result(60).verdict.answer != str(os.getpid())


def test_a_class_that_a_verifier_cannot_import_is_judged_in_this_process(monkeypatch):
    module = types.ModuleType("only_here")
    exec("from hard_answers import Hard as H\nclass Own(H): pass", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    module.Own.__module__ = "only_here"
    task = module.Own()
    assert task.apart
    judgements = judge_all([(task, PROBLEM, "right"), (task, PROBLEM, "wrong")])
    assert [judgement.verdict.correct for judgement in judgements] == [True, False] and not task.apart
    assert judgements[0].verdict.answer == str(os.getpid())


def test_judged_answers_are_not_kept_in_memory(pool):
    """65,536 judgements are kept: with their answers they were gigabytes."""
    verifiers = pool(1)
    verifiers.submit(TASK, PROBLEM, "right").result(60)
    tracemalloc.start()
    for n in range(40):
        verifiers.submit(TASK, PROBLEM, f"wrong {n} " + "and so on " * 100_000).result(60)
    bytes_held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes_held < 8e6 < 40e6


PROGRAM = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {SHARED!r})
from hard_answers import Hard
from bessemer.addons.tasks.verifiers import Verifiers
if __name__ == "__main__":
    task = Hard()
    pool = Verifiers(2)
    print(*[pool.submit(task, task.problem("train", n), "right").result().verdict.answer for n in range(2)], flush=True)
    pool.submit(task, task.problem("train", 0), "hang")
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_outlives_a_run(number, tmp_path):
    (tmp_path / "run.py").write_text(PROGRAM)
    run = subprocess.Popen(
        [sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(pid) for pid in run.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    run.send_signal(number)
    run.wait(20)
    for _ in range(400):
        if not any(map(alive, pids)):
            return
        time.sleep(0.05)
    raise AssertionError(f"verifiers {[pid for pid in pids if alive(pid)]} are left")
