"""A rehearsal's runs on gloo ranks: equal to one process, and refused with an error planted in a collective."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from planted_collectives import PLANTED
from test_rehearsal import SMALL, small

from bessemer.addons.plan.rehearsal import miniature, processes, runs
from bessemer.addons.plan.rehearsal.miniature import Layout, RankGroup
from bessemer.config.recipe import Recipe

FOREIGN = """
name = "foreign"
[layout]
dp = 2
[[stage]]
kind = "import"
name = "base"
model = "hf://Qwen/Qwen2.5-0.5B"
[[stage]]
kind = "rl"
name = "grpo"
from = "base"
tasks = ["arithmetic"]
"""


def network_of(tmp_path, world=8, *overrides):
    (network,), left_out = miniature.networks(small(tmp_path, *overrides), world, 4)
    assert not left_out
    return network


def of_group(tmp_path, layout, schedule="1f1b", plant=None, *overrides):
    """The facts of one group of the small recipe."""
    network = network_of(tmp_path, 8, *overrides)
    axes = tuple(name for name in ("pp", "ep", "cp", "dp") if getattr(layout, name) > 1)
    return runs._of_group(network, RankGroup(layout, schedule, axes), tmp_path, lambda text: None, plant)


def run_of(tmp_path, network, recipe, plant=None):
    return runs.run_all([network], recipe, lambda text: None, plant)[0]


def test_a_certificate_of_runs(call, tmp_path, monkeypatch):
    """The command on a small recipe: all pairs of axes, a slow, a hung and a killed rank, both files, and its check."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    status, out, _ = call("rehearse", "small.toml", "--cluster", "8xH100", "--out", "mine")
    facts = json.loads((tmp_path / "mine.json").read_text())
    assert status == 0 and facts["verdict"] == "PASSED" and out.startswith("PASSED"), facts["reasons"]
    (ran,) = facts["run"]
    assert [group["name"] for group in ran["groups"]] == ["pp 2 x ep 2", "pp 2 x dp 2", "ep 2 x dp 2"]
    for group in ran["groups"]:
        (work,) = group["works"].values()
        assert 0 < work["losses"] < runs.LOSSES and 0 < work["gradients"] < runs.GRADIENTS and work["biases"]
        for axis in group["axes"]:
            assert any(axis in axes for axes in group["collectives"]), (group["name"], axis)
    own = ran["incidents"]
    assert own["slow"]["unchanged"] and own["hung"]["named"] and own["killed"]["named"] and own["resumed"]["equal"]
    assert (
        1 < own["resumed"]["first_step"] <= miniature.STEPS and own["killed"]["codes"][own["rank"]] == -signal.SIGKILL
    )
    assert call("rehearse", "--check", "mine.json")[0] == 0


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_refused(tmp_path, name):
    layout = Layout(pp=2, ep=2)
    facts = of_group(tmp_path, layout, plant=PLANTED[name])
    assert facts["faults"], name


def test_messages_are_those_of_the_layout(tmp_path):
    """pp: each micro-batch passes one border forward and one backward; ep: rows of experts; dp: gradients once a
    step."""
    facts = of_group(tmp_path, Layout(pp=2, dp=2))
    borders = 2 * 2 * sum(miniature.micro_batches(RankGroup(Layout(pp=2, dp=2), "1f1b", ())))  # of two pipelines
    greetings = 2 * 2  # a number for each direction, when the groups are made
    assert not facts["faults"] and facts["collectives"]["pp"]["send"] == [
        borders + greetings, 4 * (borders * 64 * miniature.LENGTH + greetings)
    ]  # fmt: skip
    assert facts["collectives"]["pp"]["receive"] == facts["collectives"]["pp"]["send"]
    assert "all-to-all" not in str(facts["collectives"])


def test_rows_cut_over_ranks_and_experts_over_nodes(tmp_path):
    """Context parallelism and the exchange in two hops, which V3's groups of 64 experts need."""
    cut = of_group(tmp_path, Layout(ep=2, cp=2))
    assert not cut["faults"] and "cp" in cut["collectives"]
    hops = of_group(tmp_path, Layout(ep=4, node=2))
    assert not hops["faults"]
    assert hops["collectives"]["ep"]["all-to-all"][0] > cut["collectives"]["ep"]["all-to-all"][0]


def test_another_family_and_rl(tmp_path):
    """FSDP2 and GRPO's loop on two ranks."""
    (tmp_path / "foreign.toml").write_text(FOREIGN)
    recipe = Recipe.load(tmp_path / "foreign.toml")
    (network,), _ = miniature.networks(recipe, 2, 4)
    facts = run_of(tmp_path, network, recipe)
    assert not facts["faults"] and network.wanted == (miniature.FSDP,)
    assert facts["rollouts"]["rollouts"] == 2 and len(set(facts["rollouts"]["rewards"])) > 1
    plant = PLANTED["a reduce-scatter gives the mean in place of the sum"]
    assert run_of(tmp_path, network, recipe, plant)["faults"]


def test_rl_on_a_pipeline(tmp_path):
    """GRPO's objective and its loop, for a network of our own."""
    rl = '[[stage]]\nkind = "rl"\nname = "zero"\nfrom = "pretrain"\ntasks = ["arithmetic"]\nupdates_per_rollout = 2\n'
    (tmp_path / "rl.toml").write_text(SMALL.replace("dp = 2", "") + rl)
    recipe = Recipe.load(tmp_path / "rl.toml")
    (network,), _ = miniature.networks(recipe, 4, 4)
    assert [work.kind for work in network.works] == ["pretrain", "rl"]
    facts = run_of(tmp_path, network, recipe)
    assert not facts["faults"] and facts["rollouts"]["rollouts"] == 2
    assert facts["rollouts"]["difference"] < runs.ROLLOUTS_BOUND


def test_a_difference_in_any_rank_counts():
    plain = {1: {"loss": 2.0}, 2: {"loss": 2.0}}
    expected = {"metrics": plain, "gradients": {"w": np.ones(4), "v": np.ones(2)}, "biases": {"g": np.ones(3)}}

    def changed(**values):
        return expected | values

    good = runs.compare([expected, changed(gradients={"w": np.ones(4)})], expected)
    assert not runs.beyond(good)
    for bad in (
        changed(metrics=plain | {1: {"loss": 2.0001}}), changed(metrics=plain | {2: {"loss": 2.01}}),
        changed(metrics=plain | {1: {"loss": float("nan")}}), changed(metrics={1: {"loss": 2.0}}),
        changed(metrics=plain | {2: {}}), changed(gradients={"w": np.ones(4) * 1.001}),
        changed(gradients={"w": np.full(4, np.nan)}), changed(biases={"g": np.zeros(3)}),
    ):  # fmt: skip
        assert runs.beyond(runs.compare([expected, bad], expected)), bad
    assert runs.beyond(runs.compare([changed(gradients={"w": np.ones(4)})], expected)), "nobody has v"


def failing(ranks):
    if ranks.me == 1:
        raise ValueError("a bad rank")
    ranks.meet("others")


def test_a_failed_rank_ends_the_others():
    began = time.monotonic()
    ended = processes.on_ranks(2, failing, grace=3.0)
    assert ended.codes[1] == 1 and ended.late == [0] and "a bad rank" in ended.text and ended.values == [None, None]
    assert time.monotonic() - began < 60


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from bessemer import cli
sys.argv = ["bessemer", "rehearse", "small.toml", "--cluster", "8xH100", "--out", "mine"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_process(tmp_path, number):
    (tmp_path / "small.toml").write_text(SMALL)
    own = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=tmp_path, env=own, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None and "processes" in process.stderr.readline()
    time.sleep(2.0)
    os.kill(process.pid, number)
    assert process.wait(30) == 128 + number
    with pytest.raises(ProcessLookupError):  # nobody is left in its session's group
        for _ in range(50):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    assert not (tmp_path / "mine.json").exists()
    process.stderr.close()
