"""The best layout of a cluster: every (PP, EP, DP), schedule, recomputation, micro-batch and precision that is not set
by hand, bounded from below by its computation, pruned by memory, the most promising simulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from bessemer.dist import mesh
from bessemer.dist.mesh import Layout
from bessemer.dist.schedules import schedule
from bessemer.dist.table import Table
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.plan import memory
from bessemer.plan.hardware import GIB, Cluster
from bessemer.plan.layers import cuts, layer_times
from bessemer.plan.memory import Numbers
from bessemer.plan.plan_config import Wanted, with_layout
from bessemer.plan.setup import Setup
from bessemer.plan.step import step_time

SIMULATED = 24
"""Candidates that fit and are simulated."""
SCHEDULES = ("dualpipe", "dualpipe-v", "zb1p", "1f1b", "interleaved")
RECOMPUTE = ((), ("experts",), ("attend",), ("attend", "experts"))
ROWS = (1, 2, 4)
PIPELINES = 32
"""The longest pipeline that is looked at, unless it is set."""


@dataclass(frozen=True)
class Found:
    """One candidate that was simulated."""

    setup: Setup
    rate: float
    """Tokens a second and device."""
    bytes: int
    """Of the fullest rank."""

    def facts(self) -> dict[str, Any]:
        layout = self.setup.layout
        return {
            "pp": layout.pp, "ep": layout.ep, "dp": layout.dp, "schedule": self.setup.schedule,
            "recompute": list(self.setup.recompute), "micro_rows": self.setup.rows, "micro_batches": self.setup.micro,
            "precision": "fp8" if self.setup.fp8 else "bf16", "tokens_per_second_per_gpu": self.rate,
            "memory_gib": self.bytes / GIB,
        }  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """The best first; how many were looked at, and why others are out."""

    found: list[Found]
    considered: int
    refused: Counter


def search(cfg: ModelConfig, wanted: Wanted, cluster: Cluster) -> Searched:
    """UserError if nothing fits."""
    candidates, refused = _candidates(cfg, wanted, cluster)
    considered = len(candidates) + sum(refused.values())
    candidates.sort(key=_lower_bound)
    found: list[Found] = []
    least = float("inf")
    for setup in candidates:
        if len(found) == SIMULATED:
            break
        size = _highest(cfg, setup)
        if size > setup.device.room:
            refused[f"needs more memory than a {setup.device.name} has"] += 1
            least = min(least, size)
            continue
        found.append(Found(setup, setup.step_tokens / step_time(setup).seconds / setup.layout.world, size))
    if not found:
        why = "; ".join(f"{count} {reason}" for reason, count in refused.most_common(3))
        need = f" (the smallest needs {least / GIB:.0f} GiB)" if least < float("inf") else ""
        raise UserError(f"no layout of {cluster} can hold this run{need}: {why}; use more devices or a smaller batch")
    found.sort(key=lambda one: -one.rate)
    return Searched(found, considered, refused)


def _candidates(cfg: ModelConfig, wanted: Wanted, cluster: Cluster) -> tuple[list[Setup], Counter]:
    found: list[Setup] = []
    refused: Counter = Counter()
    formats = (wanted.precision,) if wanted.precision else ("fp8", "bf16") if cluster.device.fp8 else ("bf16",)
    for layout in _layouts(cfg, wanted, cluster):
        for rows in (wanted.micro_rows,) if wanted.micro_rows else ROWS:
            for name in (wanted.schedule,) if wanted.schedule else SCHEDULES if layout.pp > 1 else ("1f1b",):
                for again in (wanted.recompute,) if wanted.recompute is not None else RECOMPUTE:
                    for format in formats:
                        if again and format == "fp8" and wanted.recompute is None:
                            continue  # our FP8 makes again what it can by itself (`model.recompute`)
                        told = replace(wanted, micro_rows=rows, schedule=name, recompute=again, precision=format)
                        try:
                            setup = with_layout(told, cfg, cluster, layout)
                            stages = _table(setup.schedule, layout.pp, _few(setup)).stages
                        except UserError:
                            refused["batch or schedule does not divide among the ranks"] += 1
                            continue
                        if stages > cfg.n_layers:
                            refused["more pipeline stages than layers"] += 1
                        elif setup.micro < 2 * layout.pp and name in ("dualpipe", "dualpipe-v"):
                            refused["too few micro-batches for the schedule"] += 1
                        else:
                            found.append(setup)
    return found, refused


def _layouts(cfg: ModelConfig, wanted: Wanted, cluster: Cluster) -> list[Layout]:
    size, node = cluster.size, wanted.node or cluster.device.devices
    found = []
    for pp in (wanted.pp,) if wanted.pp else [n for n in range(1, min(size, PIPELINES) + 1) if size % n == 0]:
        for ep in (wanted.ep,) if wanted.ep else [n for n in range(1, cfg.n_routed_experts + 1)]:
            if size % (pp * ep) or (wanted.dp and pp * ep * wanted.dp != size):
                continue
            layout = Layout(pp, size // (pp * ep), ep, node)
            if not mesh.refusal(layout, cfg, size):
                found.append(layout)
    if not found:
        mesh.check(Layout(wanted.pp or 1, wanted.dp or 1, wanted.ep or 1, node), cfg, size)
    return found


def _few(setup: Setup) -> int:
    """Micro-batches that suffice for the most that a rank holds at once."""
    return min(setup.micro, 4 * setup.layout.pp)


@cache
def _table(name: str, ranks: int, micro: int) -> Table:
    return schedule(name, ranks, micro)


def _highest(cfg: ModelConfig, setup: Setup) -> int:
    table = _table(setup.schedule, setup.layout.pp, _few(setup))
    ranks = memory.per_rank(
        cfg, setup.layout, table, setup.rows, setup.length, Numbers(fp8=setup.fp8), setup.recompute, setup.mtp,
        cuts(setup, table.stages),
    )  # fmt: skip
    return max(sum(kinds.values()) for kinds in ranks)


def _lower_bound(setup: Setup) -> float:
    """Seconds a token and device that no order of work can beat: its computation, and communication where no pair hides
    it, with the bubble of the schedule's formula (reference E.6)."""
    times = {dense: layer_times(setup, dense, 0) for dense in (True, False)}
    shape, pp = setup.shape, setup.layout.pp
    hidden = setup.schedule.startswith("dualpipe")
    one = {d: t.compute + (0.0 if hidden else t.communication) for d, t in times.items()}
    stage = (shape.dense * one[True] + (shape.n_layers - shape.dense + setup.n_mtp) * one[False]) / pp
    bubble = {"1f1b": pp - 1, "interleaved": (pp - 1) / 2}.get(setup.schedule, (pp - 1) / 3)
    return (setup.micro + bubble) * stage * pp / (setup.tokens * setup.micro)
