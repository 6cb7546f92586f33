"""The compute dtype follows from measured rates, and the measurement gives plausible rates."""

import shutil

import pytest
import tiny_run
import torch

from bessemer.addons.accelerate import measured
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.train import setup


@pytest.mark.parametrize(
    ("full", "half", "dtype"),
    [
        (170.0, 87.0, torch.float32),  # a CPU that lists BF16 but has no matrix unit for it
        (100.0, 100.0, torch.float32),
        (100.0, 119.0, torch.float32),  # too little gain for the rounding
        (100.0, 121.0, torch.bfloat16),
        (60_000.0, 700_000.0, torch.bfloat16),
    ],
)
def test_bfloat16_must_be_clearly_faster(full, half, dtype):
    choice = measured.compute_dtype({"float32": full, "bfloat16": half})
    assert choice.dtype == dtype
    assert choice.why.startswith(str(dtype).removeprefix("torch."))
    assert f"float32 {full:.0f}, bfloat16 {half:.0f} GFLOPS" in choice.why, "the figures are told"


def test_rates_are_measured_for_both_dtypes():
    rates = measured.gemm_rates(seconds=0.02)
    assert list(rates) == ["float32", "bfloat16"]
    assert all(0.01 < rate < 1e7 for rate in rates.values())


def test_the_rate_matches_that_of_the_fastest_run(monkeypatch):
    """Four runs of 4, 2, 1 and 3 ms on a fake clock: 2 * 64^3 operations in 1 ms; the first two runs warm up."""
    now, took = [0.0], iter([0.009, 0.0001, 0.004, 0.002, 0.001, 0.003, 1.0])
    real = measured.multiply

    def multiply(*operands):
        now[0] += next(took)
        return real(*operands)

    monkeypatch.setattr(measured, "multiply", multiply)
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    assert measured.gemm_rate(torch.float32, seconds=0.006, size=64) == pytest.approx(2 * 64**3 / 0.001 / 1e9)


def test_products_use_the_requested_dtype(monkeypatch):
    dtypes = []
    real = measured.multiply
    monkeypatch.setattr(measured, "multiply", lambda x, w: dtypes.append((x.dtype, w.dtype, x.shape)) or real(x, w))
    measured.gemm_rate(torch.bfloat16, seconds=0.0, size=32)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16, (32, 32))}


def test_a_resume_keeps_the_dtype_that_was_measured_when_the_stage_began(monkeypatch, tmp_path):
    def attempt(steps, bf16_rate):
        monkeypatch.setattr(measured, "gemm_rates", lambda device: {"float32": 100.0, "bfloat16": bf16_rate})
        network, messages = tiny_run.model(), []
        config = PretrainConfig(kind="pretrain", lr=Points(1e-3), precision="auto")
        dtype = setup.set_precision(network, config, messages.append, tmp_path)
        tiny_run.trainer(network, steps, tmp_path, compute_dtype=dtype).run()
        return dtype, messages[0]

    assert attempt(1, 121.0)[0] == torch.bfloat16
    dtype, line = attempt(2, 119.0)
    assert dtype == torch.bfloat16 and "bfloat16 (as when the stage began)" in line
    assert setup.choose_precision("device", state=tmp_path).dtype == torch.float32
    shutil.rmtree(tmp_path)
    assert measured.kept_precision(tmp_path) is None
    measured.keep_precision(tmp_path, setup.choose_precision("bfloat16"))
    assert setup.choose_precision("auto", state=tmp_path).dtype == torch.bfloat16, "without any checkpoint, too"
