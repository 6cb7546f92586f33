"""A GPU that torch cannot use."""

import pytest
import torch

from bessemer import probe
from bessemer.errors import UserError
from bessemer.train import setup


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
    with pytest.raises(UserError, match=r"NVIDIA H100 80GB HBM3 \(driver 535\.161\.08\).*CUDA"):
        setup.device()
    probe.idle_gpu.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert setup.device().type == "cpu", "the user chose"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's GPU")
def test_gpus_the_container_cannot_open_do_not_count(machine):
    (machine / "nvidia0").unlink()
    assert probe.idle_gpu() is None and setup.device().type == "cpu"
