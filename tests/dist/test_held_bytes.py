"""What ranks hold of networks during RL, counted from their live tensors: no whole copies while they train."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("rl_memory", Path(__file__).parents[2] / "bench" / "rl_memory.py")
rl_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rl_memory)


def test_ranks_hold_a_whole_network_only_while_they_sample():
    """2 and 4 gloo ranks: policy and reference are shards, a checkpoint holds no clone, the gathered copy goes."""
    layouts = {"2 ranks": {"ep": 2}, "4 ranks": {"pp": 2, "ep": 2}}
    facts = rl_memory.measure(layouts)
    for name, row in facts["layouts"].items():
        for moment, gathered in (("sampling", facts["whole"]), ("updates", 0)):
            held = row[moment]
            assert held["weights"] < (0.7 if name == "2 ranks" else 0.45) * facts["whole"]
            assert held["reference"] == pytest.approx(held["weights"], rel=0.01)
            assert held["gathered"] == pytest.approx(gathered, rel=0.01)
            assert held["rounded"] == held["critic"] == held["checkpoint"] == 0
