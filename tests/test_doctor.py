"""The doctor's verdicts on simulated machines."""

import json

import pytest

from bessemer.addons.plan import doctor


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.measured, "gemm_rates", lambda: {"float32": 60.0, "bfloat16": 240.0})
    return doctor.examine(tmp_path / "runs" / "deep")


def note(facts, about):
    return next((level, text) for subject, level, text in doctor._judge(facts) if subject == about)


def test_facts_are_json_and_complete(machine):
    facts = json.loads(json.dumps(machine))
    assert facts["gemm_gflops"]["bfloat16"] == 240.0 and facts["dtype"] == "bfloat16"
    assert facts["cores"] >= 1 and facts["disk_free_gb"] > 0 and facts["writable"] is True
    text = doctor.describe(facts)
    assert "bfloat16 with float32 masters (measured GEMM: float32 60, bfloat16 240 GFLOPS)" in text
    assert len(text.splitlines()) == len(facts["notes"]) + 1


@pytest.mark.parametrize(
    ("about", "change", "level", "words"),
    [("GPU", {"gpus": []}, "slow", "tiny.toml"), ("GPU", {"gpus": ["H100"]}, "ok", "H100"),
     ("GPU", {"gpus": [], "idle_gpu": "an H100 cannot be used"}, "bad", "an H100 cannot be used"),
     ("CPU", {"cores": 2, "threads": 8}, "slow", "OMP_NUM_THREADS=2"),
     ("CPU", {"cores": 64, "threads": 1}, "slow", "idle"),
     ("CPU", {"cores": 2, "threads": 1}, "ok", "1 thread"),
     ("workers", {"workers": 1}, "ok", "one process"),
     ("workers", {"workers": 2, "shared_memory_mb": 4000}, "ok", "2 processes"),
     ("workers", {"workers": 2, "shared_memory_mb": 64}, "slow", "--shm-size"),
     ("numbers", {"dtype": "float32", "gpus": [], "flags": ["avx2"]}, "slow", "no BF16 instructions"),
     ("FP8", {"fp8": [["gemm", "emulation", "exact; not triton: the package triton is not installed"]]}, "slow",
      "2 to 3 times as slow (the package triton is not installed)"),
     ("FP8", {"fp8": [["gemm", "triton", "our kernels"], ["turn", "triton", "our kernels"]]}, "ok", "triton"),
     ("exchange", {"exchange": {"deepep": "", "all-to-all": ""}}, "ok", "several ranks: DeepEP"),
     ("exchange", {}, "ok", "all-to-all; not DeepEP: the package deep_ep is not installed"),
     ("compiler", {"compiler": None}, "slow", "g++"), ("compiler", {"compiler": "/usr/bin/g++"}, "ok", "works"),
     ("kernels", {"kernels": ["avx2", "avx2"]}, "ok", "avx2: fused"),
     ("kernels", {"kernels": ["off", "off (no C++ compiler; install g++)"]}, "slow", "install g++): torch's own"),
     ("sandbox", {"sandbox": "bubblewrap", "sandbox_trials": {}}, "ok", "bubblewrap: answers in code run"),
     ("sandbox", {"sandbox": "namespaces", "sandbox_trials": {"bubblewrap": "not there"}}, "ok",
      "install bubblewrap (bubblewrap: not there)"),
     ("sandbox", {"sandbox": "none", "sandbox_trials": {"bubblewrap": "x", "namespaces": "y"}}, "slow",
      "not run (bubblewrap: x; namespaces: y); install bubblewrap"),
     ("memory", {"memory_gb": 2.0, "memory_available_gb": 1.0}, "bad", "close other programs"),
     ("memory", {"memory_gb": None, "memory_available_gb": None}, "ok", "unknown"),
     ("disk", {"writable": False}, "bad", "cannot be written"), ("disk", {"disk_free_gb": 0.1}, "bad", "--out")],
)  # fmt: skip
def test_judgements(machine, about, change, level, words):
    found_level, text = note(machine | change, about)
    assert found_level == level and words in text


def test_the_last_line_counts_what_is_to_fix(machine):
    bad = {"about": "disk", "level": "bad", "text": "full"}
    assert doctor.describe(machine | {"notes": [bad]}).endswith("1 problem to fix before a run")
    assert doctor.describe(machine | {"notes": []}) == "ready to run"
