"""Copying batches to a GPU: nothing waits, and no memory is released too early. (torch.cuda is a mock that logs.)"""

import contextlib
from dataclasses import replace

import pytest
import torch
from tiny_run import batches

from bessemer.addons.accelerate.transfer import Transfer
from bessemer.data.batch import Batch, Counted
from bessemer.model import segments
from bessemer.model.segments import Packed

GPU = torch.device("cuda")


def full_batch():
    """A batch with every optional tensor."""
    batch = batches(0, 2)
    numbers = torch.zeros(2, 16, dtype=torch.int64)
    packed = Packed.of(numbers, torch.device("cpu"))
    extras = {"advantage_BT": torch.ones(2, 16), "topk": torch.ones(2, 16, 3)}
    return replace(
        batch, segments_BT=numbers, extras=extras, own_T=torch.arange(16), before=Counted(batch.trained_N, packed)
    )


def test_the_copy_runs_beside_the_computation(monkeypatch):
    log, current = [], ["computing"]

    class Stream:
        def __init__(self, name="side"):
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        current[0] = stream.name
        yield
        current[0] = "computing"

    sent = full_batch()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(Batch, "to", lambda batch, device: (log.append(f"copy on {current[0]}"), batch)[1])
    recorded = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((id(tensor), stream.name))
    )
    transfer = Transfer(GPU)
    assert transfer(sent) is sent and transfer(sent) is sent
    assert log == ["copy on side", "computing waits for side"] * 2
    tensors = [sent.tokens_BT, sent.loss_BT, sent.segments_BT, *sent.extras.values(), sent.own_T, sent.before.trained_N,
            sent.before.segments.segments_BT, sent.before.segments.end_S]  # fmt: skip
    assert recorded == [(id(tensor), "computing") for tensor in tensors] * 2


def test_every_tensor_leaves_from_pinned_memory(monkeypatch):
    """Every tensor is copied once, from pinned memory and without waiting; any other copy fails the test."""
    pinned = []

    class Pinned:
        def __init__(self, tensor):
            self.tensor = tensor

        def to(self, device, non_blocking=False):
            assert device == GPU and non_blocking
            pinned.append(self.tensor)
            return self.tensor

    sent = full_batch()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: Pinned(tensor))
    monkeypatch.setattr(torch.Tensor, "to", lambda *arguments, **options: pytest.fail("a copy that waits"))
    there = sent.to(GPU)
    assert len(pinned) == len(list(there.tensors())) and there.before is not None
    assert segments.moved(torch.ones(0), GPU).shape == (0,)


def test_on_a_cpu_nothing_happens():
    sent = batches(0, 2)
    there = Transfer(torch.device("cpu"))(sent)
    assert there.tokens_BT is sent.tokens_BT and there.before is None
