"""FP8 weights are quantised once per optimizer step: same bits, and never a stale operand after weights changed."""

from types import SimpleNamespace

import pytest
import tiny_run
import torch

from bessemer.addons.accelerate.precision import weights
from bessemer.addons.accelerate.precision.fp8_layers import set_fp8
from bessemer.addons.accelerate.precision.fp8_linear import PAPER, FP8Recipe
from bessemer.addons.accelerate.precision.operand import quantise, transpose
from bessemer.addons.accelerate.precision.weights import KEPT
from bessemer.workers import side_by_side

torch.set_num_threads(1)
MATRICES = 2 * 5 + 2 + 2 * (2 + 2) + 5
"""Attention of two layers and the MTP module; a dense FFN in one, experts with a shared expert in the other two."""


@pytest.fixture
def quantised(monkeypatch):
    """The ids of quantised weights, one entry per quantisation."""
    names = []
    original = FP8Recipe.quantised_weight
    monkeypatch.setattr(FP8Recipe, "quantised_weight", lambda self, w: names.append(id(w)) or original(self, w))
    return names


def steps(number: int = 3, copies: int | None = None, dtype=torch.float32, forget: bool = False, **changes):
    """A trainer after some steps of two micro-batches, and the gradient norm and losses of each step."""
    network = set_fp8(tiny_run.model(), PAPER)
    training = tiny_run.trainer(network, compute_dtype=dtype, **changes)
    if forget:
        for parameter in network.parameters():
            parameter.__dict__.pop(KEPT, None)
    if copies is not None:
        training.optimizer.kept.copies = copies
    metrics = []
    for step in range(number):
        parts = [tiny_run.batches(8 * step + first, 4) for first in (0, 4)]
        values = training.update(parts)
        metrics.append([values["train/grad_norm"], *(v for k, v in sorted(values.items()) if "loss" in k)])
    return training, metrics


def same_weights(a, b):
    for (name, own), other in zip(a.model.named_parameters(), b.model.parameters(), strict=True):
        assert torch.equal(own, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_quantised_once_a_step_with_the_same_bits(quantised, dtype):
    fresh, expected = steps(dtype=dtype, forget=True)
    # two micro-batches, forward and backward; recomputation adds the two up-projections of attention
    assert len(quantised) == 3 * 2 * (2 * MATRICES + 3 * 2)
    quantised.clear()
    kept, metrics = steps(dtype=dtype)
    assert len(quantised) == 3 * MATRICES and len(set(quantised)) == MATRICES
    assert metrics == expected
    same_weights(kept, fresh)
    assert kept.optimizer.kept.nbytes == 0, "nothing is held between the last backward and the next forward"


def test_helper_processes_see_that_weights_changed():
    """A helper's cached operands must follow the weights in shared memory."""
    alone, expected = steps()
    workers = side_by_side(2)
    try:
        helped, metrics = steps(workers=workers)
        assert metrics == expected
        same_weights(helped, alone)
    finally:
        workers.stop()


def operand_of(training):
    weight = training.model.layers[1].ffn.experts.w13
    operand, turned = weights.operand(weight, PAPER), weights.turned(weight, PAPER)
    fresh = quantise(weight, "block")
    for actual, expected in ((operand, fresh), (turned, transpose(fresh))):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(actual, expected, strict=True))
    return operand, turned


def test_writes_to_the_weights_are_noticed(tmp_path, quantised):
    training, _ = steps(1, state_dir=tmp_path, ema_decay=0.5, copies=2)
    weight, optimizer = training.model.layers[1].ffn.experts.w13, training.optimizer
    first, turned = operand_of(training)
    assert turned.value_MK.is_contiguous()
    quantised.clear()
    assert operand_of(training)[1] is turned and not quantised
    training.save()
    training.finish()
    with optimizer.averaged():
        assert operand_of(training)[0] is not first

    def through_masters():
        optimizer.masters()["layers.1.ffn.experts.w13"].mul_(2)
        optimizer.refresh()

    for change in (
        lambda: optimizer.step(1e-2, 1.0, 1.0, 1.0),
        through_masters,
        training._restore_latest,
        lambda: weight.detach().mul_(3),
        lambda: setattr(weight, "data", weight.data.clone()),
    ):
        before = operand_of(training)[0]
        change()
        assert operand_of(training)[0] is not before
    with torch.no_grad():
        weight[0, 0, 0] = float("nan")
    assert weights.operand(weight, PAPER).dequantise().isnan().any()
    assert weights.operand(weight, FP8Recipe(power_of_two=True)).scale_MJ is not weights.operand(weight, PAPER).scale_MJ
    training.close()


def test_quantised_weights_are_kept_only_if_they_fit(monkeypatch):
    """None in the first step, then as many copies as fit beside that step's peak, and fewer if the peak grows."""
    assert [weights.fitting(room, 10) for room in (-5, 9, 10, 25, 99)] == [0, 0, 1, 2, 2]
    memory = SimpleNamespace(peak=60.0, free=30.0, reserved=64.0, total=100.0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory.peak)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: memory.reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory.free, memory.total))
    weights_kept = weights.KeptWeights([torch.empty(128, 128, device="meta")])
    weights_kept._device = torch.device("cuda")
    assert weights_kept.copies == 0
    weights_kept.drop()
    assert weights_kept.copies == 0 and not weights_kept._peak, "nothing was asked for yet"
    weights_kept._sizes[0] = 12  # 94 - 6 - 60 = 28 remain
    weights_kept.drop()
    assert weights_kept.copies == 2
    weights_kept.drop()
    assert weights_kept.copies == 2
    memory.peak = 80.0
    weights_kept.drop()
    assert weights_kept.copies == 0
    memory.peak = 81.0
    weights_kept._sizes[0] = 1
    weights_kept.drop()
    assert weights_kept.copies == 0, "what was too much once is not tried again"
