"""What the planner says about a claim: predictions that use no published duration, and its record on other runs."""

from __future__ import annotations

from functools import cache
from typing import Any

from bessemer.addons.plan import memory
from bessemer.addons.plan.cost import RunPlan, ideas
from bessemer.addons.plan.hardware import GIB
from bessemer.addons.plan.layer_time import cuts
from bessemer.addons.plan.memory import NumberFormats
from bessemer.model import accounting
from bessemer_claims import audit, credibility
from bessemer_claims.chance import Quantiles
from bessemer_claims.registry import read_toml

Values = dict[str, Any]
PLANNED = frozenset(("M21", "L8", "F4", "F5", "F9", "P6", "P7", "Z11", "R7", "K1", "K2", "K3", "K8", "K9"))


@cache
def _plan() -> RunPlan:
    return audit.v3()


@cache
def _audit() -> dict[str, tuple[float, float]]:
    """(predicted, published) of the audit's claims, by their key."""
    table = read_toml("reports.toml")
    lines = {line.claim: line for line in audit.deepseek_v3()}
    return {
        key: (lines[row["claim"]].predicted, row["value"])
        for key, row in table.items()
        if isinstance(row, dict) and row.get("claim") in lines
    }


@cache
def _without() -> Values:
    """How many times as long V3 takes without each of its ideas, and the memory that it takes in BF16."""
    worth = {name: cost for name, cost in ideas(_plan()).items() if not isinstance(cost, str)}
    return {
        "fp8": worth["FP8"]["factor"], "dualpipe": worth["DualPipe and its overlap"]["factor"],
        "mla": worth["MLA"]["factor"], "nodes": worth["node limit of the routing"]["factor"],
        "bf16_gib": worth["FP8"]["memory_gib"],
    }  # fmt: skip


@cache
def outside_view() -> Values:
    """Million GPU hours of V3's pre-training, corrected by the planner's errors on all other runs."""
    view, published = credibility.outside_view(), _audit()["pretraining"][1] / 1000
    return {
        "low": view.low, "high": view.high, "median": view.median, "published": published,
        "upper": view.high / published,
    }  # fmt: skip


DRAWS = 400


def inside_view() -> Quantiles:
    """Million GPU hours of V3's pre-training, by draws of the planner's uncertain inputs."""
    return Quantiles.of(credibility.inside_view(DRAWS, 0))


reference = credibility.reference


def floor() -> float:
    """Million GPU hours if every operation of V3 ran at the FP8 peak."""
    device = _plan().setup.device
    assert device.fp8 is not None, "an H800 has FP8"
    work = accounting.flops_per_token(_plan().cfg, 4096).training * _plan().tokens
    return work / (device.fp8 * 1e12) / 3600 / 1e6


def values(name: str) -> Values:
    """The planner's values for a claim, under the names that its rule and its sentences use."""
    results = {} if name in ("K1", "K3", "K9") else dict(_without())
    if name == "M21":
        results["gib"] = _plan().highest / GIB
    elif name == "F4":
        results["run"] = results["fp8"]
    elif name == "F5":
        results |= {"bf16": results["bf16_gib"], "fp8": _plan().highest / GIB}
    elif name == "P6":
        results |= _optimizer()
    elif name == "P7":
        results["mfu"] = _audit()["mfu"][0]
    elif name == "Z11":
        predicted, published = _audit()["r1_zero"]
        results |= {"planned": predicted, "error": 100 * (predicted / published - 1)}
    elif name == "R7":
        tokens_s, (margin, published) = _audit()["decode"][0] * 1000, _audit()["margin"]
        results |= {"cost": 8 * 2 / 3600 / tokens_s * 1e6, "miss": 100 * (margin / published - 1)}
    elif name == "K2":
        results["planned"] = _audit()["usd"][0]
    elif name in ("K1", "K9"):
        view = inside_view()
        results |= outside_view() | {"floor": floor(), "days": _plan().days}
        results |= {"inside_low": view.low, "inside_high": view.high}
        results["above_floor"] = results["published"] / results["floor"]
    elif name == "K3":
        own, *others = (run for run in reference() if "hours" in run)
        hours = [run["v3_hours"] for run in reference() if run["active"] > 10e9]
        results |= outside_view() | {"ratio": own["tflops"] / max(run["tflops"] for run in others)}
        results["spread"] = max(hours) / results["published"]
    return results


def _optimizer() -> Values:
    """GiB of masters and moments on the first stage: a GPU's share, and the whole for all that it trains."""
    plan, numbers = _plan(), NumberFormats(fp8=True)
    cut = cuts(plan.setup, plan.step.table.stages)
    params = memory.rank_params(plan.cfg, plan.setup.layout, plan.step.table, 0, numbers, cut)
    total = sum(size * ((0 if kind.full else 4) + 2 * numbers.moments) for kind, size in params.vectors.items()) / GIB
    shared = (plan.memory[0]["masters"] + plan.memory[0]["moments"]) / GIB
    return {"shared": shared, "whole": total, "saved": total / shared}
