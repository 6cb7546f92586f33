"""Rehearsal certificates of recipes on their clusters, and of runs that they must refuse.

    python bench/rehearsals.py --json bench/results/rehearsals.json [--only WORD]

Certified: recipes with different axes, at full size, with a miniature on at most four gloo ranks of one core. Refused:
recipes that do not fit, and one recipe whose collective operations have an error planted in every rank, one error at
a time. Exit status 1 if a verdict is not the expected one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from machine import processor

from bessemer.addons.plan.hardware import parse_cluster
from bessemer.addons.plan.rehearsal.certificate import PASSED, REFUSED, certify

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))
from planted_collectives import PLANTED  # noqa: E402

CASES: dict[str, tuple[str, str, list[str], str | None, str]] = {
    "V3, pre-training": ("recipes/v3.toml", "2048xH800", [], "pretrain", PASSED),
    "V3, its extension on the same layout": ("recipes/v3.toml", "2048xH800", [], None, REFUSED),
    "V3 with its extension on 16,384": (
        "recipes/v3.toml", "16384xH800",
        ["layout.pp=16", "layout.ep=16", "layout.cp=64", "layout.dp=1",
         'layout.recompute=["attend","experts","finish"]', "pretrain.fp8=off", "extend-32k.fp8=off",
         "extend-128k.fp8=off"], None, PASSED,
    ),
    "R1": ("recipes/r1-paper.toml", "2048xH200", [], None, PASSED),
    "V2-Lite on a node": ("recipes/node.toml", "8xH100", [], None, PASSED),
    "V3, pre-training with ZBV": ("recipes/v3.toml", "2048xH800",
                                 ["layout.schedule=zbv", "pretrain.batch_rows=15360"], "pretrain", PASSED),
    "Qwen2.5-7B under FSDP2": ("recipes/qwen2.5-7b-grpo.toml", "8xH100", [], None, PASSED),
    "V3, pre-training on too few cards": (
        "recipes/v3.toml", "256xH800", ["layout.pp=16", "layout.ep=16", "layout.dp=1"], "pretrain", REFUSED,
    ),
}  # fmt: skip
"""Recipe, cluster, overrides, last stage, verdict."""
PLANTED_IN = "V3, pre-training"


def short(facts: dict[str, Any]) -> dict[str, Any]:
    """What the results keep of a certificate."""
    groups = [group for network in facts["run"] for group in network["groups"]]
    works = [work for group in groups for work in group.get("works", {}).values()]
    incidents = [network["incidents"] for network in facts["run"] if "incidents" in network]
    kept: dict[str, Any] = {name: facts[name] for name in ("recipe", "set", "until", "cluster", "verdict", "reasons")}
    memory = {
        stage["stage"]: max(row["gib"] for row in stage["memory"]["by_rank"])
        for stage in facts["computed"]["stages"]
        if "memory" in stage
    }
    return kept | {
        "groups": {group["name"]: group["schedules"] for group in groups},
        "calls": {group["name"]: sum(calls for operations in group.get("collectives", {}).values()
                                     for calls, _ in operations.values()) for group in groups},
        "largest difference": {name: max((work[name] for work in works), default=None)
                               for name in ("losses", "gradients", "later")},
        "incidents": [
            {"late rank changes nothing": own["slow"]["unchanged"], "hung rank is named": own["hung"]["named"],
             "killed rank is named": own["killed"]["named"], "seconds until the others ended": own["killed"]["seconds"],
             "resumed at": own["resumed"]["first_step"], "resumed with the same metrics": own["resumed"]["equal"]}
            for own in incidents
        ],
        "rollouts": [network["rollouts"]["difference"] for network in facts["run"]
                     if "difference" in network.get("rollouts", {})],
        "fullest GiB": memory, "unproved": len(facts["unproved"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="a word in the names of the cases")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    wrong: list[str] = []
    result = {"torch": torch.__version__, "processor": processor(), "processes": 4, "certificates": {}}
    if arguments.json is not None and arguments.only and arguments.json.exists():
        result["certificates"] = json.loads(arguments.json.read_text())["certificates"]
    path, cluster, overrides, until, _ = CASES[PLANTED_IN]
    cases = [(name, *case, None) for name, case in CASES.items()]
    cases += [
        (f"planted: {name}", path, cluster, overrides, until, REFUSED, wrap) for name, wrap in PLANTED.items()
    ]  # fmt: skip
    for name, *case in cases:
        if arguments.only not in name:
            continue
        certificates = result["certificates"] | {name: _certified(name, *case, wrong)}
        result["certificates"] = {case[0]: certificates[case[0]] for case in cases if case[0] in certificates}
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


def _certified(
    name: str, path: str, cluster: str, overrides: list[str], until: str | None, verdict: str, plant: Any,
    wrong: list[str],
) -> dict[str, Any]:  # fmt: skip
    began = time.monotonic()
    facts = certify(path, overrides, parse_cluster(cluster), 4, until=until, plant=plant)
    kept = short(facts) | {"seconds": time.monotonic() - began}
    print(f"{name}: {facts['verdict']} {'; '.join(facts['reasons'])[:200]}", flush=True)
    if facts["verdict"] != verdict:
        wrong.append(f"{name}: {facts['verdict']}, not {verdict}: {facts['reasons']}")
    return kept


if __name__ == "__main__":
    main()
