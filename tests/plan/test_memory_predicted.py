"""`bench/memory_predicted.py` on the cases that take seconds; the committed results have the others."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("memory_predicted", ROOT / "bench" / "memory_predicted.py")
memory_predicted = sys.modules["memory_predicted"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory_predicted)

CASES = {case.name: case for case in memory_predicted.CASES}


FAST = "qwen3_moe, 1 rank"
SLOW = ["own, 2 ranks, ep 2", "own, 2 ranks, ep 2, reference", "llama, 1 rank, LoRA",
        "qwen2, 1 rank, recomputed, reference", "llama, 2 ranks, FSDP2, recomputed",
        "own, 2 ranks, pp 2, reward model", "qwen2, 2 ranks, FSDP2, reward model"]  # fmt: skip


def check(name):
    case = CASES[name]
    if not memory_predicted.can_run(case):
        pytest.skip("models of other families are not sharded here")
    if case.family != "deepseek_v3":
        pytest.importorskip("peft" if case.lora else "transformers")
    result = memory_predicted.measure(case)
    assert result["passed"], (result["predicted"], result["counted"])


def test_predicted_bytes_are_those_counted():
    check(FAST)


@pytest.mark.parametrize("name", SLOW)
def test_predicted_bytes_are_those_counted_on_ranks_and_with_adapters(name):
    check(name)


def test_a_wrong_prediction_is_noticed(monkeypatch):
    """Moments in float32 where the run has BF16, as if the planner had forgotten the key."""
    case = CASES["own, 1 rank, BF16 moments"]
    predict = memory_predicted.predict_own
    monkeypatch.setattr(memory_predicted, "predict_own", lambda case, pp: predict(replace(case, moments="float32"), pp))
    assert not memory_predicted.measure(case)["passed"]


def test_the_committed_results_are_those_of_the_cases():
    facts = json.loads(memory_predicted.RESULTS.read_text())
    assert {result["name"] for result in facts["cases"]} <= CASES.keys() and len(facts["cases"]) >= 12
    assert facts["worst"] == max(abs(result["error"]) for result in facts["cases"]) <= facts["bound"]
