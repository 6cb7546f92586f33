"""The report on who waits for whom, and the watchdog that prints it."""

import re
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from forks import Fork

from bessemer import heartbeat
from bessemer.addons.distributed import ranks, watchdog
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.distributed.watchdog import Activity, hang_report

NOW = 1000.0


def words(statuses, ranks=(0, 1, 2), timeout=100.0):
    return hang_report(0, Activity("tokens", ranks, NOW - 120), 7, [None, *statuses], NOW, timeout)


@pytest.mark.parametrize(
    ("statuses", "needed_words"),
    [
        ([[NOW - 300, 6, "working", None, NOW - 310], [NOW - 1, 7, "tokens", [0, 1], NOW - 90]],
         "rank 1 has not reported for 300 s, last in step 6 (working)"),
        ([[NOW - 1, 7, "working", None, NOW - 110], [NOW - 1, 7, "tokens", [0, 1], NOW - 90]],
         "rank 1 has been in step 7 (working) for 110 s"),
        ([None, [NOW - 1, 7, "tokens", [0, 1], NOW - 90]], "rank 1 never reported"),
        ([[NOW - 1, 7, "loads", [0, 2], NOW - 90], [NOW - 1, 7, "tokens", [0, 1, 2], NOW - 90]],
         "all others are also waiting: rank 1 for loads from ranks 0, 2; rank 2 for tokens from ranks 0, 1"),
    ],
    ids=["silent", "busy", "never", "all wait"],
)  # fmt: skip
def test_hang_report_names_the_cause(statuses, needed_words):
    report = words(statuses)
    assert (
        report.startswith("rank 0 has waited 120 s for tokens from ranks 1, 2 in step 7; ") and needed_words in report
    )


def test_threads_wait_independently():
    """An exchange alongside the computation, begun later and ended earlier or later: what remains is reported."""
    inside, out = threading.Event(), threading.Event()

    def exchange():
        with watchdog.waiting("exchange", [1]):
            inside.set()
            out.wait(10)

    thread = threading.Thread(target=exchange)
    thread.start()
    inside.wait(10)
    with watchdog.waiting("activations", range(3)):
        assert watchdog.RankStatus.current().what == "exchange", "the longest"
        out.set()
        thread.join()
        assert watchdog.RankStatus.current().what == "activations"
    assert watchdog.RankStatus.current().ranks is None
    with watchdog.waiting("outer", [1]):
        with watchdog.waiting("inner", [2]):
            assert watchdog.RankStatus.current().what == "inner"
        assert watchdog.RankStatus.current().what == "outer"
    with pytest.raises(OSError), watchdog.waiting("x", [1]):
        raise OSError
    assert watchdog.RankStatus.current().ranks is None


def ended(seconds, waits_for, over=False):
    """Wait for rank 1 in a process of its own whose watchdog allows so many seconds; (status, stderr, how long)."""

    def work():
        store = dist.HashStore()
        watchdog.Watchdog(store, 0, 2, seconds)
        watchdog.at(3)
        if over:
            store.set(watchdog.OVER, "1")
        with watchdog.waiting(waits_for, range(2)):
            time.sleep(30)

    began, process = time.monotonic(), Fork(work)
    _, message = process.communicate(timeout=60)
    return process.returncode, message, time.monotonic() - began


def test_rank_that_waits_too_long_reports_and_exits():
    status, message, took = ended(1.0, "the figures")
    assert status == watchdog.EXIT and took < 25
    assert re.search("rank 0 .*1 s.* the figures .*rank 1 .*step 3.*rank 1 never", message)


QUEUED = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from bessemer.addons.distributed import watchdog
reached = [True, False]  # the device does the first of two operations, and never the second
watchdog.RankStatus.mark = lambda: lambda done=reached.pop(0): done
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
watchdog.Watchdog(dist.HashStore(), 0, 1, 1.0, Path(sys.argv[1]) / "hang")
watchdog.at(3)
for what in ("weights", "gradients of micro-batch 7"):
    with watchdog.waiting(what, [1]):
        pass
def the_host_goes_on():
    time.sleep(30)
the_host_goes_on()
"""


def test_hung_device_is_noticed_while_its_host_continues(tmp_path):
    """As with NCCL, a wait returns at once. The stacks and torch's flight recorder are written to files."""
    done = subprocess.run([sys.executable, "-c", QUEUED, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == watchdog.EXIT
    assert re.search("rank 0 .*1 s.*gradients of micro-batch 7 .*rank 1 .*step 3", done.stderr)
    assert "the_host_goes_on" in (tmp_path / "hang" / "rank-0.txt").read_text()
    assert b"gloo:barrier" in (tmp_path / "hang" / "recorder_0").read_bytes()


def test_queued_operation_waits_from_the_end_of_the_previous_one(monkeypatch):
    """The host runs ahead: what it queued long ago may only just have begun."""
    status, done = watchdog.RankStatus, {"first": False, "second": False}
    monkeypatch.setattr(status, "queued", type(status.queued)())
    monkeypatch.setattr(status, "reached", 0.0)
    queued = iter(done)
    monkeypatch.setattr(status, "mark", lambda: partial(done.__getitem__, next(queued)))
    for operation in done:
        with watchdog.waiting(operation, [1]):
            pass
    first = status.current()
    assert first.what == "first"
    time.sleep(0.01)
    done["first"] = True
    assert status.current().what == "second" and status.current().since >= first.since + 0.01
    done["second"] = True
    assert status.current().ranks is None and not status.queued


def test_progressing_ranks_are_waited_for_and_hung_ones_are_not(monkeypatch):
    """`meet` extends its wait at every sign of life from the others, until one has ended or the signs stop."""
    store, status, since, clock = dist.HashStore(), watchdog.RankStatus, [], [0.0]
    met = Ranks(store, 0, 3, torch.device("cpu"))
    events = [*["beat"] * 3, "nothing", "nothing", "beat", "over", "beat", "arrives", "arrives"]

    def sleep(seconds):
        """Plays what the others do meanwhile."""
        assert 0 < seconds <= 0.1
        clock[0] += 1.0
        since.append(status.current().since)
        event = events.pop(0)
        if event == "over":
            store.set(watchdog.OVER, "2")
        elif event == "beat":
            store.add(watchdog.BEATS, 1)
        else:
            store.add("met/0", int(event == "arrives"))

    for module in (ranks, watchdog):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
        monkeypatch.setattr(module.time, "sleep", sleep)
    met.meet("samples")
    assert since == [0, 1, 2, 3, 3, 3, 6, 6, 6, 6] and not events and status.current().ranks is None


def test_heartbeats_reach_other_ranks():
    """They go through its watchdog while its main thread is busy, and a report counts from the latest one."""
    store, working = dist.HashStore(), watchdog.RankStatus.working
    dog = watchdog.Watchdog(store, 0, 2, 0.2)
    try:
        until = time.monotonic() + 60
        while store.add(watchdog.BEATS, 0) < 2 and time.monotonic() < until:
            heartbeat.beat()
            time.sleep(0.01)
        assert watchdog.RankStatus.working.since > working.since
        time.sleep(0.2)
        beats = store.add(watchdog.BEATS, 0)
        time.sleep(0.2)
        assert beats >= 2 and store.add(watchdog.BEATS, 0) == beats, "no sign, no progress"
    finally:
        dog.stop()


def test_rank_waiting_for_an_ended_rank_exits():
    status, message, took = ended(2.0, "gradients", over=True)
    assert status == watchdog.LOST and took < 20 and not message
