"""The referee: limits hold, killing a fork or the referee does no lasting harm, hostile text reaches no evaluator."""

import os
import signal
import threading
import time

import pytest

from bessemer.addons.tasks import referee
from bessemer.addons.tasks.referee import WALL_SECONDS, confined
from bessemer.errors import UserError

BOMB = "9^{9^{9^{9^{9}}}}"


def same(answer, gold="a+b"):
    return referee.ask("maths-same", gold=gold, answer=answer)["same"]


def spin():
    while True:
        pass


def test_a_fork_is_stopped_by_processor_time():
    wall, cpu = time.monotonic(), time.process_time()
    assert confined(spin) == {"fault": "timeout"}
    assert time.monotonic() - wall < WALL_SECONDS / 2  # it was not stopped by the clock
    assert time.process_time() - cpu < 0.3  # waiting itself uses no CPU time


def test_a_fork_that_does_nothing_is_stopped_by_the_clock(monkeypatch):
    monkeypatch.setattr("bessemer.addons.tasks.referee.WALL_SECONDS", 0.2)
    assert confined(lambda: time.sleep(30)) == {"fault": "timeout"}


def test_a_fork_may_take_no_memory_and_write_no_file(tmp_path):
    assert confined(lambda: {"size": len(bytearray(4 << 30))}) == {"fault": "crash"}

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        (tmp_path / "file").write_text("text")
        return {}

    assert confined(write) == {"fault": "crash"}
    assert confined(lambda: {"fine": 1}) == {"fine": 1}
    assert confined(lambda: os.kill(os.getpid(), signal.SIGKILL)) == {"fault": "crash"}


def test_changes_of_a_fork_do_not_survive():
    replies = []
    confined(lambda: replies.append(1) or {})
    assert replies == []


def test_a_bomb_harms_no_other_program():
    assert same("b+a")
    with pytest.raises(referee.RefereeFault, match="timeout"):
        same(BOMB)
    assert same("b+a") and not same("a-b")


def test_a_dead_or_silent_referee_is_named_and_replaced(monkeypatch):
    same("b+a")
    own_referee = referee._referee(os.getpid())
    silent = own_referee._child
    os.kill(silent.pid, signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(referee, "PATIENCE", 0.2)
        with pytest.raises(UserError, match=r"did not reply to 'maths-same' \(no reply in 0 s\)"):
            same("b+a")
    assert silent.poll() is not None  # it is not left behind
    assert same("b+a")
    own_referee._child.kill()
    own_referee._child.wait()
    assert same("b+a")


def test_a_forked_worker_has_a_referee_of_its_own():
    """Two processes sharing one pipe would read each other's verdicts."""
    same("b+a")
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = same("b+a") and referee._referee(os.getpid())._child.pid
        os.write(write, str(verdict).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    worker_referee = int(os.read(read, 100))
    assert worker_referee != referee._referee(os.getpid())._child.pid
    with pytest.raises(ProcessLookupError):  # and it ended with its parent
        for _ in range(100):
            os.kill(worker_referee, 0)
            time.sleep(0.05)


def test_threads_wait_for_each_other():
    replies = []
    threads = [threading.Thread(target=lambda n=n: replies.append((n, same(f"{n}+a", f"a+{n}")))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [(n, True) for n in range(8)]


@pytest.mark.parametrize(
    "text",
    [
        "x.__class__", "__import__('os')", "os.system(1)", "preview(x)", "lambda: 1", "x if x else x", "[x]", "'x'",
        "eval(x)", "x; y", "x, y", "factorial(9)", "1 .real", "x=1", "Symbol(x)", "f'{x}'", "x\u00b2", "ｘ", "@",
        "x" * 3000,
    ],
)  # fmt: skip
def test_the_gate_refuses_what_is_not_algebra(text):
    assert not referee.plain(text)


@pytest.mark.parametrize("text", ["2*x**2 + 3*x - 1.5", "-sin(x)*exp(2*x)/4 + C", "pi*sqrt(x)", "(x+1)^2", "", "1e5"])
def test_the_gate_lets_algebra_pass(text):
    assert referee.plain(text)
