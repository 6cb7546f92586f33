"""Traces of selected steps, and how a GPU's metrics are computed."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_run import model, trainer

from bessemer.addons.accelerate.instruments import PHASES, Instruments, named_phases, peak_flops
from bessemer.addons.accelerate.precision.weights import KeptWeights
from bessemer.model.accounting import flops_per_token


@pytest.mark.parametrize(
    ("card", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H800", 989.4), ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("AMD Instinct MI300X", 1307.4), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_match_those_of_the_card_and_of_no_other(card, tera):
    assert peak_flops(card) == (None if tera is None else pytest.approx(tera * 1e12))


def test_named_steps_leave_a_trace(tmp_path):
    """Only the selected steps do. The trace has the five phases of every layer, and the results stay the same."""
    messages = []
    plain = trainer(steps=3)
    plain.run()
    run = trainer(steps=3, state_dir=tmp_path, profile_steps=[2, 9], warn=messages.append)
    run.run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-00000002.json.gz"]
    assert len(messages) == 1 and "step 2 traced" in messages[0]
    with gzip.open(tmp_path / "profile" / "step-00000002.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {f"layers.1.{phase}" for phase in PHASES} <= names and names & {"aten::mm", "Product"}
    assert not [layer for layer in run.model.layers if set(vars(layer)) & set(PHASES)]
    for name, value in plain.optimizer.masters().items():
        assert torch.equal(value, run.optimizer.masters()[name]), name


def test_ranges_of_nvidias_tools(monkeypatch):
    ranges = []

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            ranges.append(self.name)

        def __exit__(self, *error):
            ranges.append(f"end of {self.name}")

    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    network = model(n_mtp=0)
    network.layers[0].compile(backend="eager")
    with named_phases(network, nvtx=True):
        network(torch.zeros(1, 8, dtype=torch.int64))
    assert ranges == [text for phase in PHASES for text in (f"layers.1.{phase}", f"end of layers.1.{phase}")], (
        "a compiled layer has none"
    )


def test_metrics_of_a_gpu(monkeypatch):
    """MFU of two cards that together compute at half the peak of one."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 2})
    network, config = model(), trainer().config
    instruments = Instruments(config, network, torch.device("cuda"), torch.bfloat16, None, print, devices=2)
    flops = flops_per_token(network.cfg, 16, mtp=True).training
    values = instruments.values(tokens=1600, rows=100, mtp=True, seconds=1600 * flops / (0.5 * 989.4e12))
    assert values == {"gpu/memory_gib": 3.0, "gpu/allocator_retries": 2.0, "gpu/mfu": pytest.approx(0.25)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    unknown = Instruments(config, network, torch.device("cuda"), torch.bfloat16, None, print)
    assert "gpu/mfu" not in unknown.values(1600, 100, True, 1.0)
    on_cpu = Instruments(config, network, torch.device("cpu"), torch.float32, None, print)
    assert on_cpu.values(1600, 100, True, 1.0) == {}


def test_a_step_has_its_own_peak_of_memory(monkeypatch):
    """Whatever filled the card before, such as rollouts; FP8 weights are then kept in what the step leaves free."""
    card = SimpleNamespace(peak=76 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(card, "peak", 20 << 30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: card.peak)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 << 30)
    instruments = Instruments(trainer().config, model(), torch.device("cuda"), torch.bfloat16, None, print)
    weights_kept = KeptWeights([torch.empty(1)])
    weights_kept._device, weights_kept.copies, weights_kept._sizes[0] = instruments.device, 0, 10 << 30
    with instruments.step(1):
        card.peak = max(card.peak, 30 << 30)
        weights_kept.drop()
    assert instruments.values(1, 1, True, 1.0)["gpu/memory_gib"] == 30 and weights_kept.copies == 2
