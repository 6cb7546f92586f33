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
from bessemer_claims import audit, credibility, planner_page
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
    """Million GPU hours of V3's pre-training: published, predicted (`point`), and corrected by the planner's errors on
    all other runs; and how well that correction did on the test runs."""
    view, published = credibility.outside_view(), _audit()["pretraining"][1] / 1000
    record = planner_page.outside_view()
    return {
        "low": view.low, "high": view.high, "median": view.median, "published": published,
        "upper": view.high / published, "point": _plan().gpu_hours / 1e6, "n_all": record["n_all"],
        "n_tested": record["n_tested"], "record_inside": record["tested_inside"], "n_fast": record["n_fast"],
        "n_before": record["n_others"], "fast_low": record["fast_low"], "fast_high": record["fast_high"],
    }  # fmt: skip


GPUS, DOLLARS = 2048, 2.0
"""As the V3 report has them: its GPUs, and what an hour of one costs."""


@cache
def independent() -> Values:
    """The one public measurement of V3's network by others, NVIDIA's benchmark, beside the published run: million GPU
    hours, days on as many GPUs, million dollars; `_share` and `_times` are relative to the published rate."""
    own, nvidia = credibility.reference()[:2]
    tiles, usual = nvidia["tiles"]

    def bill(name: str, hours: float) -> Values:
        days = hours * 1e6 / _plan().gpus / 24
        return {f"{name}_hours": hours, f"{name}_days": days, f"{name}_usd": DOLLARS * hours}

    return bill("own", own["v3_hours"]) | bill("nvidia", nvidia["v3_hours"]) | {
        "nvidia_gpus": nvidia["gpus"], "nvidia_share": 100 * nvidia["tokens_s"] / own["tokens_s"],
        "nvidia_times": nvidia["v3_hours"] / own["v3_hours"],
        "nvidia_tiles_usd": DOLLARS * nvidia["v3_hours"] * usual / tiles,
    }  # fmt: skip


def bounds() -> Values:
    """What V3's bill would be at the rate of the slowest run of reference.toml, in multiples of the published one."""
    own, *others = reference()
    large = [run for run in others if not run["small"]]
    return {
        "listed": len(others), "listed_large": len(large), "listed_small": len(others) - len(large),
        "spread": credibility.slowest(False) / own["v3_hours"],
        "spread_all": credibility.slowest(True) / own["v3_hours"],
        "ratio": own["tflops"] / max(run["tflops"] for run in large if "hours" in run),
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
        results |= {"gib": _plan().highest / GIB, "has": _has(), "gpus": _plan().gpus}
    elif name == "F4":
        results["whole"] = results["fp8"]
    elif name == "F5":
        results |= {"bf16": results["bf16_gib"], "fp8": _plan().highest / GIB, "has": _has()}
    elif name == "P6":
        results |= _optimizer()
    elif name == "P7":
        results["mfu"] = _audit()["mfu"][0]
    elif name == "Z11":
        predicted, published = _audit()["r1_zero"]
        results |= {"planned": predicted, "error": 100 * (predicted / published - 1)}
    elif name == "R7":
        tokens_s, (margin, published) = _audit()["decode"][0] * 1000, _audit()["margin"]
        cost = 8 * DOLLARS / 3600 / tokens_s * 1e6
        results |= {"cost": cost, "dollars": DOLLARS, "miss": 100 * (margin / published - 1)}
    elif name == "K2":
        results |= independent() | {"planned": _audit()["usd"][0]}
    elif name in ("K1", "K9"):
        view = inside_view()
        results |= outside_view() | independent() | {"floor": floor(), "days": _plan().days}
        results |= {"inside_low": view.low, "inside_high": view.high}
        results["above_floor"] = results["published"] / results["floor"]
    elif name == "K3":
        results |= outside_view() | independent() | bounds()
    return results


def _has() -> float:
    """GiB of memory of V3's GPUs."""
    return _plan().setup.device.memory


def _optimizer() -> Values:
    """GiB of masters and moments on the first stage: a GPU's share, and the whole for all that it trains."""
    plan, numbers = _plan(), NumberFormats(fp8=True)
    cut = cuts(plan.setup, plan.step.table.stages)
    params = memory.rank_params(plan.cfg, plan.setup.layout, plan.step.table, 0, numbers, cut)
    total = sum(size * ((0 if kind.full else 4) + 2 * numbers.moments) for kind, size in params.vectors.items()) / GIB
    shared = (plan.memory[0]["masters"] + plan.memory[0]["moments"]) / GIB
    return {"shared": shared, "whole": total, "saved": total / shared}
