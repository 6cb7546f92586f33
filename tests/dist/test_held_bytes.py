"""What ranks hold of networks during RL, counted from their live tensors: no whole copies while they train."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("rl_memory", Path(__file__).parents[2] / "bench" / "rl_memory.py")
rl_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rl_memory)


def test_ranks_hold_a_whole_network_only_while_they_sample():
    """2 and 4 gloo ranks: policy and reference are shards, a checkpoint holds no clone, the gathered copy goes."""
    facts = rl_memory.measure(["2 ranks, ep 2", "4 ranks, pp 2 x ep 2"])
    for name, row in facts["layouts"].items():
        for moment, gathered in (("sampling", row["whole"]), ("updates", 0)):
            held = row[moment]
            assert held["weights"] < (0.7 if name == "2 ranks, ep 2" else 0.45) * row["whole"]
            assert held["reference"] == pytest.approx(held["weights"], rel=0.01)
            assert held["gathered"] == pytest.approx(gathered, rel=0.01)
            assert held["rounded"] == held["critic"] == held["checkpoint"] == 0


@pytest.mark.parametrize(("name", "share"), [("2 ranks, ep 2, ray", 0.7), ("2 ranks, FSDP2, ray", 0.51)])
def test_ranks_hold_no_whole_network_for_a_sampler_elsewhere(name, share):
    """Two rollouts by a Ray worker: rank 0 hands one tensor over at a time."""
    pytest.importorskip("ray")
    (row,) = rl_memory.measure([name])["layouts"].values()
    for held in (row["sampling"], row["updates"]):
        assert held["gathered"] == 0 and held["weights"] < share * row["whole"]
        assert held.get("handed over", 0) < 0.3 * row["whole"]
    assert row["sampling"]["handed over"] > 0
