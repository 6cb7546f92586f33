"""The pre-flight check: links measured between real processes, and the report on slow ones."""

import json
import os
import re
import subprocess
import sys

import torch
from ranks import on_ranks

from bessemer.addons.distributed import links
from bessemer.addons.distributed.ranks import Ranks


def measured(me):
    os.environ["LOCAL_RANK"] = str(me)
    links.platform.node = lambda: f"node{me // 2}"
    return links.measure(Ranks(None, me, 4, torch.device("cpu")))


def test_every_rank_is_measured_with_its_neighbours():
    actual = on_ranks(4, measured)
    assert actual[0] == actual[3] and json.loads(json.dumps(actual[0])) == actual[0]
    facts = actual[0]
    assert facts["hosts"] == ["node0", "node1"] and min(facts["gigabytes_per_second"].values()) > 0
    pairs = {(link["kind"], link["from"], link["to"]) for link in facts["links"]}
    assert pairs == {("same host", *pair) for pair in ((0, 1), (1, 0), (2, 3), (3, 2))}


def facts(slow=None, odd=None, without=None):
    machines = [
        {
            "host": f"node{r // 2}",
            "place": r % 2,
            "device": "A100" if r == odd else "H100",
            "deepep": "not installed" if without is None or r == without else "",
        }
        for r in range(4)
    ]
    rate = {("other host", 1, 3): slow or 40.0}
    pairs = [("same host", a, b) for a, b in links._neighbours(machines)]
    pairs += [("other host", a, b) for a, b in links._across(machines, ["node0", "node1"])]
    lines = [{"kind": k, "from": a, "to": b, "gigabytes_per_second": rate.get((k, a, b), 40.0)} for k, a, b in pairs]
    return {
        "ranks": machines,
        "hosts": ["node0", "node1"],
        "gigabytes_per_second": {"all-reduce": 200.0},
        "links": lines,
    }


def test_slow_links_and_odd_devices_are_named():
    assert [level for _, level, _ in links.notes(facts())] == ["ok"] * 4
    text = [text for _, level, text in links.notes(facts(slow=4.0, odd=2)) if level == "slow"]
    assert re.match("rank 2.* A100.* rank 0.* H100", text[0])
    assert text[1].startswith("rank 1 (node0) to rank 3 (node1): 4 GB/s, other host")


def test_the_rank_without_deepep_is_named():
    text = [text for _, level, text in links.notes(facts(without=3)) if level == "slow"]
    assert text == ["DeepEP cannot be used, because rank 3 (node1) cannot: not installed"]


def test_doctor_on_ranks_reports_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bessemer"]
    ended = subprocess.run([*command, "doctor", "--folder", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("torch 2.") == 1 and "2 on 1 host, CPU" in ended.stdout
    assert "all-reduce" in ended.stdout and "same host:" in ended.stdout
