"""The compute dtype follows from measured rates; the measurement gives plausible ones."""

import pytest
import torch

from bessemer.precision import probe


@pytest.mark.parametrize(
    ("full", "half", "dtype"),
    [
        (170.0, 87.0, torch.float32),  # a CPU that lists BF16 but has no matrix unit for it
        (100.0, 100.0, torch.float32),
        (100.0, 119.0, torch.float32),  # not worth the rounding
        (100.0, 121.0, torch.bfloat16),
        (60_000.0, 700_000.0, torch.bfloat16),
    ],
)
def test_bfloat16_must_be_clearly_faster(full, half, dtype):
    choice = probe.compute_dtype({"float32": full, "bfloat16": half})
    assert choice.dtype == dtype
    assert choice.why.startswith(str(dtype).removeprefix("torch."))
    assert f"float32 {full:.0f}, bfloat16 {half:.0f} GFLOPS" in choice.why, "the figures are told"


def test_rates_are_measured_for_both_dtypes():
    rates = probe.gemm_rates(seconds=0.02)
    assert list(rates) == ["float32", "bfloat16"]
    assert all(0.01 < rate < 1e7 for rate in rates.values())


def test_the_rate_is_that_of_the_fastest_run(monkeypatch):
    """Four runs of 4, 2, 1 and 3 ms on a made-up clock: 2 * 64^3 operations in 1 ms; the first two runs warm up."""
    now, took = [0.0], iter([0.009, 0.0001, 0.004, 0.002, 0.001, 0.003, 1.0])
    real = torch.mm

    def mm(*operands):
        now[0] += next(took)
        return real(*operands)

    monkeypatch.setattr(probe.torch, "mm", mm)
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    assert probe.gemm_rate(torch.float32, seconds=0.006, size=64) == pytest.approx(2 * 64**3 / 0.001 / 1e9)


def test_it_multiplies_in_the_dtype_asked_for(monkeypatch):
    seen = []
    real = torch.mm
    monkeypatch.setattr(probe.torch, "mm", lambda x, w: seen.append((x.dtype, w.dtype, x.shape)) or real(x, w))
    probe.gemm_rate(torch.bfloat16, seconds=0.0, size=32)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, (32, 32))}
