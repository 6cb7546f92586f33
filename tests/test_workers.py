"""Worker processes: order, errors, sudden deaths, and results independent of their number."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_config import train_config

from bessemer.addons.accelerate.helpers import Helpers, rank
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.system import can_fork
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer
from bessemer.workers import cores, shares

pytestmark = pytest.mark.skipif(not can_fork(), reason="one process does all the work on this system")
torch.set_num_threads(1)  # as every process of Helpers has


@pytest.mark.parametrize("n", [1, 2, 3])
def test_map_keeps_the_order_though_later_items_finish_first(n):
    def work(i):
        time.sleep(0.02 if i % 2 == 0 else 0.0)
        return i * i

    assert list(Helpers(n).map(work, range(7))) == [i * i for i in range(7)]


def test_two_workers_really_run_side_by_side():
    """Each waits for the other; run one after the other they would wait forever."""
    meeting = multiprocessing.get_context("fork").Barrier(2, timeout=10)
    assert len(list(Helpers(2).map(lambda i: meeting.wait(), range(2)))) == 2


def test_a_worker_error_is_raised_with_the_results_and_the_next_call_works():
    def work(i):
        if i == 1:
            raise ValueError("item 1")
        return i

    workers = Helpers(2)
    results = workers.map(work, range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(results)
    assert list(workers.map(work, [5, 7])) == [5, 7]


def test_a_killed_worker_is_a_clear_error_and_the_next_call_has_a_new_one():
    def work(i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    workers = Helpers(2)
    with pytest.raises(UserError, match=r"killed by SIGKILL.*micro_rows"):
        list(workers.map(work, range(2)))
    assert list(workers.map(work, [2, 3])) == [2, 3]


def test_helpers_see_shared_tensors_change_and_nothing_else():
    shared, private = torch.zeros(3), torch.zeros(3)
    view = shared[1:]
    workers = Helpers(2)
    workers.share([shared])
    assert view.data_ptr() == shared.data_ptr() + 4

    def work(i):
        return rank(), view.tolist(), private.tolist()

    list(workers.map(work, range(2)))
    shared += 1
    private += 1
    assert list(workers.map(work, range(2))) == [(0, [1, 1], [1, 1, 1]), (1, [1, 1], [0, 0, 0])]


def test_without_shared_memory_one_process_does_all_the_work(monkeypatch):
    monkeypatch.setattr("bessemer.addons.accelerate.shared_memory.SHARED", "/nowhere")
    workers, threads = Helpers(2), torch.get_num_threads()
    try:
        with pytest.warns(UserWarning, match="shm-size"):
            workers.share([torch.zeros(3)])
        assert workers.n == 1 and torch.get_num_threads() == 2
        assert list(workers.map(lambda i: rank(), range(3))) == [0, 0, 0]
    finally:
        torch.set_num_threads(threads)


PARENT = """
import os, sys, time
from bessemer.addons.accelerate.helpers import Helpers
workers = Helpers(3)
print(*list(workers.map(lambda i: os.getpid(), range(3))), flush=True)
time.sleep(60)
"""


def test_helpers_end_with_their_parent_however_it_dies():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(set(pids)) == 3 and parent.pid in pids
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while any(running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for pid in pids if running(pid)]


PIDS = """
import gc, os, sys, time
from bessemer.addons.accelerate.helpers import Helpers
def pid(_): return os.getpid()
def runs(one): return os.path.exists(f"/proc/{one}") and "State:\\tZ" not in open(f"/proc/{one}/status").read()
class Model: pass
model, workers = Model(), Helpers(3)
found = list(workers.map(pid, range(3)))
model.workers, workers.model = workers, model
pipes, late = [helper._pipe for helper in workers._helpers], [model]
del model, workers
gc.collect()  # what only `late` leads to is put behind the pipes in the order of finalising
del pipes
sys.unraisablehook = lambda unraisable: print("unraisable", unraisable.exc_value)
pids = [one for one in found if one != os.getpid()]
if os.fork() == 0:  # garbage of a fork is not its own
    del late; gc.collect(); os._exit(0)
os.wait()
time.sleep(0.3)  # a kill takes its time
print("alive" if all(map(runs, pids)) else "killed by a fork")
del late
gc.collect()
print("left" if any(map(runs, pids)) else "ended")
"""


def test_garbage_ends_its_helpers_once_and_a_fork_never_does():
    """A released model's workers are in a reference cycle; a pipe closed twice may by then belong to someone else."""
    done = subprocess.run([sys.executable, "-c", PIDS], capture_output=True, text=True)
    assert (done.stdout.split("\n"), done.stderr) == (["alive", "ended", ""], "")


def running(pid):
    """Whether the process runs; zombies not yet reaped do not count."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_cores_follow_the_users_setting(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cores() >= 1


def trained(workers, steps=3, optimizer="adamw"):
    cfg = preset("tiny", vocab_size=128, dim=32, n_layers=2, n_heads=2, inter_dim=64, moe_inter_dim=16)
    model = Transformer(cfg).initialise(0)
    config = train_config(
        tokens=1, lr=1e-2, gamma=1e-3, batch_rows=6, micro_rows=2, workers=workers,
        terms={"mtp_lambda": 0.3, "balance_alpha": 1e-3}, optimizer=optimizer,
    )  # fmt: skip
    trainer = Trainer(model, next_token, None, *config)
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(steps):
        tokens = torch.randint(0, 128, (6, 24), generator=generator)
        weight = torch.ones(6, 24)
        weight[:, 0] = 0
        trainer.update(Batch(tokens, weight).micro(2))
        loads.append({name: load.clone() for name, load in trainer.loads.items()})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loads


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_is_bitwise_the_same_with_any_number_of_workers(optimizer):
    weights_1, one_loads = trained(Helpers(1), optimizer=optimizer)
    weights_2, two_loads = trained(Helpers(2), optimizer=optimizer)
    assert torch.equal(weights_1, weights_2)
    for a, b in zip(one_loads, two_loads, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_every_token_is_counted_once():
    _, loads = trained(Helpers(2))
    # 6 rows x 24 tokens x 4 experts per layer; the MTP module sees one token fewer per row
    assert loads[0]["1"].sum() == 6 * 24 * 4
    assert loads[0]["mtp0"].sum() == 6 * 23 * 4


def test_shares_have_about_equal_cost_and_cover_everything():
    costs = [1, 16, 1.5, 16, 1.5, 16, 4, 10, 9, 9]
    for n in (1, 2, 3, 20):
        lists = shares(costs, n)
        assert sorted(item for share in lists for item in share) == list(range(len(costs)))
        sums = [sum(costs[item] for item in share) for share in lists]
        assert len(lists) == min(n, len(costs)) and (n == 20 or max(sums) - min(sums) <= 2)
