"""Limits apply to a whole sandbox: processes, memory and files are its own, whatever runs beside it or inside."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bessemer.addons.tasks.sandbox import run
from bessemer.addons.tasks.sandbox.process import PROCESSES

from .test_sandbox import ISOLATED, below, isolated

HONEST = """
import threading, time
done = []
def work(n):
    time.sleep(0.2)
    done.append(n)
threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sorted(done))
"""
FORKS = """
import os, time
while True:
    try:
        if os.fork() == 0: time.sleep(99)
    except OSError: time.sleep(0.01)
"""
GREEDY = """
import os, time
for _ in range(12):  # without root, the sandbox's own process is one of the sixteen
    if os.fork() == 0:
        held = []
        try:
            while True:
                held.append(bytearray(1 << 20))
                held[-1][::4096] = b'x' * 256
        except MemoryError: time.sleep(99)
time.sleep(99)
"""
SHARED = """
import os, time
held = b'x' * (100 << 20)
children = []
for _ in range(6):
    if pid := os.fork(): children.append(pid)
    else: time.sleep(0.3); os._exit(0)
for pid in children: os.waitpid(pid, 0)
print(len(held) >> 20)
"""
FOLDERS = """
import os
n = 0
try:
    while True:
        os.mkdir(f'/tmp/{n}')
        n += 1
except OSError as error: print(n, error.errno)
"""


@isolated
def test_honest_threads_run_beside_a_neighbour_that_forks(isolation):
    with ThreadPoolExecutor(9) as pool:
        neighbour = pool.submit(run, FORKS, seconds=3, isolation=isolation)
        limit = time.monotonic() + 3
        while len(below(os.getpid())) < PROCESSES and time.monotonic() < limit:
            time.sleep(0.05)
        results = list(pool.map(lambda _: run(HONEST, seconds=20, isolation=isolation), range(8)))
        assert [(run_.status, run_.stdout) for run_ in results] == [("ok", "[0, 1, 2, 3, 4, 5]\n")] * 8, results
        assert neighbour.result().status == "timeout"


@isolated
def test_the_memory_of_all_processes_together_is_bounded(isolation):
    """15 greedy children once got 3.8 GB under a limit of 256 MB. Now they only get a little between two polls."""
    done, peak, before = threading.Event(), [0], below(os.getpid())

    def measure():
        while not done.wait(0.02):
            resident = 0
            for pid, _ in below(os.getpid()) - before:
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                except OSError:
                    continue
                resident += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
            peak[0] = max(peak[0], resident >> 10)

    thread = threading.Thread(target=measure)
    thread.start()
    try:
        result = run(GREEDY, seconds=20, memory_mb=256, isolation=isolation)
    finally:
        done.set()
        thread.join()
    assert result.status == "memory" and peak[0] < 2 * 256


@isolated
def test_memory_that_forks_share_counts_once(isolation):
    result = run(SHARED, seconds=20, memory_mb=256, isolation=isolation)
    if os.geteuid() and isolation == "namespaces":
        assert result.status == "memory", "without root, /proc tells there only what each process holds"
    else:
        assert (result.status, result.stdout) == ("ok", "100\n")


@isolated
def test_folders_are_few_and_end_at_once(isolation):
    """Each folder takes a kilobyte of kernel memory that does not count towards the size of /tmp."""
    began = time.monotonic()
    result = run(FOLDERS, seconds=20, isolation=isolation)
    n, error = map(int, result.stdout.split())
    assert 1000 < n < 4096 and error == 28  # no space left
    assert time.monotonic() - began < 8


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from bessemer.addons.tasks import sandbox
sandbox.trial("bubblewrap")
def children(pid):
    try: return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError: return []
left, chance = [], random.Random(5)
for _ in range(24):
    if not (parent := os.fork()):
        try: sandbox.run("import time; time.sleep(60)", seconds=60, isolation="bubblewrap")
        finally: os._exit(0)
    while not (begun := children(parent)): pass
    time.sleep(chance.random() * 0.012)
    left += begun + children(begun[0])
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
print(*left)
"""


@pytest.mark.skipif("bubblewrap" not in ISOLATED, reason="bubblewrap does not work here")
def test_bubblewrap_dies_with_a_parent_that_dies_in_the_first_milliseconds():
    """With bubblewrap's own --die-with-parent, one run in ten left a process that waits for ever."""
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=True)
    survivors = [int(pid) for pid in done.stdout.split()]
    assert len(survivors) >= 24

    def running(pid):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return fields[0] != "Z" and b"bwrap" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    limit = time.monotonic() + 10
    while any(map(running, survivors)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert [pid for pid in survivors if running(pid)] == []
