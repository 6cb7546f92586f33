"""Pipelines whose stages sleep: which sleeps when, and that the real executor is no faster than its table."""

from contextlib import nullcontext

import pytest
import torch

from bessemer.addons.accelerate.kernels.deferred import Store
from bessemer.addons.distributed.chunk import Chunk, Serial
from bessemer.addons.distributed.schedules import schedule
from bessemer.addons.distributed.timeline import Costs, simulate
from bessemer_claims import pipelines
from bessemer_claims.pipelines import Case, SleepingStage


def test_a_stage_sleeps_a_unit_in_f_in_i_and_in_w(monkeypatch):
    slept = []
    monkeypatch.setattr(pipelines.time, "sleep", slept.append)
    part, store = SleepingStage(1, 3, unit=8.0, exchange=0.5), Store()
    store.serve(part)
    x = torch.zeros(1, pipelines.WIDTH, requires_grad=True)
    chunk = Chunk(part.phases(x, torch.zeros(1, 1)), Serial())
    list(chunk.forward())
    assert slept == [4.0, 0.5, 4.0, 0.5]
    slept.clear()
    list(chunk.backward(torch.ones(1, pipelines.WIDTH), lambda: store.open("first")))
    assert slept == [0.5, 4.0, 0.5, 4.0] and torch.equal(x.grad, torch.ones(1, pipelines.WIDTH))
    slept.clear()
    store.run("first")
    assert slept == [4.0, 4.0]
    slept.clear()
    chunk = Chunk(part.phases(x, torch.zeros(1, 1)), Serial())
    list(chunk.forward())
    list(chunk.backward(torch.ones(1, pipelines.WIDTH), nullcontext))
    assert sum(slept) == 8 + 1 + 8 + 1 + 8  # backward (B) is input gradients (I) plus weight gradients (W)


def test_idle_is_waiting_and_the_ends():
    first, second = [(0.0, 1.0, 0.0), (1.0, 3.0, 1.0)], [(1.0, 2.0, 0.5), (2.0, 4.0, 0.0)]
    timed = pipelines._timed([first, second])
    assert timed.seconds == 4.0 and timed.idle == pytest.approx(1 - (2 + 2.5) / 8)
    assert pipelines.expected("1f1b", 8, 20) == pytest.approx(7 / 27)
    assert pipelines.expected("gpipe", 8, 20) == pytest.approx(7 / 27)


def test_real_processes_take_no_less_than_the_table():
    cases = [Case("1f1b"), Case("dualpipe", 0.002), Case("dualpipe", 0.002, overlap=True)]
    spans = pipelines.measure(2, 4, 0.004, cases)
    for case, timed in zip(cases, spans, strict=True):
        least = simulate(schedule(case.schedule, 2, 4), Costs(1, 1, 1)).makespan
        assert timed.seconds >= 0.004 * least and 0 <= timed.idle < 1
