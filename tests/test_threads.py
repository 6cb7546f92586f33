"""Threads with one core each: order, errors, and results that do not depend on how many there are."""

import threading
import time

import pytest
import torch

from bessemer.data.batch import Batch
from bessemer.model.presets import preset
from bessemer.model.transformer import Transformer
from bessemer.threads import Workers, cores
from bessemer.train.objective import next_token
from bessemer.train.settings import Settings
from bessemer.train.trainer import Trainer


@pytest.mark.parametrize("n", [1, 2, 3])
def test_map_keeps_the_order_though_later_items_finish_first(n):
    def work(i):
        time.sleep(0.02 if i % 2 == 0 else 0.0)
        return i * i

    assert list(Workers(n).map(work, range(7))) == [i * i for i in range(7)]


def test_two_workers_really_run_side_by_side():
    meeting = threading.Barrier(2, timeout=10)
    assert len(list(Workers(2).map(lambda i: meeting.wait(), range(2)))) == 2


def test_an_error_of_a_worker_is_raised_where_the_results_are_taken():
    def work(i):
        if i == 1:
            raise ValueError("item 1")
        return i

    results = Workers(2).map(work, range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="item 1"):
        next(results)


def test_cores_follow_the_users_setting(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert cores() >= 1


def constant(value):
    return lambda tokens, step: value


def trained(workers, steps=3):
    cfg = preset("tiny", vocab_size=128, dim=32, n_layers=2, n_heads=2, inter_dim=64, moe_inter_dim=16)
    model = Transformer(cfg).initialise(0)
    settings = Settings(
        tokens=1, lr=constant(1e-2), gamma=constant(1e-3), batch_rows=constant(6), micro_rows=2, workers=workers,
        terms={"mtp_lambda": constant(0.3), "balance_alpha": constant(1e-3)},
    )  # fmt: skip
    trainer = Trainer(model, next_token, None, settings)
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(steps):
        tokens = torch.randint(0, 128, (6, 24), generator=generator)
        weight = torch.ones(6, 24)
        weight[:, 0] = 0
        trainer.update(Batch(tokens, weight).micro(2))
        loads.append({name: load.clone() for name, load in trainer.loads.items()})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loads


def test_training_is_bitwise_the_same_with_any_number_of_workers():
    one, one_loads = trained(Workers(1))
    two, two_loads = trained(Workers(2))
    assert torch.equal(one, two)
    for a, b in zip(one_loads, two_loads, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_with_workers_equals_plain_accumulation():
    plain, plain_loads = trained(None)
    found, loads = trained(Workers(2))
    assert ((plain - found).norm() / plain.norm()) < 1e-5
    # 6 rows x 24 tokens x 4 experts a layer, counted once; the MTP module sees one token less a row
    assert loads[0]["1"].sum() == plain_loads[0]["1"].sum() == 6 * 24 * 4
    assert loads[0]["mtp0"].sum() == 6 * 23 * 4
