"""The planner's other layouts, against sums by hand, counting and simulation."""

from dataclasses import replace

import pytest

from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.schedules import interleaved
from bessemer.addons.distributed.timeline import Costs, simulate
from bessemer.addons.plan import layer_kernels, layer_time
from bessemer.addons.plan.hardware import Kernels, RateFactors, device
from bessemer.addons.plan.layer_time import layer_times
from bessemer.addons.plan.step_time import step_time
from bessemer.addons.plan.training_setup import ModelShape, Setup
from bessemer.model.config import preset

LLAMA = ModelShape(128256, 8192, 80, 80, 28672, heads=64, kv_heads=8)
V3 = Setup(ModelShape.of(preset("v3")), Layout(16, 2, 64), device("H800"), "dualpipe", 120)
PLAIN = Setup(LLAMA, Layout(8, 8), device("H100"), "1f1b", 16, 1, 8192)


class Counting(Kernels):
    """Counts the bytes that a rank receives in collectives, at a byte a second."""

    def collective(self, bytes_, ranks, per_node):
        return bytes_ * (ranks - 1) / ranks


def test_bytes_of_tensor_parallelism():
    """Counted part by part: a gather brings the rows of three others, a reduce-scatter their sums for its own."""
    on, setup = Counting(device("H100"), 132), replace(PLAIN, tp=4)
    own, dim = 8192 // 4, 8192
    gather = scatter = sum(2 * own * dim for _ in range(3))
    forward, backward, weight = layer_time.tensor_messages(on, setup, False)
    assert (forward, backward, weight) == (gather + scatter, gather + scatter, gather)
    assert layer_time.tensor_messages(on, setup, True)[1] == 2 * (gather + scatter)
    assert layer_time.tensor_messages(on, replace(setup, tp_overlap=True), False)[0] == (gather + scatter) / 4


def test_bytes_of_context_parallelism():
    on, rows = Counting(device("H100"), 132), 8192 // 4
    keys_and_values = 2 * 8 * (128 + 128)  # bytes per token: 8 heads in BF16
    assert layer_time.context_messages(on, replace(PLAIN, cp=4), False)[:2] == (
        3 * rows * keys_and_values, 2 * 3 * rows * keys_and_values
    )  # fmt: skip
    latents = replace(V3, cp=4)
    assert layer_time.context_messages(on, latents, False)[0] == 3 * 1024 * 2 * (512 + 64)


def test_split_layers_do_the_same_work():
    """All ranks of a tensor- or context-parallel group together do as many FLOPs as one rank without it."""
    unsplit = layer_kernels.attend(LLAMA, 8192, 8192, False, gated=False) + layer_kernels.dense(LLAMA, 8192, False)
    for tp, cp in ((4, 1), (1, 4), (2, 4)):
        own = 8192 // (tp * cp)
        part = layer_kernels.attend(LLAMA, own, 8192, False, False, tp, cp) + layer_kernels.dense(LLAMA, own, False, tp)
        assert tp * cp * part.flops == pytest.approx(unsplit.flops)
    for tp, cp in ((2, 1), (1, 2), (2, 2)):
        split = replace(PLAIN, tp=tp, cp=cp, micro=16 * tp * cp)
        assert split.step_tokens == PLAIN.step_tokens and split.piece == 8 // (tp * cp)


def test_interleaving_divides_the_bubble():
    """(P - 1)(F + B) / V, counted in the executor's own table (Narayanan et al. 2021, 2.2)."""
    for slices in (2, 4, 8):
        timeline = simulate(interleaved(8, 32, slices), Costs(1 / slices, 1 / slices, 1 / slices))
        assert max(timeline.idle) == pytest.approx(7 * 3 / slices)
    bubbles = [step_time(replace(PLAIN, schedule="interleaved", slices=slices)).parts["bubble"] for slices in (2, 5)]
    assert bubbles[1] < bubbles[0] < step_time(PLAIN).parts["bubble"]


def test_recomputing_whole_layers():
    """Backward repeats the forward, messages included."""
    for setup in (V3, replace(PLAIN, tp=4)):
        dense = not setup.shape.experts
        plain, recomputed = layer_times(setup, dense, 0), layer_times(replace(setup, recompute=("layer",)), dense, 0)
        assert recomputed.input == pytest.approx(plain.input + plain.forward)
        assert (recomputed.forward, recomputed.weight) == (plain.forward, plain.weight)


def test_slower_rates_take_longer_in_proportion():
    on, slow = Kernels.of(device("H800")), Kernels.of(device("H800"), 0, RateFactors(0.5, 0.5, 0.5, 0.5))
    ops = layer_kernels.attend(LLAMA, 8192, 8192, False, gated=False).forward
    for op in ops:
        assert slow.seconds(op) - 5e-6 == pytest.approx(2 * (on.seconds(op) - 5e-6))
    assert slow.exchange(1e9, 64, "combine", True) == pytest.approx(2 * on.exchange(1e9, 64, "combine", True), rel=1e-3)
