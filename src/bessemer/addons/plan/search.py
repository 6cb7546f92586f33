"""Finds the best layout for a run on a cluster.

All combinations of (PP, EP, DP), schedule, recomputation, micro-batch and precision that the user left open are sorted
by a lower bound on their time and pruned by memory; the most promising ones are simulated. CP is the user's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from bessemer.addons.distributed import mesh
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan.cost import setup_memory
from bessemer.addons.plan.hardware import GIB, ClusterSpec
from bessemer.addons.plan.layer_time import layer_times
from bessemer.addons.plan.plan_config import PlanConfig, with_layout
from bessemer.addons.plan.step_time import kept_table, step_time
from bessemer.addons.plan.training_setup import Setup
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig

SIMULATED = 24
"""The most candidates to simulate."""
SCHEDULES = ("dualpipe", "dualpipe-v", "zb1p", "1f1b", "interleaved")
RECOMPUTE = ((), ("experts",), ("attend",), ("attend", "experts"))
ROWS = (1, 2, 4)
PIPELINES = 32
"""The most pipeline ranks to consider, unless the user sets them."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits, and its simulated rate."""

    setup: Setup
    rate: float
    """Tokens per second per device."""
    bytes: int
    """Bytes of the rank that needs the most."""

    def facts(self) -> dict[str, Any]:
        layout = self.setup.layout
        return {
            "pp": layout.pp, "ep": layout.ep, "dp": layout.dp, "cp": layout.cp, "schedule": self.setup.schedule,
            "recompute": list(self.setup.recompute), "micro_rows": self.setup.rows, "micro_batches": self.setup.micro,
            "precision": "fp8" if self.setup.fp8 else "bf16", "tokens_per_second_per_gpu": self.rate,
            "memory_gib": self.bytes / GIB,
        }  # fmt: skip


@dataclass(frozen=True)
class SearchResult:
    """Candidates, best first; how many layouts were considered, and why others were rejected."""

    candidates: list[Candidate]
    considered: int
    rejected: Counter


def search(cfg: ModelConfig, config: PlanConfig, cluster: ClusterSpec) -> SearchResult:
    """The fastest layouts; UserError if nothing fits."""
    setups, rejected = _setups(cfg, config, cluster)
    considered = len(setups) + sum(rejected.values())
    setups.sort(key=_lower_bound)
    candidates: list[Candidate] = []
    least = float("inf")
    for setup in setups:
        if len(candidates) == SIMULATED:
            break
        size = _peak_bytes(cfg, setup)
        if size > setup.device.room:
            rejected[f"needs more memory than a {setup.device.name} has"] += 1
            least = min(least, size)
            continue
        candidates.append(Candidate(setup, setup.step_tokens / step_time(setup).seconds / setup.layout.world, size))
    if not candidates:
        why = "; ".join(f"{count:,} layouts rejected ({reason})" for reason, count in rejected.most_common(3))
        need = f" (the smallest needs {least / GIB:.0f} GiB)" if least < float("inf") else ""
        raise UserError(f"no layout of {cluster} can hold this run{need}: {why}; use more devices or a smaller batch")
    candidates.sort(key=lambda candidate: -candidate.rate)
    return SearchResult(candidates, considered, rejected)


def _setups(cfg: ModelConfig, config: PlanConfig, cluster: ClusterSpec) -> tuple[list[Setup], Counter]:
    setups: list[Setup] = []
    rejected: Counter = Counter()
    formats = (config.precision,) if config.precision else ("fp8", "bf16") if cluster.device.fp8 else ("bf16",)
    for layout in _layouts(cfg, config, cluster):
        for rows in (config.micro_rows,) if config.micro_rows else ROWS:
            for name in (config.schedule,) if config.schedule else SCHEDULES if layout.pp > 1 else ("1f1b",):
                for recompute in (config.recompute,) if config.recompute is not None else RECOMPUTE:
                    for format in formats:
                        if recompute and format == "fp8" and config.recompute is None:
                            continue  # FP8 training recomputes what it can by itself (`fp8_layers`)
                        options = replace(config, micro_rows=rows, schedule=name, recompute=recompute, precision=format)
                        try:
                            setup = with_layout(options, cfg, cluster, layout)
                            stages = kept_table(setup.schedule, layout.pp, _enough(setup)).stages
                        except UserError:
                            rejected["batch or schedule does not divide among the ranks"] += 1
                            continue
                        if setup.micro == 1 and setup.rows < rows and config.micro_rows is None:
                            rejected["larger micro-batches than a step has sequences"] += 1
                        elif stages > cfg.n_layers:
                            rejected["more pipeline stages than layers"] += 1
                        elif setup.micro < 2 * layout.pp and name in ("dualpipe", "dualpipe-v"):
                            rejected["too few micro-batches for the schedule"] += 1
                        else:
                            setups.append(setup)
    return setups, rejected


def _layouts(cfg: ModelConfig, config: PlanConfig, cluster: ClusterSpec) -> list[Layout]:
    size, node, cp = cluster.size, config.node or cluster.device.devices, config.cp or 1
    layouts = []
    for pp in (config.pp,) if config.pp else [n for n in range(1, min(size, PIPELINES) + 1) if size % n == 0]:
        for ep in (config.ep,) if config.ep else [n for n in range(1, cfg.n_routed_experts + 1)]:
            if size % (pp * ep * cp) or (config.dp and pp * ep * cp * config.dp != size):
                continue
            layout = Layout(pp, size // (pp * ep * cp), ep, node, cp)
            if not mesh.refusal(layout, cfg, size):
                layouts.append(layout)
    if not layouts:
        mesh.check(Layout(config.pp or 1, config.dp or 1, config.ep or 1, node, cp), cfg, size)
    return layouts


def _enough(setup: Setup) -> int:
    """Enough micro-batches to reach the peak memory of a rank."""
    return min(setup.micro, 4 * setup.layout.pp)


def _peak_bytes(cfg: ModelConfig, setup: Setup) -> int:
    table = kept_table(setup.schedule, setup.layout.pp, _enough(setup))
    return max(sum(kinds.values()) for kinds in setup_memory(cfg, setup, table))


def _lower_bound(setup: Setup) -> float:
    """Seconds per token and device that no order of work can beat: computation, communication that no pair hides, and
    the bubble by the schedule's formula (V3 Table 2)."""
    times = {dense: layer_times(setup, dense, 0) for dense in (True, False)}
    shape, pp = setup.shape, setup.layout.pp
    hidden = setup.schedule.startswith("dualpipe")
    per_layer = {d: t.compute + (0.0 if hidden else t.communication) for d, t in times.items()}
    stage = (shape.dense * per_layer[True] + (shape.n_layers - shape.dense + setup.n_mtp) * per_layer[False]) / pp
    bubble = {"1f1b": pp - 1, "interleaved": (pp - 1) / 2}.get(setup.schedule, (pp - 1) / 3)
    return (setup.micro + bubble) * stage * pp / (setup.step_tokens / setup.ranks)
