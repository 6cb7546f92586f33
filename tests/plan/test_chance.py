"""The planner's other layouts and its random draws, against sums by hand, counting and simulation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bessemer.cli import app
from bessemer.dist.mesh import Layout
from bessemer.dist.schedules import interleaved
from bessemer.dist.timeline import Costs, simulate
from bessemer.errors import UserError
from bessemer.plan import audit, chance, credibility, layer_kernels, layer_time
from bessemer.plan.hardware import Kernels, RateFactors, device, read_toml
from bessemer.plan.layer_time import layer_times
from bessemer.plan.step_time import step_time
from bessemer.plan.training_setup import ModelShape, Setup

LLAMA = ModelShape(128256, 8192, 80, 80, 28672, heads=64, kv_heads=8)
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
    latents = replace(audit.v3().setup, cp=4)
    assert layer_time.context_messages(on, latents, False)[0] == 3 * 1024 * 2 * (512 + 64)


def test_split_layers_do_the_same_work():
    """All ranks of a tensor- or context-parallel group together do as many FLOPs as one rank without it."""
    whole = layer_kernels.attend(LLAMA, 8192, 8192, False, gated=False) + layer_kernels.dense(LLAMA, 8192, False)
    for tp, cp in ((4, 1), (1, 4), (2, 4)):
        own = 8192 // (tp * cp)
        part = layer_kernels.attend(LLAMA, own, 8192, False, False, tp, cp) + layer_kernels.dense(LLAMA, own, False, tp)
        assert tp * cp * part.flops == pytest.approx(whole.flops)
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


def test_whole_layers_made_again():
    """Backward repeats the forward, messages included."""
    for setup in (audit.v3().setup, replace(PLAIN, tp=4)):
        dense = not setup.shape.experts
        plain, again = layer_times(setup, dense, 0), layer_times(replace(setup, recompute=("layer",)), dense, 0)
        assert again.input == pytest.approx(plain.input + plain.forward)
        assert (again.forward, again.weight) == (plain.forward, plain.weight)


def test_slower_rates_take_longer_in_proportion():
    on, slow = Kernels.of(device("H800")), Kernels.of(device("H800"), 0, RateFactors(0.5, 0.5, 0.5, 0.5))
    ops = layer_kernels.attend(LLAMA, 8192, 8192, False, gated=False).forward
    for op in ops:
        assert slow.seconds(op) - 5e-6 == pytest.approx(2 * (on.seconds(op) - 5e-6))
    assert slow.exchange(1e9, 64, "combine", True) == pytest.approx(2 * on.exchange(1e9, 64, "combine", True), rel=1e-3)


def test_draws_have_their_distribution():
    values = chance.draw(1000, 3)
    for one in read_toml("ranges.toml")["input"]:
        drawn = values[one["name"]]
        if "chance" in one:
            assert drawn.mean() == pytest.approx(one["chance"], abs=0.002)
            continue
        low, mode, high = one["low"], one["mode"], one["high"]
        assert low <= drawn.min() and drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + mode + high) / 3, rel=1e-3)
        below = np.mean(drawn < mode)
        assert below == pytest.approx((mode - low) / (high - low), abs=0.002), "every share is drawn once"
    again, other = chance.draw(1000, 3), chance.draw(1000, 4)
    assert all((values[name] == again[name]).all() for name in values) and (values["gemm"] != other["gemm"]).any()


def test_many_steps_at_once_are_steps_one_by_one():
    v3 = audit.v3().setup
    shared = (replace(v3, layout=Layout(4, 2, 64), micro=8), replace(PLAIN, schedule="interleaved", slices=5, tp=2))
    for setup in shared:
        setups = list(chance.drawn(setup, chance.draw(5, 0), setup.shape.experts > 0))
        alone = [step_time(one).seconds for one in setups]
        assert chance.step_seconds(setups).tolist() == pytest.approx(alone, rel=1e-12)


def test_the_interval_of_one_more_covers():
    """In 4,000 simulated records of eight runs, 90 % of ninth runs fall inside the interval."""
    generator = np.random.default_rng(0)
    runs = np.exp(generator.normal(-0.3, 0.2, (4000, 9)))
    inside = [chance.next_one(list(eight)).holds(ninth) for *eight, ninth in runs]
    assert np.mean(inside) == pytest.approx(0.90, abs=0.015)


def test_what_matters_and_where_a_figure_lies():
    x = np.arange(100.0)
    assert chance.rank_correlation(x, x**3) == pytest.approx(1) and chance.rank_correlation(x, -x) == pytest.approx(-1)
    assert chance.percentile(x, 18.0) == 18
    assert chance.Quantiles.of(x) == chance.Quantiles(*np.quantile(x, (0.05, 0.5, 0.95)).tolist())


def test_the_credibility_of_the_published_cost(monkeypatch):
    """Reproducible, and honest about how it does on its own test."""
    small = {name: {"run": read_toml(name)["run"][:2]} for name in ("validation.toml", "heldout.toml")}
    monkeypatch.setattr(credibility, "read_toml", lambda name: small.get(name) or read_toml(name))
    call = ["plan", "--audit", "deepseek-v3", "--draws", "20", "--seed", "5"]
    facts = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)
    credibility.credibility.cache_clear()
    credibility.inside_view.cache_clear()
    assert json.loads(CliRunner().invoke(app, [*call, "--json"]).output) == facts
    inside = facts["inside_million_gpu_hours"]
    assert 2 < inside["low"] < inside["median"] < inside["high"] < 6 and facts["published_million_gpu_hours"] == 2.664
    assert sum(one["variance"] for one in facts["inputs"]) == pytest.approx(100)
    twice = facts["would_have_to_be_false"][0]
    assert twice["million_gpu_hours"] == 2 * 2.664
    assert twice["tokens_per_second_per_gpu"] == pytest.approx(14.8e12 / (2 * 2.664e6 * 3600))
    assert {one["seen_before"] for one in facts["other_runs"]} == {True, False}
    said = CliRunner().invoke(app, call).output
    assert "what would" not in said and "The draws fail this test" in said and "Llama 4 Scout" in said
    with pytest.raises(UserError, match="an interval needs at least 20"):
        credibility.credibility("deepseek-v3", 3, 0)
    with pytest.raises(UserError, match="did you mean deepseek-v3"):
        credibility.credibility("deepseek-v4", 100, 0)


def test_test_runs_are_apart():
    """No run is used both for tuning and for the test, and no range has a test run as its source."""
    seen, test = (read_toml(name)["run"] for name in ("validation.toml", "heldout.toml"))
    assert not {(run["source"], run["tokens_s"]) for run in seen} & {(run["source"], run["tokens_s"]) for run in test}
    assert len(test) == 16 and all({"source", "assumed"} <= run.keys() for run in test)
    assert all(one["source"] for one in read_toml("ranges.toml")["input"])
