"""The compute dtype follows from measured rates, and the measurement gives plausible rates."""

import pytest
import torch

from bessemer import probe
from bessemer.errors import UserError
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
    choice = probe.compute_dtype({"float32": full, "bfloat16": half})
    assert choice.dtype == dtype
    assert choice.why.startswith(str(dtype).removeprefix("torch."))
    assert f"float32 {full:.0f}, bfloat16 {half:.0f} GFLOPS" in choice.why, "the figures are told"


def test_rates_are_measured_for_both_dtypes():
    rates = probe.gemm_rates(seconds=0.02)
    assert list(rates) == ["float32", "bfloat16"]
    assert all(0.01 < rate < 1e7 for rate in rates.values())


def test_the_rate_is_that_of_the_fastest_run(monkeypatch):
    """Four runs of 4, 2, 1 and 3 ms on a fake clock: 2 * 64^3 operations in 1 ms; the first two runs warm up."""
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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The files in which Linux describes a GPU, in a temporary folder."""
    folder = tmp_path / "nvidia" / "gpus" / "0000:3b:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 16\n")
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n"
    (tmp_path / "nvidia" / "version").write_text(text)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(probe, "DEVICES", tmp_path)
    monkeypatch.setattr(probe, "DRIVER", tmp_path / "nvidia")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    probe.idle_gpu.cache_clear()
    yield tmp_path
    probe.idle_gpu.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_a_gpu_that_torch_cannot_use_stops_a_run(machine, monkeypatch):
    with pytest.raises(UserError, match=r"NVIDIA H100 80GB HBM3 \(driver 535\.161\.08\) cannot be used: .*CUDA"):
        setup.device()
    probe.idle_gpu.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert setup.device().type == "cpu", "the user chose"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_a_host_s_gpu_that_this_container_may_not_open_is_none(machine):
    (machine / "nvidia0").unlink()
    assert probe.idle_gpu() is None and setup.device().type == "cpu"
